"""Stable Diffusion in one file: tensors land where diffusers' converter puts them, and the file works as a teacher."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden import make_clip
from golden import make_single_file as golden
from torch_file import write_torch

from cddistill import models
from cddistill.diffusion import DDPM
from cddistill.models import convert, files, ldm, schedulers, single_file
from cddistill.models.files import Tensor, contiguous_strides
from cddistill.models.init import weight_shapes
from cddistill.pipeline import Pipeline

RECORDED = json.loads((Path(golden.__file__).parent / "single_file.json").read_text())
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
FAR = 2**50  # bytes from one tensor to the next, so that a place in the file tells the tensor and the row
EPS = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
V = EPS | {"prediction_type": "v_prediction"}


@pytest.fixture(scope="module", autouse=True)
def _trace_once():
    """Most tests load the same networks, and tracing their shapes takes a second."""
    shapes = functools.cache(weight_shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "weight_shapes", shapes)
        patch.setattr(convert, "weight_shapes", shapes)
        yield


@functools.cache
def tensors(kind):
    """The tensors of a tiny single file, float16."""
    rng = np.random.default_rng(0)
    return {k: rng.normal(0, 0.02, shape).astype("f2") for k, shape in golden.checkpoint(golden.TINY[kind]).items()}


def small(*names, width=768):
    """A file of a few tensors: some UNet, and these."""
    held = {f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": np.ones((2, width), "f")}
    return held | {name: np.ones((2, 2), "f") for name in names}


def write(folder, held, name="model.safetensors", metadata=None, tokenizers=("tokenizer", "tokenizer_2")):
    """A single file with tokenizers beside it; returns the file."""
    folder.mkdir(exist_ok=True)
    for tokenizer in tokenizers:
        make_clip.write_tokenizer(folder / tokenizer, "!")
    if name.endswith(".safetensors"):
        safetensors.numpy.save_file(held, folder / name, metadata=metadata)
    else:
        write_torch(folder / name, held)
    return folder / name


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A file of Stable Diffusion 1.x and the folder beside it that it was converted to; no test writes there."""
    file = write(tmp_path_factory.mktemp("single"), tensors("sd1"))
    return file, models.resolve(file)


@pytest.fixture
def own(converted, tmp_path):
    """A copy of that file, with its folder, for a test to change."""
    shutil.copytree(converted[0].parent, tmp_path / "own")
    return tmp_path / "own" / "model.safetensors"


def put_scheduler(folder, **config):
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def weights_of(folder, part):
    return safetensors.numpy.load_file(next((folder / part).glob("*.safetensors")))


def parts_of(kind, shapes=None):
    """(version, {part: its tensors}) of a file on no disk; a tensor's place is its number times FAR."""
    shapes = shapes or golden.checkpoint(golden.SIZES[kind])
    held = {
        name: Tensor(Path("x"), i * FAR, np.dtype("<f4"), shape, contiguous_strides(shape))
        for i, (name, shape) in enumerate(shapes.items())
        if not single_file.IGNORED.fullmatch(name)
    }
    version = single_file.kind_of(held, Path("x"))
    return version, single_file.split(held, version, Path("x"))


PARTS = {
    kind: ["unet", "vae", *("text_encoder", "text_encoder_2")[: len(p["text"])]] for kind, p in golden.SIZES.items()
}
QUICK = [("tiny_sd1", "unet"), ("tiny_sd1", "vae"), ("tiny_sd1", "text_encoder"), ("tiny_sd2", "text_encoder"),
         ("tiny_xl", "unet"), ("tiny_xl", "text_encoder_2")]  # fmt: skip
LONG = [(kind, part) for kind, parts in PARTS.items() for part in parts if (kind, part) not in QUICK]


@pytest.mark.parametrize(("kind", "part"), [*QUICK, *(pytest.param(*x, marks=pytest.mark.slow) for x in LONG)])
def test_configs_and_places_of_weights_are_those_of_diffusers_converter(kind, part):
    version, parts = parts_of(kind)
    scheduler = V if kind.endswith("sd2") else EPS
    module, weights = single_file.network(part, parts[part], version, scheduler, Path("x"), Path("x"))
    expected, config = RECORDED[kind][part], json.loads(json.dumps(module.to_config()))
    assert {k: config[k] for k in expected["config"] if k in config} == expected["config"]
    names, lines = [*golden.checkpoint(golden.SIZES[kind]).items()], []
    for path, x in weights.items():
        name, shape = names[x.start // FAR]
        row = x.start % FAR // 4 // contiguous_strides(shape)[0]
        lines.append(f"{convert.torch_name(path)} {convert.to_torch(path, x).shape} {name} {row}")
    assert golden.digest(lines) == expected["digest"]


@pytest.mark.parametrize(
    ("place", "theirs"),
    [
        ("unet/down_blocks.0.downsamplers.0.conv.weight", f"{UNET}input_blocks.2.0.op.weight"),
        ("unet/up_blocks.0.upsamplers.0.conv.bias", f"{UNET}output_blocks.1.1.conv.bias"),
        ("unet/mid_block.resnets.1.norm2.weight", f"{UNET}middle_block.2.out_layers.0.weight"),
        ("unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
         f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
        ("vae/decoder.mid_block.attentions.0.to_q.weight", f"{VAE}decoder.mid.attn_1.q.weight"),  # was a convolution
        ("vae/decoder.up_blocks.0.resnets.1.conv1.weight", f"{VAE}decoder.up.1.block.1.conv1.weight"),
        ("text_encoder/text_model.encoder.layers.0.mlp.fc2.weight", f"{TEXT}encoder.layers.0.mlp.fc2.weight"),
    ],
)  # fmt: skip
def test_values_and_types_are_those_of_the_file(place, theirs, converted):
    part, _, name = place.partition("/")
    written = weights_of(converted[1], part)[name]
    np.testing.assert_array_equal(written, tensors("sd1")[theirs].reshape(written.shape))
    assert written.dtype == np.float16


def test_text_features_of_2_are_those_of_layer_22():
    names = parts_of("sd2")[1]["text_encoder"]
    layers = {int(name.split(".")[3]) for name in names if ".layers." in name}
    assert layers == {*range(23)}
    assert "text_projection.weight" not in names


def test_open_clip_holds_q_k_v_in_one_matrix_and_projects_from_the_right(tmp_path):
    held = {"transformer.resblocks.3.attn.in_proj_weight": np.arange(12.0).reshape(6, 2),
            "transformer.resblocks.3.attn.in_proj_bias": np.arange(6.0),
            "text_projection": np.arange(4.0).reshape(2, 2)}  # fmt: skip
    file = write(tmp_path, held, tokenizers=())
    ours = {name: np.asarray(x).tolist() for name, x in ldm.open_clip(files.read(file).tensors).items()}
    assert ours["text_model.encoder.layers.3.self_attn.k_proj.weight"] == [[4, 5], [6, 7]]
    assert ours["text_model.encoder.layers.3.self_attn.v_proj.bias"] == [4, 5]
    assert ours["text_projection.weight"] == [[0, 2], [1, 3]]


def test_a_single_file_is_a_teacher(converted):
    """The networks fit each other, and the folder is made once."""
    file, folder = converted
    made = (folder / "model_index.json").stat().st_mtime_ns
    pipeline = Pipeline(str(file))
    text = pipeline.prompts(["a hat", ""])
    assert np.isfinite(text["encoder_hidden_states"]).all()
    out = jax.eval_shape(pipeline.denoiser, np.ones((2, 4, 4, 4), np.float32), jnp.array([500, 3]), text)
    assert out.x0.shape == (2, 4, 4, 4)
    assert (pipeline.denoiser.schedule, pipeline.denoiser.predicts) == (DDPM(), "eps")
    assert pipeline.autoencoder.encoder.module.scaling_factor == 0.18215
    assert pipeline.root == file.parent / "model-diffusers"
    assert pipeline.x0_shape == (64, 64, 4)
    assert (folder / "model_index.json").stat().st_mtime_ns == made


@pytest.mark.slow
def test_a_single_file_of_xl_is_a_teacher(tmp_path):
    texts = {"conditioner.embedders.0.transformer.text_model.": (62, 768, 1, 96),
             "conditioner.embedders.1.model.": (62, 1280, 1, 96)}  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = golden.checkpoint(golden.TINY["xl"] | {"text": texts})
    pipeline = Pipeline(str(write(tmp_path, {k: rng.normal(0, 0.02, s).astype("f2") for k, s in shapes.items()})))
    text = pipeline.prompts(["a hat", ""])
    text["added_cond_kwargs"]["time_ids"] = np.ones((2, 6), np.float32)
    out = jax.eval_shape(pipeline.denoiser, np.ones((2, 4, 4, 4), np.float32), jnp.array([500, 3]), text)
    assert out.x0.shape == (2, 4, 4, 4)
    assert pipeline.autoencoder.encoder.module.scaling_factor == 0.13025


def test_a_folder_with_no_other_weights_is_that_file(converted, tmp_path):
    """Here a checkpoint of PyTorch Lightning, with the older names of the text encoder and averages of the weights."""
    held = {name.replace(TEXT, "cond_stage_model.transformer."): x.astype("f") for name, x in tensors("sd1").items()}
    held |= {f"model_ema.{name.replace('.', '')}": np.zeros(1, "f") for name in held if name.startswith(UNET)}
    write(tmp_path / "sd", {"state_dict": held, "epoch": 3, "optimizer_states": [{"state": {}}]}, "v1-5.ckpt")
    folder = models.resolve(tmp_path / "sd")
    assert folder == tmp_path / "sd" / "v1-5-diffusers"
    for part in PARTS["sd1"]:
        assert (folder / part / "config.json").read_text() == (converted[1] / part / "config.json").read_text()
        ours, theirs = weights_of(folder, part), weights_of(converted[1], part)
        assert {*ours} == {*theirs}
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"state_dict": x, "epoch": 3, "global_step": 470000, "optimizer_states": [{"state": {}}]},
        lambda x: {f"module.{name}": value for name, value in x.items()},
        lambda x: x | dict.fromkeys(("betas", "logvar", "alphas_cumprod", "model_ema.num_updates"), np.ones(1, "f")),
        lambda x: x | {"cond_stage_model.transformer.text_model.embeddings.position_ids": np.ones((1, 77), "f")},
        lambda x: x | dict.fromkeys(("cond_stage_model.logit_scale", f"{VAE}model_ema.decay"), np.ones(1, "f")),
        lambda x: x | {f"{VAE}loss.logvar": np.ones(1, "f"), f"model_ema.{[*x][0].replace('.', '')}": np.ones(1, "f")},
    ],
    ids=["lightning", "wrapped", "buffers", "position_ids", "scales", "training"],
)
def test_what_else_a_file_holds_is_ignored(change, tmp_path):
    held = small(f"{VAE}encoder.conv_in.weight", f"{TEXT}final_layer_norm.weight")
    assert {*single_file.read(write(tmp_path, change(held), "model.ckpt"))} == {*held}


@pytest.mark.parametrize(
    ("width", "metadata", "markers", "expected"),
    [
        (768, {}, (), ("eps", DDPM(), 64)),
        (768, {"modelspec.prediction_type": "v"}, (), ("v", DDPM(), 64)),
        (1024, {"modelspec.prediction_type": "v"}, (), ("v", DDPM(), 96)),
        (1024, {"modelspec.prediction_type": "epsilon"}, (), ("eps", DDPM(), 64)),
        (2048, {}, (), ("eps", DDPM(), 128)),
        (2048, {}, ("v_pred",), ("v", DDPM(), 128)),
        (2048, {}, ("v_pred", "ztsnr"), ("v", DDPM(zero_snr=True, last_alpha=2.0**-12), 128)),
    ],
)
def test_the_schedule_is_the_versions_or_what_the_file_says(width, metadata, markers, expected, tmp_path):
    file = write(tmp_path / "file", small(*markers, width=width), metadata=metadata)
    kind = single_file.KINDS[width]
    config = single_file.scheduler_config(kind, file, file.parent)
    put_scheduler(tmp_path, **config)
    schedule, predicts = schedulers.read_scheduler(tmp_path / "scheduler" / "scheduler_config.json")
    assert (predicts, schedule, kind.sizes[config["prediction_type"]]) == expected


def test_the_noise_schedule_in_a_file_may_be_the_versions(tmp_path):
    alphas = np.asarray(DDPM().alpha_sigma(jnp.arange(1000))[0]) ** 2
    file = write(tmp_path, small() | {"alphas_cumprod": alphas.astype("f2")})
    assert single_file.scheduler_config(single_file.SD1, file, tmp_path)["prediction_type"] == "epsilon"


def test_a_scheduler_beside_the_file_counts(tmp_path):
    config = {"beta_schedule": "linear", "prediction_type": "v_prediction"}
    put_scheduler(tmp_path, **config)
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "PNDMScheduler"]}))
    read = single_file.scheduler_config(single_file.SD2, write(tmp_path, small(width=1024)), tmp_path)
    assert read == config | {"_class_name": "PNDMScheduler"}


@pytest.mark.parametrize(("channels", "name"), [(4, "StableDiffusion"), (9, "StableDiffusionInpaint"),
                                                (8, "StableDiffusionInstructPix2Pix")])  # fmt: skip
def test_inpainting_and_editing_models_are_told_by_their_input_channels(channels, name):
    index = single_file.index_of(single_file.SD1, channels, EPS, Path("x"))
    assert index["_class_name"] == f"{name}Pipeline"
    _, parts = parts_of(
        "tiny_sd1", golden.checkpoint(golden.TINY["sd1"]) | {f"{UNET}input_blocks.0.0.weight": (32, channels, 3, 3)}
    )
    shapes = {name: x.shape for name, x in parts["unet"].items()}
    assert single_file.infer("unet", shapes, single_file.SD1, EPS, Path("x"))["in_channels"] == channels


def test_networks_that_the_file_lacks_are_taken_from_beside_it(converted, tmp_path):
    file = write(tmp_path, {name: x for name, x in tensors("sd1").items() if not name.startswith(VAE)})
    with pytest.raises(
        ValueError, match=r"model\.safetensors has no vae/: copy vae/ of a diffusers folder of Stable Dif"
    ):
        models.load(file)
    shutil.copytree(converted[1] / "vae", tmp_path / "vae")
    assert models.load(file, "vae").encoder.module.block_out_channels == (32, 64)


def test_a_config_beside_the_file_counts(tmp_path):
    version, parts = parts_of("tiny_sd1")
    config = single_file.infer(
        "text_encoder", {k: x.shape for k, x in parts["text_encoder"].items()}, version, EPS, Path("x")
    )
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    network = functools.partial(single_file.network, "text_encoder", parts["text_encoder"], version, EPS, tmp_path)
    assert network(Path("x"))[0].num_attention_heads == 4
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(
        ValueError, match=r"text_encoder/config\.json \(text_encoder\): CLIPTextModel does not support hidd"
    ):
        network(Path("x"))


XL_PARTS = (f"{VAE}x", "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (small("conditioner.embedders.0.model.ln_final.bias"), "is the refiner of Stable Diffusion XL"),
        (small("edm_mean"), r"is Playground 2.5 \(edm_mean\), which is not supported; Stable Diffusion 1.x, Stable"),
        (small("edm_vpred.sigma_max"), "is CosXL"),
        (small("noise_augmentor.time_embed.0.weight"), "is Stable Diffusion unCLIP"),
        (small("depth_model.model.x"), "is a depth-conditional model"),
        (small(f"{UNET}label_emb.weight"), "is an upscaler"),
        (small(f"{UNET}input_blocks.1.1.time_stack.0.norm_in.weight"), "is a video model"),
        ({"control_model.time_embed.0.weight": np.ones(2, "f")}, "is a ControlNet"),
        ({"double_blocks.0.img_attn.qkv.weight": np.ones(2, "f")}, "is Flux"),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": np.ones(2, "f")}, "is Stable Diffusion 3"),
        ({f"{VAE}encoder.conv_in.weight": np.ones(2, "f")}, "has no UNet of Stable Diffusion 1.x, .*768, 1024, 2048"),
        (small(width=640), "has no UNet of Stable Diffusion 1.x, Stable Diffusion 2.x, .* XL, whose"),
        (small("embedding_manager.x"), "has embedding_manager.x, which Stable Diffusion 1.x has no place for"),
        (small(width=1024), "is Stable Diffusion 2.x and does not say whether it predicts eps .512 pixels. or v .768"),
        (small(f"{UNET}out.2.weight"), "has no vae/ and text_encoder/: copy vae/ and text_encoder/ of a diffusers"),
        (small() | {"alphas_cumprod": np.linspace(1, 0, 1000, dtype="f")}, "has another noise schedule .alphas_cum"),
        (small(*XL_PARTS, width=2048), "has no tokenizer_2/: copy tokenizer_2/ of a diffusers folder of .* XL into"),
    ],
)  # fmt: skip
def test_other_files_are_named(held, sentence, tmp_path):
    file = write(tmp_path, held, tokenizers=["tokenizer"])
    with pytest.raises(ValueError, match=rf"model\.safetensors {sentence}"):
        models.load(file)
    assert not (tmp_path / "model-diffusers").exists()


def test_a_header_that_names_another_prediction_is_not_guessed(tmp_path):
    file = write(tmp_path, small(), metadata={"modelspec.prediction_type": "sample"})
    with pytest.raises(
        ValueError, match=r"model\.safetensors says modelspec\.prediction_type = 'sample', which is neither"
    ):
        models.load(file)


def test_a_scheduler_beside_the_file_that_is_not_supported_is_named(tmp_path):
    put_scheduler(tmp_path, _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(
        ValueError, match=r"scheduler/scheduler_config\.json: .* 'FlowMatchEulerDiscreteScheduler' is not"
    ):
        models.load(write(tmp_path, small()))
    assert not (tmp_path / "model-diffusers").exists()


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (f"{UNET}out.0.bias", None, r"\(unet\) lacks out\.0\.bias: the weights do not belong to Stable Diffus"),
        (f"{UNET}extra.w", (1,), r"\(unet\) has extra\.w, which Stable Diffusion 1\.x has no"),
        (f"{UNET}out.0.bias", (7,), r"\(unet\) has the wrong shape .* out\.0\.bias \(7,\), not \(32,\)"),
        (
            f"{UNET}input_blocks.1.0.out_layers.3.weight",
            (33, 32, 3, 3),
            r"\(unet\): block_out_channels\[0\] = 33 cannot be split",
        ),
        (f"{VAE}decoder.conv_in.weight", None, r"holds no whole vae of Stable Diffusion 1\.x .*conv_in.*: download"),
        (f"{VAE}quant_conv.weight", None, r"\(vae\) lacks quant_conv\.weight"),
    ],
)
def test_broken_networks_are_named(name, shape, sentence):
    shapes = golden.checkpoint(golden.TINY["sd1"])
    shapes.pop(name, None)
    version, parts = parts_of("tiny_sd1", shapes | ({name: shape} if shape else {}))
    part = "vae" if name.startswith(VAE) else "unet"
    with pytest.raises(ValueError, match=f"^m.ckpt .*{sentence}"):
        single_file.network(part, parts[part], version, EPS, Path("x"), Path("m.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_a_network_without_any_one_layer_is_named(kind):
    shapes = golden.checkpoint(golden.SIZES[kind])
    for layer in {name.rpartition(".")[0] for name in shapes if name.startswith((UNET, VAE))}:
        version, parts = parts_of(
            kind, {name: shape for name, shape in shapes.items() if not name.startswith(f"{layer}.")}
        )
        part = "vae" if layer.startswith(VAE) else "unet"
        with pytest.raises(ValueError, match=r"^m\.ckpt .*(lacks|has|holds no whole)"):
            single_file.network(part, parts[part], version, EPS, Path("x"), Path("m.ckpt"))


def test_nothing_is_written_of_a_broken_file(tmp_path):
    held = {name: x for name, x in tensors("sd1").items() if name != f"{TEXT}final_layer_norm.bias"}
    file = write(tmp_path, held)
    with pytest.raises(
        ValueError, match=r"model\.safetensors \(text_encoder\) lacks text_model\.final_layer_norm\.bias"
    ):
        models.load(file)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "tokenizer", "tokenizer_2"}
    with pytest.raises(
        ValueError, match=r"x has a UNet of 5 input channels; supported are 4, 8, 9: choose another file"
    ):
        single_file.index_of(single_file.SD1, 5, EPS, Path("x"))


def test_a_truncated_file_is_named(tmp_path):
    file = write(tmp_path, small())
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        models.load(file)


def test_a_folder_is_not_used_if_the_file_has_changed(own):
    own.write_bytes(own.read_bytes())
    with pytest.raises(
        ValueError, match=r"model-diffusers was made from .*model\.safetensors and files beside it that"
    ):
        models.load(own)


def test_a_folder_is_not_used_if_what_lies_beside_the_file_has_changed(own):
    put_scheduler(own.parent, **V)
    with pytest.raises(ValueError, match=r"model-diffusers was made from .*have changed: delete that folder"):
        models.load(own)


def test_a_folder_of_another_file_is_not_used(own):
    other = write(own.parent, small(), "model.ckpt", tokenizers=())
    with pytest.raises(ValueError, match=r"model-diffusers was made from .*model\.ckpt and files beside it"):
        models.load(other)
    (own.parent / "model-diffusers" / single_file.RECORD).unlink()
    with pytest.raises(ValueError, match=r"model-diffusers was not made from .*: move that folder away, or pass it"):
        models.load(own)


def test_a_place_that_cannot_be_written_is_named(own, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    shutil.rmtree(own.parent / "model-diffusers")
    monkeypatch.setattr(convert, "save", full)
    with pytest.raises(
        ValueError, match=r"cannot be written \(no space left\): run python -m cddistill.models.single_fil"
    ):
        models.load(own)
    assert not [*own.parent.glob("*model-diffusers*")]


def test_a_folder_that_another_process_made_meanwhile_is_used(own, monkeypatch):
    folder, away = own.parent / "model-diffusers", own.parent / "away"
    folder.rename(away)

    def beaten(*_):
        away.rename(folder)
        raise OSError("Directory not empty")

    monkeypatch.setattr(single_file, "convert_file", beaten)
    assert models.resolve(own) == folder


def test_the_command_writes_another_folder(converted, tmp_path, capsys):
    file = write(tmp_path, tensors("sd1"), tokenizers=())
    single_file.main([str(file), str(tmp_path / "out"), f"--parts={converted[0].parent}"])
    assert f"converted to {tmp_path / 'out'}: train with --config.teacher={tmp_path / 'out'}" in capsys.readouterr().out
    assert Pipeline(str(tmp_path / "out")).prompts
    for wrong, sentence in (([file, tmp_path / "out"], "out exists: name a new folder"),
                            ([tmp_path / "no.ckpt", tmp_path / "x"], "no.ckpt does not exist: name a"),
                            ([file, tmp_path / "x"], "has no tokenizer/: copy")):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            single_file.main([*map(str, wrong)])
        assert sentence in capsys.readouterr().err


def test_distilled_unets_have_a_number_of_layers_per_attention():
    """As SSD-1B: fewer transformer layers in some attentions than in others of one block."""
    p = golden.TINY["xl"]["unet"] | {"num_res_blocks": 2}
    shapes = golden.unet(p)
    cut = [name for name in shapes if name.startswith("output_blocks.0.1.transformer_blocks.1.")]
    config = ldm.unet_config({name: shape for name, shape in shapes.items() if name not in cut})
    assert config["transformer_layers_per_block"] == [1, 2]
    assert config["reverse_transformer_layers_per_block"] == [[1, 2, 2], 1]
    assert "reverse_transformer_layers_per_block" not in ldm.unet_config(shapes)


def test_files_keep_sixteen_bits_if_all_their_tensors_have_them():
    kinds = "<f2", ml_dtypes.bfloat16, "<f4", "<f8"
    half, brain, full, double = (Tensor(Path(), 0, np.dtype(x), (1,), (1,)) for x in kinds)
    assert single_file.narrowest([half, half]) == np.float16
    assert single_file.narrowest([brain]) == ml_dtypes.bfloat16
    assert single_file.narrowest([half, brain]) == single_file.narrowest([half, full]) == np.float32
    assert single_file.narrowest([double]) == np.float32


def test_rows_of_a_tensor_are_read_lazily(tmp_path):
    safetensors.numpy.save_file({"x": np.arange(12.0).reshape(6, 2)}, tmp_path / "x.safetensors")
    x = files.read(tmp_path / "x.safetensors").tensors["x"]
    np.testing.assert_array_equal(np.asarray(x.rows(2, 4)), [[4.0, 5.0], [6.0, 7.0]])
    np.testing.assert_array_equal(np.asarray(x.rows(4, 6).T), [[8.0, 10.0], [9.0, 11.0]])
