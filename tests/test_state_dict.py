"""State dicts as trainers save them: wrappers' prefixes are removed, harmless entries ignored, the rest is refused."""

import pickle

import numpy as np
import pytest
import safetensors.numpy
from torch_file import write_torch

from cddistill import models
from cddistill.models import files
from cddistill.models.state_dict import bare_names

CONFIG = {"block_out_channels": [4], "norm_num_groups": 2, "layers_per_block": 1, "mid_block_type": None,
          "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}  # fmt: skip
WEIGHTS = {"conv.weight": np.arange(6, dtype="f").reshape(2, 3), "conv.bias": np.array([1.0, -1.0], np.float32)}
# As torch.save pickles them: an epoch in numpy, command-line arguments, a class, a random generator's state.
NUMPY = b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\2\0\0\0i8\x89\x88tRc_codecs\nencode\n(X\1\0\0\0a)tRtR"
NAMESPACE = b"cargparse\nNamespace\n)\x81}X\2\0\0\0lrK\1sb"
CALLBACK = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
ADAM = {"state": {0: {"step": np.array([3.0], np.float32), "exp_avg": np.ones(3, "f")}}, "param_groups": [{"lr": 0.1}]}


def named(*prefixes, **others):
    return {prefix + name: x for prefix in prefixes for name, x in WEIGHTS.items()} | others


def assert_weights(tensors):
    assert {*tensors} == {*WEIGHTS}
    for name, x in WEIGHTS.items():
        np.testing.assert_array_equal(np.asarray(tensors[name]), x)


@pytest.mark.parametrize(
    "saved",
    [
        named("module."),
        named("_orig_mod."),
        named("model."),
        named("model.module._orig_mod."),
        named("module.", n_averaged=np.array(8.0, np.float32)),
        named("ema_model.module.", step=np.ones(1, "f")),
        named("_fsdp_wrapped_module._checkpoint_wrapped_module."),
        named("model.", betas=np.ones(1000, "f"), sqrt_one_minus_alphas_cumprod=np.ones(1000, "f")),
        {"conv._orig_mod.weight": WEIGHTS["conv.weight"], "conv.bias": WEIGHTS["conv.bias"]},  # one layer compiled
    ],
)
def test_what_wrappers_put_before_names_is_removed(tmp_path, saved):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(saved, file)
    assert_weights(bare_names(files.read(file).tensors, file))


def test_a_prefix_that_only_some_names_have_belongs_to_the_network(tmp_path):
    names = dict.fromkeys(("module.weight", "model.weight", "other.weight"), 0)
    assert {*bare_names(names, tmp_path)} == {*names}
    assert {*bare_names({"down.weight": 0, "down.bias": 0}, tmp_path)} == {"down.weight", "down.bias"}


@pytest.mark.parametrize("average", ["ema.", "model_ema.", "ema_unet."])
def test_a_network_beside_its_average_is_refused(tmp_path, average):
    with pytest.raises(ValueError, match=rf"x.pt holds a network and its average \({average}conv.weight\): save the"):
        bare_names(named("model.", average), tmp_path / "x.pt")


def test_a_tensor_under_two_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.pt holds tensors twice, with and without _orig_mod"):
        bare_names(named("", "_orig_mod."), tmp_path / "x.pt")


@pytest.mark.parametrize(
    "saved",
    [
        {"state_dict": named("")},
        {"epoch": 3, "model": named(""), "optimizer": ADAM, "best": 0.5, "note": None, "losses": [0.5, 0.25]},
        {"params": named("")},
        {"model_state_dict": named("module."), "lr_scheduler": {"base_lrs": [0.1]}, "rng_state": np.ones(9, "f")},
        {"global_step": NUMPY, "state_dict": named("model."), "callbacks": {CALLBACK: {"best_model_path": ""}}},
        {"model": {"state_dict": named(""), "version": "1.2"}, "args": NAMESPACE, "opt": ADAM},
        {"module": named(""), "buffer_names": [], "optimizer": None, "ds_config": {"zero": {"stage": 1}}},
        named("", epoch=3),
    ],
)
def test_the_only_state_dict_of_a_checkpoint_is_read(tmp_path, saved):
    file = write_torch(tmp_path / "checkpoint.pt", saved)
    assert_weights(bare_names(files.read(file).tensors, file))


def test_the_state_of_an_optimizer_is_not_read(tmp_path):
    """Only the network's bytes are in the file."""
    file = write_torch(tmp_path / "checkpoint.pt", {"model": named(""), "optimizer": ADAM})
    data, moment = file.read_bytes(), np.ones(3, "f").tobytes()
    assert data.count(moment) == 1
    file.write_bytes(data.replace(moment, b"\xff" * len(moment)))
    assert_weights(files.read(file).tensors)


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ({"model": named(""), "ema": named("")}, "holds the state dicts model and ema: save the one that you want"),
        ({"generator": named(""), "discriminator": named(""), "step": 3}, "dicts generator and discriminator"),
        ({"epoch": 3, "lr": 0.1}, "is not a plain state dict: its 'epoch' is of type int, not a tensor; save"),
        ({"optimizer": ADAM}, "is not a plain state dict: its 'optimizer' is of type dict, not a tensor"),
        ({"shadow_params": [*WEIGHTS.values()], "decay": 0.99}, "its 'shadow_params' is of type list, not a tensor"),
        ({"state_dict": {0: WEIGHTS["conv.bias"]}}, "is not a plain state dict: its 0 is of type View, not a tensor"),
        (named("", extra={"a": [WEIGHTS["conv.bias"]]}), "its 'extra' is of type dict, not a tensor"),
        ({"model": named(""), "config": pickle.dumps(print, 2)[2:-1]}, "asks for __builtin__.print, but weights need"),
    ],
)
def test_what_is_ambiguous_or_unknown_is_refused(tmp_path, saved, sentence):
    file = write_torch(tmp_path / "checkpoint.pt", saved)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt .*{sentence}"):
        files.read(file)


def test_a_network_loads_from_a_trainers_checkpoint(tmp_path):
    net = models.init(CONFIG, seed=1, zero_out=False)
    models.save(tmp_path, "unet", net.params, net.module.to_config(), dtype=np.float32)
    file = next((tmp_path / "unet").glob("*.safetensors"))
    tensors = {f"module._orig_mod.{name}": x for name, x in safetensors.numpy.load_file(file).items()}
    file.unlink()
    write_torch(tmp_path / "unet" / "last.ckpt", {"epoch": 7, "state_dict": tensors, "optimizer_states": [ADAM]})
    back = models.load(tmp_path)
    np.testing.assert_array_equal(back.params["conv_in"]["kernel"], net.params["conv_in"]["kernel"])
    tensors = {name.replace("module._orig_mod", "unet"): x for name, x in tensors.items()} | {"loss.w": np.ones(1, "f")}
    write_torch(tmp_path / "unet" / "last.ckpt", tensors)
    with pytest.raises(ValueError, match=r"has unet\.conv_in\.bias instead of conv_in\.bias: save that network's"):
        models.load(tmp_path)
