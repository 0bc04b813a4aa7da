"""Diffusers folders: weights round-trip exactly, and broken folders have specific errors."""

import fnmatch
import hashlib
import json

import flax.serialization
import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_file import write_torch

from cddistill import build, config, models, pipeline, sharding
from cddistill.diffusion import DDPM, EDM
from cddistill.models import convert, folders
from cddistill.models.unet import UNet2DConditionModel
from cddistill.net import Autoencoder, Denoiser, Net

TEXT = {
    "sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2, "cross_attention_dim": 6,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "num_class_embeds": 3,
}  # fmt: skip
OTHERS = {  # the smallest network of every other class, and what it is loaded as
    "DhariwalUNet": (Denoiser, {"img_resolution": 4, "model_channels": 8, "channel_mult": [1], "num_blocks": 1,
                                "attn_resolutions": [], "channels_per_head": 8}),
    "SongUNet": (Denoiser, {"img_resolution": 4, "model_channels": 8, "channel_mult": [1], "num_blocks": 1,
                            "attn_resolutions": []}),
    "AutoencoderKL": (Autoencoder, {"block_out_channels": [8], "norm_num_groups": 4}),
    "AutoencoderTiny": (Autoencoder, {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
                                      "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}),
    "CLIPTextModel": (Net, {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}),
    "CLIPTextModelWithProjection": (Net, {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}),
}  # fmt: skip
FILE, FLAX_FILE = convert.TORCH_FILE, "diffusion_flax_model.msgpack"


@pytest.fixture(scope="module")
def net():
    return models.init(TEXT, seed=3, zero_out=False)


@pytest.fixture
def folder(net, tmp_path):
    """A saved model: unet/ and scheduler/."""
    models.save(tmp_path, "unet", net.params, net.apply.module.to_config(), dtype=np.float32)
    write_scheduler(tmp_path, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    return tmp_path


def write_scheduler(folder, config):
    (folder / "scheduler").mkdir(exist_ok=True)
    config = {"_class_name": "DDIMScheduler"} | config
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def rewrite(folder, change):
    """Save the tensors again after change(tensors)."""
    tensors = safetensors.numpy.load_file(folder / "unet" / FILE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "unet" / FILE)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(a))
    assert all(jnp.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_round_trip_is_exact(net, folder):
    back = models.load(folder)
    assert isinstance(back, Denoiser)
    assert_equal(back.params, net.params)
    assert jax.tree.structure(back) == jax.tree.structure(net)  # same module, schedule and prediction type
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_unet_loads_from_its_own_folder_or_another_subfolder(net, folder):
    assert_equal(models.load(folder / "unet").params, net.params)
    (folder / "unet").rename(folder / "student")
    assert_equal(models.load(str(folder), "student").params, net.params)
    assert models.load(folder, "student", dtype=jnp.bfloat16, remat=True).apply.module.remat


def test_tensor_names_and_layout_are_pytorchs(net, folder):
    tensors = safetensors.numpy.load_file(folder / "unet" / FILE)
    block = net.params["down_blocks_0"]
    attn = block["attentions_0"]["transformer_blocks_0"]
    np.testing.assert_array_equal(
        tensors["down_blocks.0.resnets.0.conv1.weight"], block["resnets_0"]["conv1"]["kernel"].transpose(3, 2, 0, 1)
    )
    prefix = "down_blocks.0.attentions.0.transformer_blocks.0"
    np.testing.assert_array_equal(tensors[f"{prefix}.attn1.to_out.0.weight"], attn["attn1"]["to_out_0"]["kernel"].T)
    np.testing.assert_array_equal(tensors[f"{prefix}.ff.net.0.proj.bias"], attn["ff"]["net_0"]["proj"]["bias"])
    time = net.params["time_embedding"]["linear_1"]["bias"]
    np.testing.assert_array_equal(tensors["time_embedding.linear_1.bias"], time)
    np.testing.assert_array_equal(tensors["class_embedding.weight"], net.params["class_embedding"]["embedding"])
    np.testing.assert_array_equal(tensors["conv_norm_out.weight"], net.params["conv_norm_out"]["scale"])


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float16, 1e-3), (ml_dtypes.bfloat16, 1e-2)])
def test_half_precision_files_become_float32(net, folder, dtype, rtol):
    models.save(folder, "unet", net.params, net.apply.module.to_config(), dtype=dtype)
    (folder / "unet" / FILE).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    back = models.load(folder).params
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(back))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), back, net.params)


def test_weight_shards_are_joined(net, folder):
    tensors = safetensors.numpy.load_file(folder / "unet" / FILE)
    (folder / "unet" / FILE).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({k: tensors[k] for k in part}, folder / "unet" / file)
    weight_map = {k: file for file, part in shards.items() for k in part}
    (folder / "unet" / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(models.load(folder).params, net.params)
    (folder / "unet" / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors is missing, but the index lists it: download"):
        models.load(folder)


def test_legacy_flax_folders_load(net, folder):
    (folder / "unet" / FILE).unlink()
    data = flax.serialization.msgpack_serialize(jax.device_get(net.params))
    (folder / "unet" / FLAX_FILE).write_bytes(data)
    config = net.apply.module.to_config() | {"_class_name": "FlaxUNet2DConditionModel", "split_head_dim": False}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    assert_equal(models.load(folder).params, net.params)
    (folder / "unet" / FLAX_FILE).write_bytes(data[:1000])
    with pytest.raises(ValueError, match="truncated or not a Flax msgpack file"):
        models.load(folder)


def test_parameter_paths_equal_legacy_flax_diffusers():
    """Fingerprint of a file written by diffusers 0.39.0's FlaxUNet2DConditionModel with this configuration."""
    module, shapes = models.abstract(
        {
            "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
    )  # fmt: skip
    lines = [f"{k} {tuple(v.shape)}" for k, v in flax.traverse_util.flatten_dict(shapes, sep="/").items()]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert digest == "35eece22830b630da89083d230d67f79509af22a63893f0ae1c53ad826701653"


def test_torch_save_files_load(net, folder):
    tensors = safetensors.numpy.load_file(folder / "unet" / FILE)
    (folder / "unet" / FILE).unlink()
    write_torch(folder / "unet" / "diffusion_pytorch_model.bin", tensors)
    assert_equal(models.load(folder).params, net.params)


def test_single_weight_file_needs_a_config_next_to_it(net, folder):
    tensors = safetensors.numpy.load_file(folder / "unet" / FILE)
    write_torch(folder / "unet" / "student.pt", {k: x + 1 for k, x in tensors.items()})
    back = models.load(folder / "unet" / "student.pt")
    assert_equal(back.params, jax.tree.map(lambda x: x + 1, net.params))
    assert back.schedule == net.schedule
    (folder / "unet" / "config.json").unlink()
    for path in (folder / "unet" / "student.pt", folder):  # from the folder, the safetensors file would be read
        with pytest.raises(ValueError, match=r"config\.json is missing: .* needs one .*\"_class_name\" \(UNet2DCond"):
            models.load(path)


@pytest.mark.parametrize(
    ("name", "former"), [*((name, False) for name in OTHERS), ("AutoencoderKL", True), ("CLIPTextModel", True)]
)
def test_every_network_class_round_trips(tmp_path, name, former):
    kind, options = OTHERS[name]
    module, shapes = models.abstract(options | {"_class_name": name})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), shapes)
    path = models.save(tmp_path, "part", params, module.to_config(), dtype=np.float32)
    assert {"_class_name", "architectures"} & {*json.loads((path / "config.json").read_text())}
    if former:
        next(path.glob("*.safetensors")).unlink()
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        flat = {name.replace("/layers_", "/layers/"): x for name, x in flat.items()}  # as in transformers' Flax classes
        tree = flax.traverse_util.unflatten_dict(flat, sep="/")
        (path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    back = models.load(tmp_path, "part", remat=True)
    assert type(back) is kind
    assert_equal(back.params, jax.tree.map(jnp.asarray, params))
    assert jax.tree.structure(back) == jax.tree.structure(models.load(path, remat=True))
    assert kind is not Denoiser or (back.schedule, back.predicts) == (EDM(), "x0")


def test_text_encoder_files_with_old_names_and_position_ids_load(tmp_path):
    module, shapes = models.abstract(OTHERS["CLIPTextModel"][1] | {"_class_name": "CLIPTextModel"})
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    written = models.save(tmp_path, "unet", params, module.to_config(), dtype=np.float32) / "model.safetensors"
    written.rename(tmp_path / "unet" / FILE)

    def publish(tensors):
        for name in [*tensors]:
            tensors[name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(77)

    rewrite(tmp_path, publish)
    assert_equal(models.load(tmp_path).params, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("linear", [True, False])
def test_1x1_convolutions_load_as_linear_layers_but_not_the_reverse(tmp_path, linear):
    module, shapes = models.abstract(TEXT | {"use_linear_projection": linear})
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    models.save(tmp_path, "unet", params, module.to_config(), dtype=np.float32)
    name = "down_blocks.0.attentions.0.proj_in.weight"
    rewrite(tmp_path, lambda x: x.update({name: x[name].reshape(8, 8, 1, 1) if linear else x[name].reshape(8, 8)}))
    if linear:
        assert_equal(models.load(tmp_path).params, jax.tree.map(jnp.asarray, params))
    else:
        with pytest.raises(ValueError, match=rf"wrong shape .* {name} \(8, 8\), not \(1, 1, 8, 8\)"):
            models.load(tmp_path)


def test_place_is_called_once_per_weight(net, folder):
    placed = []

    def place(path, x):
        placed.append(path)
        assert isinstance(x, np.ndarray)
        assert (x.dtype, x.flags.c_contiguous) == (np.float32, True)
        return jnp.asarray(x) * 2

    back = models.load(folder, place=place)
    assert_equal(back.params, jax.tree.map(lambda x: x * 2, net.params))
    assert sorted(placed) == sorted(flax.traverse_util.flatten_dict(net.params))


@pytest.mark.slow
def test_teacher_weights_are_sharded_over_the_mesh_one_by_one(monkeypatch):
    read = []
    place = build.place
    monkeypatch.setattr(build, "place", lambda mesh, path, x: read.append(x.shape) or place(mesh, path, x))
    settings = config.defaults("codi")
    settings.update(batch_size=8, fsdp=8)
    settings.data.task = "sr"
    parts = build.build(config.resolve(settings))
    leaves = jax.tree.leaves(parts.frozen["teacher"])
    assert sorted(read) == sorted(x.shape for x in leaves)
    rules = jax.tree.leaves(sharding.by_shape(parts.mesh, parts.frozen["teacher"]))
    assert [x.sharding for x in leaves] == rules
    assert any(not x.is_fully_replicated for x in rules)
    assert_equal(parts.frozen["teacher"].params, models.load("emoji").params)


@pytest.mark.parametrize("name", ["AutoencoderKL", "FluxTransformer2DModel"])
def test_a_teacher_must_be_a_denoiser(folder, name):
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": name}))
    settings = config.defaults("codi")
    settings.update(batch_size=8, teacher=str(folder / "unet"))
    with pytest.raises(ValueError, match=rf"unet holds an? {name}, not a UNet2DConditionModel or .*: point at"):
        build.build(config.resolve(settings))
    assert type(models.load("emoji", expect=(UNet2DConditionModel,))) is Denoiser


@pytest.mark.parametrize("kind", ["controlnet", "mu_blend"])
def test_branches_round_trip(net, tmp_path, kind):
    branch = models.make_branch(net, jax.random.key(0), kind, cond_channels=1, embedding_channels=(4, 8))
    models.save(tmp_path, kind, branch.params, branch.apply.module.to_config(), dtype=np.float32)
    back = models.load(tmp_path, kind)
    assert type(back) is Net
    assert_equal(back.params, branch.params)
    assert back.apply == branch.apply
    theirs = {"time_embedding_dim", "time_cond_proj_dim", "conv_in_kernel", "out_channels", "sample_size"}
    assert not theirs & {*json.loads((tmp_path / kind / "config.json").read_text())}  # not options of a ControlNet


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.pop("conv_in.weight"), r"lacks conv_in\.weight: the weights do not belong"),
        (lambda x: x.update({"mid_block.extra": np.zeros(1)}), r"has mid_block\.extra, which this config.json"),
        (lambda x: x.update({"conv_out.bias": np.zeros(5)}), r"wrong shape .* conv_out\.bias \(5,\), not \(4,\)"),
        (lambda x: [x.pop(k) for k in sorted(x) if "attn1" in k], r"attn1\.to_k\.weight, .* and \d+ more"),
    ],
)
def test_mismatched_weights_are_named(folder, change, sentence):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=sentence):
        models.load(folder)


def test_broken_files_are_named(folder):
    file = folder / "unet" / FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is truncated"):
        models.load(folder)
    file.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.bin is truncated or not a state dict by torch\.save"):
        models.load(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"unet holds none of diffusion_pytorch_model\.safetensors, "):
        models.load(folder)
    for content, sentence in (
        (b"{", r"config\.json is not valid JSON"),
        (b"\xff\xfe", r"config\.json is not valid JSON"),
        (b"[1]", r"config\.json holds a list, not an object"),
    ):
        (folder / "unet" / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            models.load(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"unet/config\.json is missing"):
        models.load(folder)


def test_write_errors_name_the_file(tmp_path):
    net = models.load("emoji")
    (tmp_path / "unet" / FILE).mkdir(parents=True)
    with pytest.raises(OSError, match=rf"unet/{FILE} cannot be written .*: free some space, or choose another place"):
        models.save(tmp_path, "unet", net.params, net.apply.module.to_config())


def test_unsupported_networks_are_named(folder):
    for change, sentence in (
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name 'FluxTransformer2DModel' is not supported"),
        ({"addition_embed_type": "image"}, "does not support addition_embed_type = 'image'"),
    ):
        config = {"_class_name": "UNet2DConditionModel"} | TEXT | change
        (folder / "unet" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=sentence):
            models.load(folder)


@pytest.mark.parametrize(
    ("config", "schedule", "predicts"),
    [
        (None, DDPM(), "eps"),
        ({}, DDPM(1000, "linear", 0.0001, 0.02), "eps"),  # diffusers' defaults
        (
            {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "num_train_timesteps": 50},
            DDPM(50, "squaredcos_cap_v2", 0.0001, 0.02), "x0",
        ),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None,
             "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "steps_offset": 1},
            DDPM(zero_snr=True), "v",
        ),
    ],
)  # fmt: skip
def test_schedule_and_prediction_type_come_from_the_scheduler_config(net, folder, config, schedule, predicts):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    if config is not None:
        write_scheduler(folder, config)
    back = models.load(folder)
    assert (back.schedule, back.predicts) == (schedule, predicts)


def test_unsupported_schedules_are_named(folder):
    for options in ({"beta_schedule": "sigmoid"}, {"prediction_type": "flow"}, {"trained_betas": [0.1, 0.2]}):
        write_scheduler(folder, options)
        with pytest.raises(ValueError, match=rf"scheduler_config\.json: {[*options][0]} (= .* is not sup|has 2 num)"):
            models.load(folder)


def test_unknown_model_names_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be downloaded .* pass the path of the folder instead"):
        models.load("nobody/no-such-model")
    with pytest.raises(ValueError, match="'emojy' is neither a folder nor an embedded model"):
        models.load("emojy")
    monkeypatch.setattr(folders, "ASSETS", tmp_path)
    (tmp_path / "emoji").mkdir()
    assert models.resolve("emoji") == tmp_path / "emoji"


def repository(tmp_path, monkeypatch, files):
    """Mocks a Hub repository of these files; returns the set of files downloaded so far."""
    fetched = set()

    def snapshot_download(name, allow_patterns):
        for file in files:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).touch()
                fetched.add(file)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize(
    ("subfolder", "there", "wanted"),
    [
        ("unet", ["{}.safetensors", "{}.fp16.safetensors", "{}.non_ema.safetensors", "{}.bin"], ["{}.safetensors"]),
        ("unet", ["{}.fp16.safetensors", "{}.bin"], ["{}.fp16.safetensors"]),
        ("unet", ["{}.bin", "{}.fp16.bin"], ["{}.bin"]),
        ("unet", shards := ["{}-00001-of-00002.safetensors", "{}-00002-of-00002.safetensors",
                            "{}.safetensors.index.json"], shards),
        ("text_encoder", ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    ],
)  # fmt: skip
def test_only_one_weight_format_is_downloaded(tmp_path, monkeypatch, subfolder, there, wanted):
    there, wanted = ({f"{subfolder}/{name.format(FILE.split('.')[0])}" for name in names} for names in (there, wanted))
    small = {"model_index.json", "scheduler/scheduler_config.json", f"{subfolder}/config.json"}
    fetched = repository(tmp_path, monkeypatch, there | small | {"vae/config.json", "v1-5-pruned.ckpt"})
    assert models.resolve("somebody/a-model", subfolder) == tmp_path
    assert fetched == wanted | small


def test_a_students_folder_has_the_networks_of_its_hub_repository(tmp_path, monkeypatch):
    """Regression: only the U-Net and the VAE were downloaded, and diffusers refused what was exported."""
    kinds = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler", "safety_checker"]
    names = {"tokenizer": "vocab.json", "scheduler": "scheduler_config.json"}
    files = {f"{kind}/{names.get(kind, 'model.safetensors')}" for kind in kinds}
    (tmp_path / "model_index.json").write_text(json.dumps({kind: ["a library", "AClass"] for kind in kinds}))
    repository(tmp_path, monkeypatch, {"model_index.json"} | files)
    assert {*pipeline.Pipeline("somebody/a-model").copies()} == files - {"safety_checker/model.safetensors"}


def test_init_is_pytorchs_default():
    """U(+-1/sqrt(fan_in)) for kernels and their biases; norms 1 and 0; embeddings N(0, 1); conv_out 0 if asked."""
    wide = {"block_out_channels": [64, 64], "norm_num_groups": 4, "num_class_embeds": 500}
    net = models.init(TEXT | wide, seed=0)
    conv = net.params["down_blocks_0"]["resnets_0"]["conv1"]
    bound = 1.0 / np.sqrt(9 * 64)
    assert 0.99 * bound < np.abs(conv["kernel"]).max() <= bound
    np.testing.assert_allclose(conv["kernel"].std(), bound / np.sqrt(3), rtol=0.02)
    assert 0.8 * bound < np.abs(conv["bias"]).max() <= bound
    np.testing.assert_allclose(net.params["class_embedding"]["embedding"].std(), 1.0, rtol=0.02)
    norm = net.params["conv_norm_out"]
    assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()  # noqa: PT018
    assert not any(x.any() for x in jax.tree.leaves(net.params["conv_out"]))
    assert models.init(TEXT, zero_out=False).params["conv_out"]["kernel"].any()


def test_init_depends_on_the_seed_alone(net):
    assert_equal(models.init(TEXT, seed=3, zero_out=False).params, net.params)
    assert not jnp.array_equal(models.init(TEXT, seed=4).params["conv_in"]["kernel"], net.params["conv_in"]["kernel"])
    assert models.init(TEXT, 0, DDPM(zero_snr=True), "v").predicts == "v"


def test_unet_config_round_trips(net):
    config = net.apply.module.to_config()
    assert UNet2DConditionModel.from_config(json.loads(json.dumps(config))) == net.apply.module
