"""An AutoencoderKL for one's own images: the VAE of a latent diffusion model (Rombach et al. 2022, arXiv:2112.10752).

    mean, log var = encode(x)      z = mean + exp(log var / 2) eps      y = decode(z)
    loss = |x - y|^2 + lpips_weight LPIPS-VGG(x, y) + kl_weight KL(N(mean, var) || N(0, 1))

All three terms are means per element. There is no discriminator (ours: at low compression it is not needed). With a
teacher that has a VAE, that one is fine-tuned; else the network has the options below. The latents are scaled to unit
variance when the VAE is exported: --mode=export writes vae/, as diffusers lays it out.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import losses, models
from cddistill.method import Requires, Scored, Turn, per_sample, warmed_up
from cddistill.models.init import init_params_jax, weight_shapes
from cddistill.models.vae import AutoencoderKL, Decode, Encode
from cddistill.net import Autoencoder
from cddistill.perceptual import lpips
from cddistill.typed import SOME, Count, Decay, Natural, NonNegative, Width, within

Channels = Annotated[int, within(least=8, most=2**16, multiple=8)]  # norms have eight groups


@dataclasses.dataclass(frozen=True)
class TrainAutoencoder(Scored):
    """Hyper-parameters of an autoencoder; the defaults are ours."""

    channels: Annotated[tuple[Channels, ...], SOME] = (24, 48, 96)  # of each resolution; each one after
    # the first halves height and width
    layers: Annotated[int, within(least=1, most=100)] = 1  # resnets per resolution; the decoder has one more
    latent_channels: Width = 4
    attention: bool = False  # in the middle
    lpips_weight: NonNegative = 0.1
    lpips_every: Count = 1  # train steps between two evaluations of LPIPS, whose weight is multiplied by this number
    lpips_crop: Natural = 0  # px: LPIPS of a random square crop of this size; 0 = of the whole image
    kl_weight: NonNegative = 5e-4
    ema_decay: Decay = 0.999  # per step, with `method.warmed_up`

    def init(self, key, frozen, batch):
        """The teacher's VAE, or a random one if it has none."""
        if self.lpips_crop > min(batch["x0"].shape[1:3]):
            raise ValueError(
                f"method.lpips_crop={self.lpips_crop} is larger than the images of {batch['x0'].shape[1]} px"
            )
        if frozen["autoencoder"].params is not None:
            return {"vae": jax.tree.map(jnp.copy, frozen["autoencoder"])}
        shape, factor = batch["x0"].shape[1:3], 2 ** (len(self.channels) - 1)
        if any(side % factor for side in shape):
            raise ValueError(
                f"method.channels={self.channels} makes images of {shape} px smaller by a factor of {factor}, which "
                "does not divide them: give fewer channels, or another data.size"
            )
        module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(self.channels),
            up_block_types=("UpDecoderBlock2D",) * len(self.channels),
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=8,
            sample_size=batch["x0"].shape[1],
            scaling_factor=1.0,
            force_upcast=False,
            mid_block_add_attention=self.attention,
        )
        return {"vae": Autoencoder(init_params_jax(weight_shapes(module), key), Encode(module), Decode(module))}

    def turns(self):
        return {"vae": Turn(moves=("vae",), loss=self.loss, lazy=self.lpips_every)}

    def ema(self):
        return {"vae": warmed_up(self.ema_decay)}

    def requires(self):
        return Requires({"lpips": functools.partial(lpips.load, "vgg")}, teacher=False)

    def exports(self):
        return {"vae": "vae"}

    def loss(self, n, batch, key):
        """The sum of the three terms; the metrics are the terms."""
        k_posterior, k_crop = jax.random.split(key)
        x, vae = batch["x0"], n.vae
        mean, logvar = vae.encoder.posterior(vae.params, x)
        y = vae.decode(vae.encode(x, per_sample(k_posterior, batch["index"])))
        terms = {"mse": losses.mse(x, y).mean(), "kl": kl(mean, logvar).mean()}
        total = terms["mse"] + self.kl_weight * terms["kl"]
        if self.lpips_weight and "vae/lazy" in n.play:
            keys = per_sample(k_crop, batch["index"])
            terms["lpips"] = n.lpips(*(crop(keys, image, self.lpips_crop) for image in (x, y))).mean()
            total += self.lpips_weight * self.lpips_every * terms["lpips"]
        return total, terms

    def scores(self, n, batch, key):
        """Per image [b]: PSNR (dB) and LPIPS-VGG of the reconstruction from the posterior's mean, and KL (nats per
        element of z)."""
        x, vae = batch["x0"], n.vae_ema
        mean, logvar = vae.encoder.posterior(vae.params, x)
        y = jnp.clip(vae.decode(vae.encode(x)), -1.0, 1.0)
        return {"psnr": -10 * jnp.log10(losses.mse(x, y) / 4), "lpips": n.lpips(x, y), "kl": kl(mean, logvar)}

    def pictures(self, n, batch):
        x, vae = batch["x0"], n.vae_ema
        return {"image": x * 0.5 + 0.5, "reconstruction": vae.images(vae.encode(x))}

    def export_file(self, n, batch, path):
        """Write vae/ to the folder `path`, with the scaling factor that gives the batch's latents unit variance.

        Raises ValueError if the path names a file.
        """
        if path.suffix == ".safetensors":
            raise ValueError(f"--output={path}: an autoencoder is exported as a folder")
        vae, x, module = n.vae_ema, batch["x0"], n.vae_ema.encoder.module
        factor = module.scaling_factor / float(np.std(jax.jit(Autoencoder.encode)(vae, x)))
        models.save(path, "vae", vae.params, module.to_config() | {"scaling_factor": factor})
        reconstruct = jax.jit(lambda vae, x: vae.images(vae.encode(x)))
        worst = jnp.abs(reconstruct(models.load(path, "vae"), x) - reconstruct(vae, x)).max()
        return (
            f"scaling_factor {factor:.4f}; read back, images differ by at most {worst:.2g} of 1 (weights are float16)"
        )


def crop(keys, x, size: int):
    """A random square [b, size, size, c] of each image, the same for the same key; all of it if size is 0."""
    room = jnp.array([x.shape[1] - size, x.shape[2] - size])
    corner = lambda key: jnp.append(jax.random.randint(key, (2,), 0, room + 1), 0)
    cut = lambda key, image: jax.lax.dynamic_slice(image, corner(key), (size, size, image.shape[-1]))
    return jax.vmap(cut)(keys, x) if size else x


def kl(mean, logvar):
    """KL divergence [b] of N(mean, exp(logvar)) from N(0, 1), in nats per element of z."""
    return losses.mean(0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar))
