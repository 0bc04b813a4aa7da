"""PyTorch's side of the comparisons: the same work with diffusers' networks, written from the same equations.

Every function takes a `shapes.Setup` and returns a `shapes.Work`. Weights and optimiser (fused AdamW on GPUs) are
float32; with another dtype the networks run under autocast, and a frozen teacher holds its weights in that dtype.
"""

import contextlib
import pathlib

import diffusers
import numpy as np
import torch
from shapes import CRITIC_GAN, DECAY, GAN, GUIDANCE, LR, RATIO, Setup, Work, arrays

softplus = torch.nn.functional.softplus


class Side:
    """Device, precision and memory format of a setup, its inputs, and its noise schedule (Stable Diffusion's)."""

    def __init__(self, setup: Setup, cond: bool = False):
        torch.manual_seed(0)
        self.setup, self.device, self.dtype = setup, torch.device(setup.device), getattr(torch, setup.dtype)
        self.format = {"memory_format": torch.channels_last} if setup.channels_last else {}
        self.compiled = torch.compile if setup.compile else lambda f: f
        self.wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        first = {k: torch.tensor(x, device=self.device) for k, x in arrays(setup, cond).items()}
        nchw = lambda x: x.permute(0, 3, 1, 2).contiguous(**self.format) if x.ndim == 4 else x
        self.given = {k: nchw(x) for k, x in first.items()}
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.alphas = diffusers.DDPMScheduler(**betas).alphas_cumprod.to(self.device)

    def unet(self):
        """A UNet with random weights."""
        return diffusers.UNet2DConditionModel(**self.setup.config).to(self.device, **self.format)

    def copy(self, net):
        """A network of the same architecture; its weights are random, too."""
        return type(net).from_config(net.config).to(self.device, **self.format)

    def cast(self):
        """A context in which networks compute in the setup's dtype."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()

    def random_t(self, low: int = 0, high: int = 1000):
        """A timestep in [low, high) for each row."""
        return torch.randint(low, high, (self.setup.batch,), device=self.device)

    def level(self, t):
        """(alpha, sigma) at timesteps t, [b, 1, 1, 1]."""
        return self.alphas[t].sqrt().view(-1, 1, 1, 1), (1 - self.alphas[t]).sqrt().view(-1, 1, 1, 1)

    def noised(self, x, t):
        """(z_t, eps)."""
        eps, (a, s) = torch.randn_like(x), self.level(t)
        return a * x + s * eps, eps

    def x0_of(self, z, eps, t):
        """x0 of a noisy z_t and its noise."""
        a, s = self.level(t)
        return (z - s * eps) / a


class Optimiser:
    """AdamW of some networks, after clipping by the global norm."""

    def __init__(self, *nets):
        self.weights = [p for net in nets for p in net.parameters()]
        self.adam = torch.optim.AdamW(self.weights, LR, fused=self.weights[0].is_cuda or None)

    def update(self, loss):
        """One update down this loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def average(mean, net):
    """The moving average of a network's weights."""
    torch._foreach_lerp_([p.data for p in mean.parameters()], [p.data for p in net.parameters()], 1 - DECAY)


def unet_step(setup: Setup) -> Work:
    """One training step of the UNet."""
    side = Side(setup)
    unet = side.unet()
    optimiser, mean, net = Optimiser(unet), side.copy(unet), side.compiled(unet)

    def run():
        t = side.random_t()
        z, eps = side.noised(side.given["x0"], t)
        with side.cast():
            out = net(z, t, side.given["text"], return_dict=False)[0]
        optimiser.update(((out.float() - eps) ** 2).mean())
        average(mean, unet)

    return Work(run, side.wait)


def codi_step(setup: Setup) -> Work:
    """One step of CoDi, in which UNet and ControlNet train."""
    return codi(setup, freeze=False)


def pe_codi_step(setup: Setup) -> Work:
    """One step of PE-CoDi, in which only the ControlNet trains."""
    return codi(setup, freeze=True)


def codi(setup: Setup, freeze: bool) -> Work:
    """Noise consistency and conditional signal (eq. 8); with `freeze` the UNet stays as it is."""
    side = Side(setup, cond=True)
    unet = side.unet().requires_grad_(not freeze)
    branch = diffusers.ControlNetModel.from_unet(unet).to(side.device, **side.format)
    moving = (branch,) if freeze else (unet, branch)
    means = tuple(map(side.copy, moving))
    optimiser, cond = Optimiser(*moving), {"controlnet_cond": side.given["cond"], "return_dict": False}

    def forward(unet, branch):
        unet, branch, text = side.compiled(unet), side.compiled(branch), side.given["text"]

        def eps(z, t):
            down, mid = branch(z, t, text, **cond)
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            return unet(z, t, text, **extra, return_dict=False)[0].float()

        return eps

    online, target = forward(unet, branch), forward(unet if freeze else means[0], means[-1])

    def run():
        t = torch.randint(1, 1000, (1,), device=side.device).expand(setup.batch)
        z, eps = side.noised(side.given["x0"], t)
        with side.cast():
            predicted = online(z, t)
        x = side.x0_of(z, predicted, t)
        with torch.no_grad(), side.cast():
            a, s = side.level(t - 1)
            anchor = target(a * x + s * eps, t - 1)
        optimiser.update(((predicted - anchor) ** 2).mean() + ((x - side.given["x0"]) ** 2).mean())
        for mean, net in zip(means, moving, strict=True):
            average(mean, net)

    return Work(run, side.wait)


def discriminator(width: int, side: int):
    """DMD2's head on bottleneck features of `side` x `side`: 4x4 convolutions down to one logit."""
    block = lambda stride, padding: [
        torch.nn.Conv2d(width, width, 4, stride, padding), torch.nn.GroupNorm(min(32, width // 4), width),
        torch.nn.SiLU(),
    ]  # fmt: skip
    layers = []
    while side >= 8:
        layers, side = [*layers, *block(2, 1)], side // 2
    return torch.nn.Sequential(*layers, *block(4, 0), torch.nn.Conv2d(width, 1, 1))


def bottleneck(net, z, t, text):
    """A UNet's encoder and middle block."""
    emb = net.time_embedding(net.time_proj(t).to(z.dtype))
    h = net.conv_in(z)
    for block in net.down_blocks:
        h, _ = block(h, emb, **({"encoder_hidden_states": text} if hasattr(block, "attentions") else {}))
    return net.mid_block(h, emb, encoder_hidden_states=text)


class DMD2:
    """DMD2's networks and its two turns."""

    def __init__(self, setup: Setup):
        self.side = side = Side(setup)
        self.student, self.text = side.unet(), side.given["text"]
        self.fake, self.mean = side.copy(self.student), side.copy(self.student)
        teacher = side.copy(self.student).requires_grad_(False).to(side.dtype)
        width, levels = setup.config["block_out_channels"][-1], len(setup.config["block_out_channels"])
        self.disc = discriminator(width, setup.size // 2 ** (levels - 1)).to(side.device, **side.format)
        self.student_optimiser, self.critic = Optimiser(self.student), Optimiser(self.fake, self.disc)
        self.eps = {name: self.noise_of(net) for name, net in
                    {"student": self.student, "fake": self.fake, "teacher": teacher}.items()}  # fmt: skip
        self.features = side.compiled(lambda z, t: bottleneck(self.fake, z, t, self.text))

    def noise_of(self, net):
        """The noise that a network predicts, compiled if the setup says so."""
        compiled = self.side.compiled(net)
        return lambda z, t, text: compiled(z, t, text, return_dict=False)[0].float()

    def logits(self, x):
        """The discriminator's of noised samples."""
        t = self.side.random_t()
        with self.side.cast():
            h = self.features(self.side.noised(x, t)[0], t)
        return self.disc(h.float()).mean((1, 2, 3))

    def generate(self):
        """Samples of the student."""
        z = torch.randn_like(self.side.given["x0"])
        last = torch.full((self.side.setup.batch,), 999, device=self.side.device)
        with self.side.cast():
            eps = self.eps["student"](z, last, self.text)
        return self.side.x0_of(z, eps, last)

    def critic_turn(self):
        """Denoising of the student's samples, and the GAN loss."""
        with torch.no_grad():
            x = self.generate()
        t = self.side.random_t()
        z, eps = self.side.noised(x, t)
        with self.side.cast():
            out = self.eps["fake"](z, t, self.text)
        gan = softplus(self.logits(x)).mean() + softplus(-self.logits(self.side.given["x0"])).mean()
        self.critic.update(((out - eps) ** 2).mean() + CRITIC_GAN * gan)

    def direction(self, x):
        """The gradient of distribution matching at samples x, with guidance."""
        t, null = self.side.random_t(20, 981), self.side.given["null"]
        with torch.no_grad(), self.side.cast():
            z = self.side.noised(x, t)[0]
            plain, without = self.eps["teacher"](z, t, self.text), self.eps["teacher"](z, t, null)
            real = self.side.x0_of(z, without + GUIDANCE * (plain - without), t)
            fake = self.side.x0_of(z, self.eps["fake"](z, t, self.text), t)
            return (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)

    def student_turn(self):
        """Distribution matching and the GAN loss."""
        x = self.generate()
        g = self.direction(x)
        for p in self.critic.weights:  # no gradient of theirs is computed, nor left for their turn
            p.requires_grad_(False)
        loss = 0.5 * ((x - (x - g).detach()) ** 2).mean() + GAN * softplus(-self.logits(x)).mean()
        self.student_optimiser.update(loss)
        for p in self.critic.weights:
            p.requires_grad_(True)
        average(self.mean, self.student)


def dmd2_cycle(setup: Setup) -> Work:
    """RATIO turns of the critic and one of the student."""
    nets = DMD2(setup)

    def run():
        for i in range(RATIO):
            nets.critic_turn()
            if i == 0:
                nets.student_turn()

    return Work(run, nets.side.wait)


def sampling_steps(setup: Setup, steps: int) -> Work:
    """A batch by DDIM without guidance."""
    side = Side(setup)
    net = side.compiled(side.unet().eval())
    times = torch.tensor(np.round(np.linspace(999, 1000 / steps - 1, steps)).astype(int), device=side.device)

    @torch.no_grad()
    def run():
        z = side.given["x0"]
        for i, t in enumerate(times):
            with side.cast():
                eps = net(z, t, side.given["text"], return_dict=False)[0]
            z = side.x0_of(z, eps, t[None])
            if i + 1 < steps:
                a, s = side.level(times[i + 1][None])
                z = a * z + s * eps

    return Work(run, side.wait)


def loader(folder: str, images: int) -> Work:
    """`images` random crops of 256 px in batches of 8: a data set of PIL images and a DataLoader of four workers."""
    from PIL import Image

    files = sorted(pathlib.Path(folder).rglob("*.jpg"))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 10**9

        def __getitem__(self, i):
            with Image.open(files[i % len(files)]) as image:
                image = image.convert("RGB")
            left, top = (int(torch.randint(n - 255, ())) for n in image.size)
            image = np.asarray(image.crop((left, top, left + 256, top + 256)), np.float32)
            return torch.from_numpy(image / 127.5 - 1)

    stream = iter(torch.utils.data.DataLoader(Images(), batch_size=8, num_workers=4))
    return Work(lambda: [next(stream) for _ in range(images // 8)], lambda: None)
