"""Names of teachers: the pipeline they belong to from wherever one points, and what folders hold that are none."""

import json
import os

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from cddistill import models
from cddistill.diffusion import DDPM
from cddistill.models import convert, folders
from cddistill.models.unet import UNet2DConditionModel
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline

FILE = convert.TORCH_FILE
VAE = {"block_out_channels": [4, 4], "norm_num_groups": 2, "mid_block_add_attention": False,
       "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
UNET = tiny.UNET | {"_class_name": "UNet2DConditionModel", "sample_size": 8}


def write(folder, files):
    """{path: text, bytes or an object for JSON} as files in a folder, which is returned."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def save(root, part, config):
    module, shapes = models.abstract(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype("f"), shapes)
    return models.save(root, part, params, module.to_config(), np.float32)


def scheduler(kind, **options):
    return {"_class_name": "DDIMScheduler", "prediction_type": kind} | options


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """sd/: a v-network of pixels with a VAE, which no test changes."""
    root = tmp_path_factory.mktemp("pipelines") / "sd"
    save(root, "unet", UNET)
    save(root, "vae", VAE | {"_class_name": "AutoencoderKL"})
    return write(root, {"scheduler/scheduler_config.json": scheduler("v_prediction", beta_end=0.017)})


NAMES = {  # the name of the pipeline's denoiser as given in a working directory
    "the pipeline": ("{}", ""),
    "its folder": ("{}/unet", ""),
    "its weight file": ("{}/unet/" + FILE, ""),
    "its config": ("{}/unet/config.json", ""),
    "a slash at the end": ("{}/unet/", ""),
    "a dot": (".", "unet"),
    "a dot in the pipeline": (".", "."),
    "two dots": ("..", "unet"),
    "dots through a sibling": ("../unet", "vae"),
    "a relative file": (FILE, "unet"),
    "a relative folder": ("unet", "."),
    "a link to the folder": ("{up}/link", ""),
    "a link to the file": ("{up}/link.safetensors", ""),
    "a link to the pipeline": ("{up}/all/unet", ""),
}


@pytest.mark.parametrize("name", NAMES)
def test_schedule_and_autoencoder_are_found_from_wherever_one_points(pipeline, name, monkeypatch):
    for link, target in (("link", "unet"), ("link.safetensors", f"unet/{FILE}"), ("all", "")):
        if not (pipeline.parent / link).is_symlink():
            (pipeline.parent / link).symlink_to(pipeline / target)
    given, cwd = NAMES[name]
    monkeypatch.chdir(pipeline / cwd if cwd else pipeline.parent)
    given = given.format(pipeline, up=pipeline.parent)
    net = models.load(given)
    assert (net.predicts, net.schedule) == ("v", DDPM(1000, "linear", 0.0001, 0.017))
    assert type(models.load(given, "vae")) is Autoencoder
    teacher = Pipeline(given)
    assert teacher.has("vae")
    assert not teacher.has("text_encoder")
    assert not teacher.has("controlnet")
    assert type(teacher.autoencoder) is Autoencoder
    assert teacher.autoencoder.params is not None
    assert teacher.sampling().stride  # the file's DDIM; without a file it is False
    assert teacher.x0_shape == (8, 8, 3)
    assert models.resolve(given).samefile(pipeline)
    assert models.resolve(given).is_absolute()  # the working directory may change


def test_another_network_in_the_same_pipeline_is_the_one_loaded(pipeline, tmp_path):
    """unet_ema/ beside unet/, as trainers write it, and a second weight file; a student's folder gets these weights."""
    root = write(tmp_path / "run", {"scheduler/scheduler_config.json": scheduler("v_prediction")})
    for part, gain in (("unet", 1.0), ("unet_ema", 2.0)):
        save(root, part, UNET)
        file = root / part / FILE
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({k: gain * x for k, x in tensors.items()}, file)
    (root / "unet" / "best.safetensors").write_bytes((root / "unet_ema" / FILE).read_bytes())
    biases = {}
    for name in ("unet", "unet_ema", "unet/best.safetensors"):
        teacher = Pipeline(str(root / name))
        assert teacher.denoiser.predicts == "v"
        student = tmp_path / "students" / name
        teacher.write(student, teacher.denoiser, {}, None)
        assert sorted(p.name for p in student.iterdir()) == ["scheduler", "unet"]
        for loaded in (teacher.denoiser, models.load(student)):
            biases.setdefault(name, []).append(np.asarray(loaded.params["conv_out"]["bias"]))
    np.testing.assert_array_equal(biases["unet_ema"], biases["unet/best.safetensors"])
    np.testing.assert_array_equal(biases["unet_ema"], [2.0 * x for x in biases["unet"]])


def test_a_network_outside_of_pipelines_has_only_what_lies_in_its_folder(pipeline, tmp_path):
    flat = save(tmp_path, "pixels", UNET)
    save(tmp_path, "vae", VAE | {"_class_name": "AutoencoderKL"})  # of something else
    assert models.load(flat).predicts == "eps"
    assert not Pipeline(str(flat)).has("vae")
    write(flat, {"scheduler_config.json": scheduler("sample")})
    assert models.load(flat / FILE).predicts == "x0"
    write(flat, {"scheduler/scheduler_config.json": scheduler("v_prediction")})
    assert models.load(flat).predicts == "v"
    loose = save(tmp_path, "unet", UNET)  # but a unet/ belongs to the vae/ beside it
    assert Pipeline(str(loose)).has("vae")
    assert type(models.load(tmp_path / "vae")) is type(models.load(tmp_path / "vae", "vae")) is Autoencoder


def test_a_scheduler_that_the_pipeline_names_must_be_there(tmp_path):
    save(tmp_path, "unet", UNET)
    write(tmp_path, {"model_index.json": {"unet": ["diffusers", "UNet2DConditionModel"],
                                          "scheduler": ["diffusers", "DDIMScheduler"]}})  # fmt: skip
    for name in (tmp_path, tmp_path / "unet", tmp_path / "unet" / FILE):
        for read in (models.load, lambda name: Pipeline(str(name)).sampling()):
            with pytest.raises(ValueError, match=r"scheduler_config\.json is missing, but model_index.json names"):
                read(name)


def test_the_class_of_a_config_without_one_is_that_of_the_pipeline(tmp_path):
    path = save(tmp_path, "unet", UNET) / "config.json"
    path.write_text(json.dumps({k: v for k, v in UNET.items() if k != "_class_name"}))
    with pytest.raises(ValueError, match=r'unet/config\.json does not name the class of a network: add "_class'):
        models.load(tmp_path)
    write(tmp_path, {"model_index.json": {"unet": ["diffusers", "FlaxUNet2DConditionModel"]}})
    assert type(models.load(tmp_path).module) is UNet2DConditionModel


FLUX = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip
DENOISER = ["diffusers", "UNet2DConditionModel"]
PIPELINES = {  # model_index.json: what is said of it
    "FluxPipeline": (FLUX, r"transformer/ \(FluxTransformer2DModel\)"),
    "PixArtSigmaPipeline": ({"transformer": ["diffusers", "PixArtTransformer2DModel"],
                             "text_encoder": ["transformers", "T5EncoderModel"]}, "PixArtTransformer2DModel"),
    "StableCascadeDecoderPipeline": ({"decoder": ["diffusers", "StableCascadeUNet"],
                                      "vqgan": ["wuerstchen", "PaellaVQModel"]}, r"decoder/ \(StableCascadeUNet\)"),
    "WanPipeline": ({"transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]},
                    "transformer/ .WanTransformer3DModel"),
    "KandinskyV22PriorPipeline": ({"prior": ["diffusers", "PriorTransformer"],
                                   "text_encoder": ["transformers", "CLIPTextModelWithProjection"]}, "prior/ .Prior"),
    "DDPMPipeline": ({"unet": ["diffusers", "UNet2DModel"]}, r"unet/ \(UNet2DModel\)"),
    "StableVideoDiffusionPipeline": ({"unet": ["diffusers", "UNetSpatioTemporalConditionModel"]}, "unet/ .UNetSpatio"),
    "OnnxStableDiffusionPipeline": ({"unet": ["diffusers", "OnnxRuntimeModel"]}, r"unet/ \(OnnxRuntimeModel\)"),
    "LDMTextToImagePipeline": ({"unet": DENOISER, "vqvae": ["diffusers", "AutoencoderKL"]}, "vqvae/ .AutoencoderKL"),
    "AnimateDiffPipeline": ({"unet": DENOISER, "motion_adapter": ["diffusers", "MotionAdapter"]}, "motion_adapter/"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_of_other_models_are_named(tmp_path, kind):
    """Also if they have a unet/ with a class that is supported, or if only the index was downloaded."""
    index, said = PIPELINES[kind]
    write(tmp_path, {"model_index.json": index | {"_class_name": kind}})
    names = [tmp_path, tmp_path / "model_index.json"]
    if "unet" in index:
        names.append(write(tmp_path / "unet", {"config.json": UNET}))
    for name in names:
        supported = r".*not supported; a teacher's denoiser is a UNet2DConditionModel \(of .*Stable Diffusion XL\)"
        for seed in (None, 0):  # trained and random weights
            with pytest.raises(ValueError, match=f"is a {kind} with .*{said}{supported}"):
                Pipeline(str(name), random_seed=seed).denoiser  # noqa: B018


def test_parts_that_leave_the_denoiser_as_it_is_are_no_reason_to_refuse(tmp_path):
    save(tmp_path, "unet", UNET)
    index = {"_class_name": "StableUnCLIPPipeline", "unet": DENOISER, "prior": ["diffusers", "PriorTransformer"],
             "safety_checker": [None, None], "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
             "requires_safety_checker": False, "adapter": ["diffusers", "T2IAdapter"], "hints": {"a": 1}}  # fmt: skip
    write(tmp_path, {"model_index.json": index})
    assert models.load(tmp_path).predicts == "eps"
    save(tmp_path / "flux", "vae", VAE | {"_class_name": "AutoencoderKL"})
    write(tmp_path / "flux", {"model_index.json": FLUX})
    for name in (("flux", "vae"), ("flux/vae",)):  # Flux's is supported
        assert type(models.load(tmp_path / name[0], *name[1:])) is Autoencoder


def lora(names=("unet.down.lora_A.weight",)):
    return safetensors.numpy.save({name: np.zeros((2, 2), "f") for name in names})


FOLDERS = {  # files: what is said of the folder
    "empty": ({}, "config.json is missing: the folder is empty"),
    "lora": ({"pytorch_lora_weights.safetensors": lora()}, "is a LoRA, not a whole network; pass it as config.lora"),
    "lora by its tensors": ({"mine.safetensors": lora(["lora_unet_x.lora_up.weight"])}, "mine.safetensors is a LoRA"),
    "peft": ({"adapter_config.json": {}, "adapter_model.bin": ""}, "adapter_config.json is a LoRA"),
    "gguf": ({"q4.gguf": "GGUF"}, r"q4\.gguf is in GGUF's format, which cannot be read: download the weights"),
    "onnx": ({"unet/config.json": UNET, "unet/model.onnx": "x"}, r"unet/model\.onnx is in ONNX's format"),
    "openvino": ({"unet/config.json": UNET, "unet/openvino_model.xml": "x", "unet/openvino_model.bin": "y"},
                 r"unet/openvino_model\.xml is in OpenVINO's format"),
    "core ml": ({"Unet.mlmodelc/weights/weight.bin": "x"}, r"Unet\.mlmodelc is in Core ML's format"),
    "transformer": ({"transformer/config.json": {"_class_name": "SD3Transformer2DModel"}, "vae/config.json": VAE},
                    r"holds transformer/ \(SD3Transformer2DModel\), but no denoiser that is supported: a UNet2DCond"),
    "one level too high": ({"mine/unet/config.json": UNET}, r"itself holds no network; point at .*one_level.*/mine$"),
    "a trainer's output": ({"checkpoint-5/unet/config.json": UNET, "checkpoint-9/unet/config.json": UNET},
                           "point at .*checkpoint-5 or .*checkpoint-9"),
    "network of another name": ({"student/config.json": UNET, "logs/x": ""}, "point at .*/student$"),
    "models--a--b": ({"refs/main": "f00\n", "snapshots/e00/model_index.json": {}, "snapshots/f00/model_index.json": {},
                      "blobs/1": ""}, "point at .*models--a--b/snapshots/f00 or .*/snapshots/e00"),
    "controlnet": ({"config.json": {"_class_name": "ControlNetModel"}},
                   "holds a ControlNetModel, not a .*, and pass this one as config.controlnet"),
    "text encoder": ({"config.json": {"architectures": ["CLIPTextModel"]}}, "holds a CLIPTextModel, not a UNet2DCon"),
    "run": ({"config.json": {"batch_size": 8}, "checkpoints/1/x": ""}, "of a run, whose network is written with --mo"),
    "other files": ({"readme.md": "x"}, "config.json is missing: expected a diffusers folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_holds_no_teacher_says_what_it_holds(tmp_path, kind):
    files, said = FOLDERS[kind]
    folder = tmp_path / kind.replace(" ", "_")
    folder.mkdir()
    with pytest.raises(ValueError, match=said) as error:
        Pipeline(str(write(folder, files))).denoiser  # noqa: B018
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vae", "vae holds an AutoencoderKL, not a UNet2DConditionModel or .*: point at {root}$"),
        ("scheduler", "it is a part of the pipeline {root}; point at that folder"),
        ("../x.gguf", r"x\.gguf is in GGUF's format"),
        ("../x.png", r"x\.png is not a weight file \(\.safetensors, "),
        ("../x.safetensors", r"x\.safetensors is a LoRA, not a whole network"),
        ("../nothing", "is neither a folder nor an embedded model"),
        ("", "'' is neither a folder nor an embedded model"),
        ("../gone.safetensors", r"gone\.safetensors is a link to deleted\.safetensors, which does not exist"),
    ],
)
def test_a_path_that_is_no_teachers_says_what_it_is(pipeline, name, said, monkeypatch):
    write(pipeline.parent, {"x.gguf": "x", "x.png": "x", "x.safetensors": lora()})
    if not (pipeline.parent / "gone.safetensors").is_symlink():
        (pipeline.parent / "gone.safetensors").symlink_to("deleted.safetensors")
    monkeypatch.chdir(pipeline)
    with pytest.raises(ValueError, match=said.format(root=pipeline)):
        Pipeline(name).denoiser  # noqa: B018


def test_unsupported_options_name_the_file(tmp_path):
    write(tmp_path, {"unet/config.json": UNET | {"quantization_config": {"load_in_8bit": True}}})
    with pytest.raises(ValueError, match=r"unet/config.json: UNet2DConditionModel does not support quantization"):
        models.load(tmp_path)


def test_files_of_a_cache_are_links_and_keep_their_folder(pipeline, tmp_path):
    """The Hub's cache links every file into blobs/; the folder of the link is the pipeline's."""
    root = tmp_path / "snapshots" / "f00"
    for i, file in enumerate(p for p in sorted(pipeline.rglob("*")) if p.is_file()):
        link = root / file.relative_to(pipeline)
        link.parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, {f"blobs/{i}": file.read_bytes()})
        link.symlink_to(os.path.relpath(tmp_path / "blobs" / str(i), link.parent))
    for name in (root, root / "unet", root / "unet" / FILE):
        assert models.load(name).predicts == "v"
        assert Pipeline(str(name)).has("vae")


def test_the_channels_of_a_config_that_leaves_them_out_are_those_of_the_class(tmp_path):
    """Without in_channels a UNet takes 4, so a student of pixels with a condition is not one of 3."""
    config = {k: v for k, v in UNET.items() if k != "in_channels"}
    flat = flax.traverse_util.flatten_dict(models.abstract(config)[1])
    assert flat["conv_in", "kernel"].shape[2] == 4
    write(tmp_path, {"unet/config.json": config})
    requires = tiny.VARIANTS["diffusion"].requires()
    assert Pipeline(str(tmp_path)).takes_latent_condition(requires, 3)
    assert not Pipeline(str(tmp_path)).takes_latent_condition(requires, 4)


def test_locating_reads_no_weights_and_every_family_has_a_subfolder(tmp_path):
    write(tmp_path, {"unet/config.json": UNET})
    assert folders.locate(tmp_path) == (tmp_path, tmp_path / "unet")
    assert folders.PARTS == ("unet",)
