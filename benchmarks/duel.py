"""Ours against the same algorithm in PyTorch diffusers, in turns A B A B: the ratio of the times, memory, first step.

    python benchmarks/duel.py                             all, on a CPU at a fifth of the width of Stable Diffusion
    python benchmarks/duel.py unet8 dmd2 --repeats=9
    python benchmarks/duel.py unet8 --width=320 --size=64 --batch=8 --dtype=bfloat16 --device=cuda --compile

Needs torch and diffusers (extra dev). Each side is a process of its own; while one works, the other is stopped. Both
have the same architecture (random weights), batch, optimiser (AdamW) and moving average.

unet8, unet64   a training step of Stable Diffusion 1.x's UNet (eight heads at each level) and of 2.x's (heads of 64)
dmd2            five turns of the critic and one of the student, guidance 1.75, GAN on the fake score's bottleneck
codi            one step of CoDi: ControlNet and UNet trained, noise consistency and signal (eq. 8)
sample50, 4, 1  DDIM without guidance, of 1.x's UNet
loader          random crops of 256 px from JPEG files of 512 x 640 px, PyTorch's with four workers; --images of them

The published code of the methods is not needed: the PyTorch side is written here, from the same equations.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

WORK = ("unet8", "unet64", "dmd2", "codi", "sample50", "sample4", "sample1", "loader")
COMMON = {"layers_per_block": 2, "cross_attention_dim": 768, "norm_num_groups": 16}
GUIDANCE, RATIO, GAN, CRITIC_GAN = 1.75, 5, 1e-3, 1e-2  # Stable Diffusion's recipe of DMD2, but for the ratio
LR, DECAY = 1e-5, 0.999


def unet_config(width: int, heads: str) -> dict:
    """Stable Diffusion's UNet with `width` channels in its first block; heads "8" or "64", as in the docstring."""
    channels = [width, 2 * width, 4 * width, 4 * width]
    many = [max(c // 64, 1) for c in channels] if heads == "64" else 8
    return COMMON | {"block_out_channels": channels, "attention_head_dim": many}  # diffusers' name for their number


def arrays(args, seed: int = 0) -> dict:
    """A batch of latents, text and condition, all noise, channels last."""
    rng, b = np.random.default_rng(seed), args.batch
    text = lambda: rng.normal(size=(b, 77, 768)).astype("f")
    return {
        "x0": rng.normal(size=(b, args.size, args.size, 4)).astype("f"), "text": text(), "null": text(),
        "cond": rng.uniform(size=(b, 8 * args.size, 8 * args.size, 3)).astype("f"),
    }  # fmt: skip


# ---- ours


def ours(args):
    """go(): one unit of the work, finished when it returns."""
    import jax
    import jax.numpy as jnp

    from cddistill import config, models, sampling, sharding
    from cddistill.build import initial, make_optimizers
    from cddistill.diffusion import DDPM
    from cddistill.net import Autoencoder
    from cddistill.step import active, train_step

    if args.work == "loader":
        return our_loader(args)
    heads, dtype = "64" if args.work == "unet64" else "8", jnp.dtype(args.dtype)
    teacher = models.init(unet_config(args.width, heads), 0, DDPM(), "eps", False, dtype)
    given, mesh = arrays(args), sharding.make_mesh()
    if args.work.startswith("sample"):
        steps = int(args.work.removeprefix("sample"))
        text = {"encoder_hidden_states": given["text"]}
        run = lambda net, z: sampling.ddim(lambda z, t: net(z, t, text), net.schedule, z, net.schedule.grid(steps))
        program = jax.jit(sharding.inside(mesh, run))
        return lambda: jax.block_until_ready(program(teacher, given["x0"]))
    name = {"unet8": "diffusion", "unet64": "diffusion"}.get(args.work, args.work)
    settings = config.defaults(name)
    settings.update(batch_size=args.batch, dtype=args.dtype)
    settings.optim.lr = LR
    if name == "dmd2":
        settings.method.update(
            real_guidance=GUIDANCE, gan_weight=GAN, critic_gan_weight=CRITIC_GAN, ratio=RATIO, ema_decay=DECAY
        )
    else:
        settings.method.update(ema_decay=DECAY)
    experiment = config.resolve(settings)
    method, optimizers = experiment.method, make_optimizers(experiment)
    turns, frozen = method.turns(), {"teacher": teacher, "autoencoder": Autoencoder()}
    text, null = ({"encoder_hidden_states": given[k]} for k in ("text", "null"))
    batch = {"x0": given["x0"], "text": text, "null": null, "index": np.arange(args.batch, dtype="i")}
    batch |= {"cond": given["cond"]} if name == "codi" else {}
    state = jax.jit(functools.partial(initial, experiment))(batch, frozen)
    step = functools.partial(train_step, turns=turns, optimizers=optimizers, ema=method.ema())
    driver = sharding.make_driver("jit", step, mesh, state)
    state, frozen, number = driver.put_state(state), driver.put_frozen(frozen), 0

    def go():
        nonlocal state, number
        for _ in range(RATIO if name == "dmd2" else 1):
            state, metrics = driver.step(state, frozen, driver.put_batch(batch), active(turns, number))
            number += 1
        jax.block_until_ready((state, metrics))

    return go


def our_loader(args):
    """go(): --images images in batches of 8."""
    from cddistill import data
    from cddistill.data import configure

    settings = configure(source="folder", path=args.folder, size=256, crop="random")
    stream = data.batches(settings, batch_size=8, seed=0, rows=slice(0, 8))
    return lambda: [next(stream) for _ in range(args.images // 8)]


# ---- theirs


def theirs(args):
    """As `ours`, in PyTorch with diffusers' networks."""
    import diffusers
    import torch

    if args.work == "loader":
        return their_loader(args)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    heads, b = "64" if args.work == "unet64" else "8", args.batch
    unet = diffusers.UNet2DConditionModel(**unet_config(args.width, heads)).to(device)
    channels_last = {"memory_format": torch.channels_last} if args.channels_last else {}
    first = {k: torch.tensor(x, device=device) for k, x in arrays(args).items()}
    given = {k: x.permute(0, 3, 1, 2).to(**channels_last) if x.ndim == 4 else x for k, x in first.items()}
    unet = unet.to(**channels_last)
    compiled = torch.compile if args.compile else lambda f: f
    cast = lambda: torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    alphas = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod.to(device)
    copy = lambda net: type(net).from_config(net.config).to(device, **channels_last)

    def level(t):
        return alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)

    def noised(x, t):
        eps, (a, s) = torch.randn_like(x), level(t)
        return a * x + s * eps, eps

    def x0_of(z, eps, t):
        a, s = level(t)
        return (z - s * eps) / a

    def optimiser(*nets):
        weights = [p for net in nets for p in net.parameters()]
        return torch.optim.AdamW(weights, LR, fused=device.type == "cuda" or None), weights

    def update(opt, weights, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    def average(mean, net):
        torch._foreach_lerp_([p.data for p in mean.parameters()], [p.data for p in net.parameters()], 1 - DECAY)

    if args.work.startswith("sample"):
        steps = int(args.work.removeprefix("sample"))
        times = torch.tensor(np.round(np.linspace(999, 1000 / steps - 1, steps)).astype(int), device=device)
        unet.eval()
        predict = compiled(lambda z, t: unet(z, t, given["text"]).sample)

        @torch.no_grad()
        def go():
            z = given["x0"]
            for i, t in enumerate(times):
                with cast():
                    eps = predict(z, t)
                x, t = x0_of(z, eps, t[None]), times[i + 1] if i + 1 < steps else None
                z = x if t is None else level(t[None])[0] * x + level(t[None])[1] * eps
            wait()

        return go

    if args.work.startswith("unet"):
        opt, weights = optimiser(unet)
        mean = copy(unet)
        predict = compiled(lambda z, t, text: unet(z, t, text).sample)

        def go():
            t = torch.randint(0, 1000, (b,), device=device)
            z, eps = noised(given["x0"], t)
            with cast():
                out = predict(z, t, given["text"])
            update(opt, weights, ((out.float() - eps) ** 2).mean())
            average(mean, unet)
            wait()

        return go

    if args.work == "codi":
        branch = diffusers.ControlNetModel.from_unet(unet).to(device, **channels_last)
        nets, means = (unet, branch), (copy(unet), copy(branch))
        opt, weights = optimiser(*nets)

        def forward(nets, z, t):
            down, mid = nets[1](z, t, given["text"], controlnet_cond=given["cond"], return_dict=False)
            out = nets[0](z, t, given["text"], down_block_additional_residuals=down, mid_block_additional_residual=mid)
            return out.sample.float()

        online, target = compiled(functools.partial(forward, nets)), compiled(functools.partial(forward, means))

        def go():
            t = torch.randint(1, 1000, (1,), device=device).expand(b)
            z, eps = noised(given["x0"], t)
            with cast():
                predicted = online(z, t)
            x = x0_of(z, predicted, t)
            with torch.no_grad(), cast():
                a, s = level(t - 1)
                anchor = target(a * x + s * eps, t - 1)
            update(opt, weights, ((predicted - anchor) ** 2).mean() + ((x - given["x0"]) ** 2).mean())
            for mean, net in zip(means, nets, strict=True):
                average(mean, net)
            wait()

        return go

    # dmd2
    teacher, fake, mean = copy(unet).requires_grad_(False), copy(unet), copy(unet)
    width, layers, side = unet.config.block_out_channels[-1], [], args.size // 8
    while side >= 8:
        layers, side = (
            [*layers, torch.nn.Conv2d(width, width, 4, 2, 1), torch.nn.GroupNorm(32, width), torch.nn.SiLU()],
            side // 2,
        )
    layers += [torch.nn.Conv2d(width, width, 4, 4), torch.nn.GroupNorm(32, width), torch.nn.SiLU()]
    disc = torch.nn.Sequential(*layers, torch.nn.Conv2d(width, 1, 1)).to(device, **channels_last)
    opt_student, student_weights = optimiser(unet)
    opt_critic, critic_weights = optimiser(fake, disc)
    call = compiled(lambda net, z, t, text: net(z, t, text).sample.float())

    def bottleneck(z, t):  # the encoder of fake and its middle block
        emb = fake.time_embedding(fake.time_proj(t).to(z.dtype))
        h = fake.conv_in(z)
        for block in fake.down_blocks:
            more = {"encoder_hidden_states": given["text"]} if hasattr(block, "attentions") else {}
            h, _ = block(h, emb, **more)
        return fake.mid_block(h, emb, encoder_hidden_states=given["text"])

    features = compiled(bottleneck)

    def logits(x):
        t = torch.randint(0, 1000, (b,), device=device)
        with cast():
            h = features(noised(x, t)[0], t)
        return disc(h.float()).mean((1, 2, 3))

    def generate():
        z, last = torch.randn_like(given["x0"]), torch.full((b,), 999, device=device)
        with cast():
            eps = call(unet, z, last, given["text"])
        return x0_of(z, eps, last)

    softplus = torch.nn.functional.softplus

    def critic():
        with torch.no_grad():
            x = generate()
        t = torch.randint(0, 1000, (b,), device=device)
        z, eps = noised(x, t)
        with cast():
            out = call(fake, z, t, given["text"])
        gan = softplus(logits(x)).mean() + softplus(-logits(given["x0"])).mean()
        update(opt_critic, critic_weights, ((out - eps) ** 2).mean() + CRITIC_GAN * gan)

    def student():
        x = generate()
        t = torch.randint(20, 981, (b,), device=device)
        with torch.no_grad(), cast():
            z = noised(x, t)[0]
            plain, null = call(teacher, z, t, given["text"]), call(teacher, z, t, given["null"])
            real = x0_of(z, null + GUIDANCE * (plain - null), t)
            g = (x0_of(z, call(fake, z, t, given["text"]), t) - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        for (
            p
        ) in critic_weights:  # before the graph is built: no gradient of theirs is computed, nor left for their turn
            p.requires_grad_(False)
        loss = 0.5 * ((x - (x - g).detach()) ** 2).mean() + GAN * softplus(-logits(x)).mean()
        update(opt_student, student_weights, loss)
        for p in critic_weights:
            p.requires_grad_(True)
        average(mean, unet)

    def go():
        for i in range(RATIO):
            critic()
            if i % RATIO == 0:
                student()
        wait()

    return go


def their_loader(args):
    """As `our_loader`: a data set of PIL images and a DataLoader."""
    import torch
    from PIL import Image

    files = sorted(pathlib.Path(args.folder).rglob("*.jpg"))

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
    return lambda: [next(stream) for _ in range(args.images // 8)]


# ---- both


def serve(args):
    """A side's process: prints the seconds to its first result, then does one unit for each line that it reads."""
    began, answers = time.perf_counter(), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what the sides print is no answer
        go = {"ours": ours, "theirs": theirs}[args.side](args)
        go()
        print(time.perf_counter() - began, file=answers, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            go()
            seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps([seconds, device_peak(args) or peak]), file=answers, flush=True)


def device_peak(args) -> float:
    """Most GB in use on an accelerator; 0 on a CPU."""
    if args.side == "theirs":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30


@dataclasses.dataclass
class Side:
    """A process and what it has said."""

    process: subprocess.Popen
    first: float

    @classmethod
    def start(cls, side: str, work: str, flags: list[str]):
        """Start it, and wait for its first result."""
        # XLA would take three quarters of a GPU's memory at once
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, __file__, work, *flags, f"--side={side}"]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=env, start_new_session=True)
        if not (first := process.stdout.readline()):
            raise SystemExit(f"{side} ended in {work}; its error is above")
        os.killpg(process.pid, signal.SIGSTOP)
        return cls(process, float(first))

    def go(self) -> tuple[float, float]:
        """(seconds of one more unit, peak memory in GB)."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = tuple(json.loads(self.process.stdout.readline()))
        os.killpg(self.process.pid, signal.SIGSTOP)  # its threads, too: a loader would go on reading ahead
        return found

    def stop(self) -> None:
        """End it."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def duel(work: str, args, flags: list[str]) -> dict:
    """Both sides in turns, after a warm-up: one row of the table."""
    sides = [Side.start(side, work, flags) for side in ("ours", "theirs")]
    for side in sides:
        side.go()
    times = [[side.go() for side in sides] for _ in range(args.repeats)]
    for side in sides:
        side.stop()
    ratios = sorted(a[0] / b[0] for a, b in times)
    seconds = [statistics.median(t[i][0] for t in times) for i in (0, 1)]
    peaks = [times[-1][i][1] for i in (0, 1)]
    return {
        "work": work, "ratio": [ratios[0], statistics.median(ratios), ratios[-1]], "seconds": seconds, "GB": peaks,
        "first": [side.first for side in sides],
    }  # fmt: skip


def make_images(folder: pathlib.Path, n: int) -> None:
    """JPEG files of 512 x 640 px of smooth noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "train").mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8))
        small.resize((640, 512), Image.BICUBIC).save(folder / "train" / f"{i}.jpg", quality=90)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)}; default: all")
    parser.add_argument("--width", type=int, default=64, help="channels of the first block (320 = Stable Diffusion)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of PyTorch; JAX takes what it finds")
    parser.add_argument("--channels-last", action="store_true", help="PyTorch's memory format")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", help="file to write, after every row")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    passed = {name: value for name, value in vars(args).items() if name not in ("work", "json", "side", "folder")}
    named = {f"--{name.replace('_', '-')}": value for name, value in passed.items() if value is not False}
    flags = [name if value is True else f"{name}={value}" for name, value in named.items()]
    if unknown := {*args.work} - {*WORK}:
        parser.error(f"unknown work {', '.join(unknown)}: known are {', '.join(WORK)}")
    if args.side:
        args.work = args.work[0]
        serve(args)
        return
    print("| work | ours / theirs: min, median, max | seconds | peak, GB | first result, s |\n|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for work in args.work or WORK:
            if work == "loader":
                make_images(pathlib.Path(folder), args.images)
            row = duel(work, args, [*flags, f"--folder={folder}"])
            low, middle, high = row["ratio"]
            both = lambda name, digits, row=row: " / ".join(f"{x:.{digits}f}" for x in row[name])
            print(f"| {work} | {low:.2f}, **{middle:.2f}**, {high:.2f} | {both('seconds', 3)} | {both('GB', 2)} | "
                  f"{both('first', 1)} |", flush=True)  # fmt: skip
            rows.append(row)
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps({"flags": flags, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
