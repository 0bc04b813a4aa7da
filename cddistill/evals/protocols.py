"""Published evaluations by name: how many images of what, seen how, against which reference.

A number is comparable with a paper's only if all of this agrees, so none is printed without the protocol's name and N.
What is not stated in a paper is marked "ours" in a protocol's note. To add a protocol, write its record here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cddistill.evals import views

PROMPTS, IMAGES, CLIP = "prompts.txt", "reference", "clip"  # in the folder config.protocol_data


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One published evaluation."""

    source: str  # the paper or code that defines it
    n: int  # generated images
    given: str  # a key of `inputs.GIVEN`: what images are generated from, "labels", "prompts" or "pairs"
    views: Mapping[str, Callable[[np.ndarray], np.ndarray]]  # by column: how Inception sees an image; the first is FID
    statistics: str = ""  # the file of mu and sigma of the reference; "": it is images
    references: int = 0  # images of the reference, if it is a folder of images
    size: int = 0  # px of generated images; 0 = any
    clip: str | None = None  # what stands before a prompt for the CLIP score; None: there is no such score
    pairs: tuple[str, ...] = ()  # metrics of images and their targets, keys of `scores.PAIR_METRICS`
    note: str = ""  # what else has to be known to compare numbers


PROTOCOLS = {
    "imagenet64_50k": Protocol(
        source="EDM (Karras et al. 2022, arXiv:2206.00364); DMD2 (Yin et al. 2024, arXiv:2405.14867), table 1",
        n=50_000,
        given="labels",
        views={"FID": views.tensorflow},
        statistics="imagenet-64x64.npz",
        size=64,
        note="Labels are 0 ... 999 in turn, 50 images of each, as in DMD2; EDM draws them at random.",
    ),
    "coco2014_30k": Protocol(
        source="GigaGAN's evaluation (Kang et al. 2023), as in DMD2, table 5, and Diffusion2GAN (arXiv:2405.05967)",
        n=30_000,
        given="prompts",
        views={"FID": views.clean_256},
        references=40_504,
        clip="",
        note="Zero-shot: the reference is all of COCO's val2014. DMD2 and Diffusion2GAN generate at 512 px.",
    ),
    "coco2014_10k_1024": Protocol(
        source="DMD2 (Yin et al. 2024), section 5 and table 2; patches are SDXL-Lightning's (arXiv:2402.13929)",
        n=10_000,
        given="prompts",
        views={"FID": views.clean_512, "Patch FID": views.patch},
        references=10_000,
        size=1024,
        clip="A photo depicts ",
        note="The reference is the images of the 10,000 prompts. DMD2's CLIP is OpenCLIP ViT-g-14 laion2b_s12b_b42k.",
    ),
    "real_sr_3k": Protocol(
        source="CoDi (Mei et al. 2024, arXiv:2310.01407), super-resolution: FID and LPIPS of 3,000 degraded images",
        n=3_000,
        given="pairs",
        views={"FID": views.clean},
        pairs=("LPIPS-VGG", "LPIPS-Alex"),
        note="Degradations are those of data.task on the test split. The paper names neither the network of LPIPS nor "
        "how images are resized for FID: both networks, and clean-fid's way, are ours.",
    ),
}


def said(name: str, protocol: Protocol, n: int, departures: Sequence[str] = ()) -> str:
    """The protocol and N of a number, and why it is not comparable if it is not."""
    of = f"N = {n:,}" if n == protocol.n else f"N = {n:,} of {protocol.n:,}"
    reasons = f" ({'; '.join(departures)})" * bool(departures)
    return f"{name} protocol, {of}" + f": not comparable{reasons}" * (n != protocol.n or bool(departures))
