"""One teacher's folder, as diffusers lays it out: the only module that opens it and writes a student's.

pipeline = Pipeline("stabilityai/stable-diffusion-2-1")
pipeline.denoiser, pipeline.autoencoder, pipeline.prompts
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cddistill import io, models
from cddistill.diffusion import DDPM
from cddistill.method import Requires
from cddistill.models import folders, lora, original, parts, schedulers
from cddistill.models import index as model_index
from cddistill.models.families import DENOISERS
from cddistill.models.fingerprint import fingerprint, of_network
from cddistill.models.prompt import Prompts, load_prompts
from cddistill.models.schedulers import Sampling
from cddistill.net import Autoencoder, Denoiser, Net


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A teacher's folder with a LoRA merged in. Parts are loaded when they are first asked for, and once."""

    name: str  # a path, a Hub id or the name of an embedded teacher
    lora: str = ""  # file or folder
    lora_scale: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # dtype, remat, flash of every network
    decoding: Mapping[str, int] = dataclasses.field(default_factory=dict)  # fields of Autoencoder
    place: Callable | None = None  # (path, array) -> array on devices, called for each weight as it is read
    random_seed: int | None = None  # initialise the denoiser at random instead of reading its weights
    shapes: bool = False  # networks of jax.ShapeDtypeStruct, from config.json files alone; a LoRA does not change them

    @functools.cached_property
    def stored(self) -> Denoiser:
        """The denoiser without the LoRA."""
        if self.random_seed is None or self.shapes:
            return self.load(self.name, self.subfolder, DENOISERS)
        config, scheduler = self.denoiser_config, schedulers.scheduler_file(self.root)
        how = schedulers.read_scheduler(scheduler) if scheduler.is_file() else ()  # or what the network implies
        return models.init(config, self.random_seed, *how, **self.options)

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """The teacher: schedule, parameterisation and weights, with the LoRA merged in."""
        if "unet" not in self.loras:
            return self.stored
        return jax.jit(functools.partial(lora.adapt, scale=self.lora_scale))(self.stored, self.loras["unet"])

    @functools.cached_property
    def loras(self) -> dict[str, Net]:
        """The LoRA's part for the denoiser, {"unet": ...}; {} if there is none."""
        return lora.read_lora_for(self.lora, {"unet": self.stored}) if self.lora and not self.shapes else {}

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The VAE; the identity for pixel models, which have none."""
        if not self.has("vae"):
            return Autoencoder()
        return self.load(self.name, "vae", models.AUTOENCODERS).replace(**self.decoding)

    @functools.cached_property
    def prompts(self) -> Prompts | None:
        """Tokenizers and text encoders with the LoRA merged in; None for a teacher without text."""
        if not self.has("text_encoder"):
            return None
        prompts = load_prompts(self.name, jnp.dtype(self.options.get("dtype", "float32")), self.shapes)
        return prompts.with_lora(self.lora, self.lora_scale) if self.lora and not self.shapes else prompts

    @property
    def text_encoder(self) -> Net:
        """The only text encoder; ValueError if there is none or several."""
        nets = self.prompts.nets if self.prompts else ()
        if len(nets) != 1:
            raise ValueError(f"{self.name} has {len(nets)} text encoders; this method trains the one of its teacher")
        return nets[0]

    def controlnet(self, folder: str) -> Net:
        """A ControlNet from a folder of its own, with this pipeline's options."""
        return self.load(folder, "controlnet", models.CONTROLNETS)

    def branch(self, folder: str = "") -> Net | None:
        """The ControlNet of another folder or, without one, of this pipeline's own; None if it has none."""
        return self.controlnet(folder or self.name) if folder or self.has("controlnet") else None

    def load(self, folder: str, part: str, expect: tuple[type, ...]):
        """A network of one of the classes `expect`, with this pipeline's options."""
        return models.load(folder, part, place=self.place, expect=expect, shapes=self.shapes, **self.options)

    def sampling(self) -> Sampling:
        """How the folder's scheduler samples."""
        return schedulers.read_sampling(schedulers.scheduler_file(self.root))

    @functools.cached_property
    def denoiser_config(self) -> dict:
        """The denoiser's config.json."""
        return models.convert.open_config(self.name, self.subfolder)[2]

    @property
    def x0_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of x0; ValueError if config.json does not say."""
        module = self.denoiser.module
        size = getattr(module, "sample_size", None) or getattr(module, "img_resolution", None)
        if size is None:
            raise ValueError(f'{self.name} does not say its size: add "sample_size" to the denoiser\'s config.json')
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(module, "out_channels", None) or module.img_channels  # EDM's networks have one number
        return height, width, channels

    @property
    def null_label(self) -> int:
        """The class label that stands for no class; 0 where there are no classes."""
        module = self.denoiser.module
        return max((getattr(module, "num_class_embeds", None) or 1) - 1, getattr(module, "label_dim", 0))

    def takes_latent_condition(self, requires: Requires, channels: int) -> bool:
        """Whether a method's student takes its condition in latent space: because the method says so, or because the
        denoiser has input channels for one besides the `channels` of z_t."""
        taken = getattr(models.convert.build(self.denoiser_config), "in_channels", channels)
        return requires.condition == "latent" or taken > channels

    @functools.cached_property
    def weights(self) -> str:
        """Fingerprint of the denoiser and the LoRA, both as stored: merged sums differ from platform to platform."""
        nets = {"teacher": self.stored} | self.loras
        return fingerprint({name: net.params for name, net in nets.items()})

    @functools.cached_property
    def vae_weights(self) -> str:
        """Fingerprint of the VAE; "" for pixel models."""
        vae = self.autoencoder
        return "" if vae.params is None else of_network(vae.params, vae.encoder.module)

    def has(self, part: str) -> bool:
        """Whether the folder has a part; ValueError if its model_index.json names one that is not there."""
        return model_index.has(models.resolve(self.name, part), part)

    @functools.cached_property
    def root(self) -> Path:
        """The folder with the parts, or of a denoiser that belongs to no pipeline; a Hub id's is downloaded."""
        return models.resolve(self.name)

    @functools.cached_property
    def whole(self) -> Path:
        """The same folder with all its networks, also those that the run does not use; a Hub id's are downloaded."""
        for part in sorted(parts.NETWORKS & {*model_index.parts_of(model_index.read_index(self.root))}):
            models.resolve(self.name, part)
        return self.root

    @functools.cached_property
    def subfolder(self) -> str:
        """The denoiser's subfolder, "unet" unless a family has another one."""
        return next((part for part in folders.PARTS if (self.root / part).is_dir()), "unet")

    @functools.cached_property
    def source(self) -> Path:
        """The denoiser's folder or weight file."""
        return folders.locate(self.name, self.subfolder).part

    # ---- writing a student's folder

    def write(
        self, folder: Path, teacher: Denoiser, trained: dict[str, Net], how: Sampling | None, controlnet: str = ""
    ) -> None:
        """A pipeline folder: the trained nets by part, the teacher's other parts, a scheduler and model_index.json.

        teacher is this pipeline's denoiser; a student that is a LoRA of it is merged, and also written by itself. `how`
        is the student's sampling, None if no scheduler of diffusers describes it; `controlnet` is a folder to copy.
        """
        trained = {self.subfolder if part == "unet" else part: net for part, net in trained.items()}
        changed = {part: lora.merge_if_lora(teacher, net) for part, net in trained.items()}
        if self.lora:
            changed = {self.subfolder: teacher} | changed | self.merged_encoders()
        self.write_settings(folder, teacher, how, {*trained}, controlnet)
        for name, file in self.copies(controlnet).items():
            if name.partition("/")[0] not in {*changed, "scheduler"}:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)
        for part, net in changed.items():
            models.save(folder, part, net.params, net.module.to_config())
        for part, net in trained.items():
            if changed[part] is not net:
                lora.save_lora(folder, {part: net})
                lora.save_kohya(folder, {part: net})
            if self.has("text_encoder") and original.fits(net):
                original.save(folder, net)

    def write_settings(self, folder: Path, teacher: Denoiser, how: Sampling | None, trained, controlnet: str) -> None:
        """scheduler/ and model_index.json of a student's folder. If nothing was trained, scheduler/ is the teacher's.

        Raises ValueError for sampling that no scheduler describes, and for a damaged model_index.json.
        """
        own = schedulers.scheduler_file(self.root)
        if own.is_file() and not (trained and isinstance(teacher.schedule, DDPM)):
            io.write_json(folder / "scheduler" / own.name, io.read_json(own))
        else:
            write_schedule(folder, teacher, how)
        present = {name.partition("/")[0] for name in self.copies(controlnet)} | {*trained}
        if index := model_index.read_index(self.root):
            write_index(folder, index, present)

    def copies(self, controlnet: str = "") -> dict[str, Path]:
        """{name in a student's folder: file of the teacher's pipeline or of a ControlNet's folder}."""
        copied = parts.pipeline_files(self.whole, model_index.read_index(self.root))
        if self.source != self.root / self.subfolder:  # a network without a pipeline, or one of several weight files
            copied = {name: file for name, file in copied.items() if not name.startswith(f"{self.subfolder}/")}
            copied |= {f"{self.subfolder}/{name}": file for name, file in parts.network_files(self.source).items()}
        if controlnet:
            branch = folders.locate(controlnet, "controlnet").part
            copied = {name: file for name, file in copied.items() if not name.startswith("controlnet/")}
            copied |= {f"controlnet/{name}": file for name, file in parts.network_files(branch).items()}
        return copied

    def merged_encoders(self) -> dict[str, Net]:
        """The text encoders that the LoRA changes."""
        encoders = {p.name: models.load(self.root, p.name) for p in self.root.glob("text_encoder*") if p.is_dir()}
        merged = lora.merge(self.lora, encoders, self.lora_scale)
        return {name: net for name, net in merged.items() if net is not encoders[name]}


def write_schedule(folder: Path, teacher: Denoiser, how: Sampling | None) -> None:
    """scheduler/, for schedules that diffusers has."""
    if isinstance(teacher.schedule, DDPM):
        own = {"timesteps": how.timesteps, "sampler": how.sampler} if how else {}
        schedulers.write_scheduler(folder, teacher.schedule, teacher.predicts, **own)


def write_index(folder: Path, index: dict, present) -> None:
    """The teacher's model_index.json for a folder in which these parts are present, a ControlNet perhaps among them.

    Parts that the teacher's folder lacks, such as a safety checker that was not downloaded, are marked as absent.
    """
    lost = [name for name, x in index.items() if isinstance(x, list) and name not in present]
    index = index | {name: [None, None] for name in lost}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        index["scheduler"] = ["diffusers", io.read_json(scheduler)["_class_name"]]
    if "controlnet" in present and not any(index.get("controlnet") or ()):
        index["controlnet"] = ["diffusers", "ControlNetModel"]
        index["_class_name"] = index.get("_class_name", "").replace("Pipeline", "ControlNetPipeline")
    io.write_json(folder / model_index.FILE, index)


def of_run(run, place: Callable | None = None) -> Pipeline:
    """The pipeline of config.teacher, with the LoRA and the options of a run's config."""
    return Pipeline(
        run.teacher,
        lora=run.lora,
        lora_scale=run.lora_scale,
        options={"dtype": jnp.dtype(run.dtype), "remat": remat_of(run), "flash": run.flash},
        decoding={"rows": run.decode_batch, "tile": run.decode_tile},
        place=place,
        random_seed=run.seed if run.random_init else None,
    )


def remat_of(run) -> bool | str:
    """The option remat of a run's networks. Raises ValueError for a policy of what is not recomputed."""
    if run.remat_policy == "nothing_saveable":
        return run.remat
    if not run.remat:
        raise ValueError(f"remat_policy={run.remat_policy!r} says what remat keeps: set remat=True, or leave it out")
    return run.remat_policy
