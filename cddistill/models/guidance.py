"""Networks that take the guidance scale as an input (Meng et al. 2023, arXiv:2210.03142; LCM, Luo et al. 2023)."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cddistill.models.blocks import sinusoid
from cddistill.models.unet import Apply, UNet2DConditionModel
from cddistill.net import Denoiser
from cddistill.typed import RISING, within

GuidanceScale = Annotated[float, within(least=1)]
GuidanceRange = Annotated[tuple[GuidanceScale, GuidanceScale], RISING]  # of training; (1, 1) = no guidance
EmbeddingWidth = Annotated[int, within(off=0, least=4, most=2**16, multiple=2)]


def guidance_embedding(scales: Float[Array, " b"], width: int) -> Float[Array, "b width"]:
    """The input timestep_cond for guidance scales: sinusoids of 1000 (scale - 1) (Luo et al. 2023, sec. 4.2)."""
    return sinusoid(1000.0 * (scales - 1.0), width, False, 1)


def width_of(net) -> int | None:
    """Width of the guidance embedding that a network takes; None if it takes none."""
    return getattr(net.module, "time_cond_proj_dim", None)


def with_scales(net, text, scales: Float[Array, " b"]):
    """The text inputs of a network, with the guidance scales if it takes them."""
    width = width_of(net)
    return text | {"timestep_cond": guidance_embedding(scales, width)} if width else text


def embed_guidance(teacher: Denoiser, width: int) -> Denoiser:
    """A copy of a UNet with the input timestep_cond [b, width]; its output is the teacher's at first.

    Zero weights at the start are ours; released code draws them at random. Raises ValueError for other networks.
    """
    unet = teacher.module
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"only a UNet2DConditionModel can take the guidance scale as an input, not {type(unet).__name__}"
        )
    params = jax.tree.map(jnp.copy, teacher.params)
    if width_of(teacher) is None:
        kernel = jnp.zeros((width, unet.block_out_channels[0]))
        params["time_embedding"] = params["time_embedding"] | {"cond_proj": {"kernel": kernel}}
        unet = unet.clone(time_cond_proj_dim=width)
    return teacher.replace(params=params, apply=Apply(unet))
