"""Weight files: every format reads the same and lazily, no code in them runs, broken files are named in errors."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden import make_files as golden

from cddistill.models import files, torch_pickle

GOLDEN = Path(golden.__file__).parent
ARRAYS = {
    "a.kernel": np.arange(12, dtype="f").reshape(3, 4),
    "a.bias": np.array([1.0, -2.0], np.float16),
    "b.scale": np.array([[0.5, 3.0]], ml_dtypes.bfloat16),
    "b.steps": np.array([1, -1], np.int64),
    "mu": np.array(0.25, np.float32),
    "empty": np.zeros((0, 3), np.float64),
}


def assert_same(tensors, arrays):
    assert {*tensors} == {*arrays}
    for name, x in arrays.items():
        assert (tensors[name].shape, tensors[name].dtype) == (x.shape, x.dtype), name
        np.testing.assert_array_equal(np.asarray(tensors[name]), x, strict=True)
        np.testing.assert_array_equal(np.asarray(tensors[name].T, np.float32), x.T.astype(np.float32), strict=True)


def write_safetensors(folder):
    safetensors.numpy.save_file(ARRAYS, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_shards(folder):
    names = sorted(ARRAYS)
    places = {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}
    for i in range(2):
        safetensors.numpy.save_file({name: ARRAYS[name] for name in names[i::2]}, folder / f"part{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / "model.safetensors.index.json"


def write_msgpack(folder):
    tree = flax.traverse_util.unflatten_dict(ARRAYS, sep=".")
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    return folder / "flax_model.msgpack"


@pytest.mark.parametrize("write", [write_safetensors, write_shards, write_msgpack])
def test_every_format_reads_the_same(tmp_path, write):
    file = write(tmp_path)
    weights = files.read(tmp_path)
    assert weights.file == file
    assert_same({name.replace("/", "."): x for name, x in weights.tensors.items()}, ARRAYS)


@pytest.mark.parametrize("name", ["state_dict.pt", "state_dict_before_1_6.pt"])
def test_pytorch_files_are_read_without_pytorch(name):
    recorded = dict(np.load(GOLDEN / "state_dict.npz"))
    dtypes = {k.removesuffix("/dtype"): str(recorded.pop(k)) for k in [*recorded] if k.endswith("/dtype")}
    tensors = files.read(GOLDEN / name).tensors
    assert {k: x.dtype for k, x in tensors.items()} == {k: np.dtype(d) for k, d in dtypes.items()}
    for key, x in recorded.items():
        np.testing.assert_array_equal(np.asarray(tensors[key], np.float32), x, err_msg=key, strict=True)
    kernel = tensors["channels_last"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(np.asarray(kernel), recorded["channels_last"].transpose(2, 3, 1, 0))
    assert "torch" not in sys.modules


def test_a_folders_preferred_file_is_chosen():
    stem = "diffusion_pytorch_model"
    best_first = [
        f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", "model.safetensors", "model.fp16.safetensors",
        "diffusion_flax_model.msgpack", "flax_model.msgpack", f"{stem}.bin", f"{stem}.bin.index.json",
        "pytorch_model.bin", "pytorch_model.fp16.bin",
    ]  # fmt: skip
    other = ["config.json", f"{stem}-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors", "model.onnx"]
    for i, name in enumerate(best_first):
        assert files.choose([*other, *best_first[i:][::-1]]) == name
    assert files.choose(["edm.pt", "config.json"]) == "edm.pt"
    assert files.choose(["a.pt", "b.ckpt"]) is None


def test_opening_a_file_reads_no_tensor_data(tmp_path):
    """A sparse file of 1 TB."""
    header = json.dumps({
        "huge": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [2**40, 2**40 + 8]},
    }).encode()  # fmt: skip
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.seek(2**40, 1)
        stream.write(np.array([1.0, 2.0], "<f4").tobytes())
    tensors = files.read(tmp_path).tensors
    assert tensors["huge"].shape == (2**38,)
    assert np.asarray(tensors["small"]).tolist() == [1.0, 2.0]


def test_jax_uses_arrays_without_a_copy(tmp_path):
    """So loading on a CPU never holds two copies of a weight."""
    tensors = files.read(write_safetensors(tmp_path).parent).tensors
    for x in (np.asarray(tensors["a.kernel"].T, np.float32), np.asarray(tensors["a.bias"], np.float32)):
        assert x.flags.c_contiguous
        assert jax.device_put(x).unsafe_buffer_pointer() == x.ctypes.data


class Call:
    """Pickles as a function call, which unpickling executes."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def bare(file, pickled):
    file.write_bytes(pickled)


def before_1_6(file, pickled):
    file.write_bytes(b"".join(pickle.dumps(x, 2) for x in (torch_pickle.MAGIC, 1001, {})) + pickled + pickle.dumps([]))


def zipped(file, pickled):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)


@pytest.mark.parametrize("wrap", [bare, before_1_6, zipped])
def test_no_code_in_a_file_is_run(tmp_path, wrap):
    trap = tmp_path / "trap"
    attacks = {
        "posix.system": pickle.dumps({"w": Call(os.system, f"touch {trap}")}),
        "builtins.exec": pickle.dumps({"w": Call(exec, f"open({str(trap)!r}, 'w')")}),
        "builtins.getattr": b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nVupdate\ntR.",
        "numpy": pickle.dumps({"w": np.zeros(3)}),  # harmless, but numpy would have to be trusted
        "cddistill.models.files.read": b"ccddistill.models.files\nread\n(Va\ntR.",
    }  # fmt: skip
    pickle.loads(attacks["posix.system"])
    assert trap.exists()  # plain pickle does run the code
    trap.unlink()
    for called, pickled in attacks.items():
        wrap(tmp_path / "model.pt", pickled)
        with pytest.raises(ValueError, match=rf"model\.pt asks for {called}.* weights need no code, so it was not"):
            files.read(tmp_path / "model.pt")
    assert not trap.exists()


def test_a_file_cannot_change_the_reader(tmp_path):
    """The pickle opcode BUILD sets attributes of allowed objects, such as a function's defaults."""
    known = "torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "collections\nOrderedDict", "argparse\nNamespace"
    for name in known:
        bare(tmp_path / "model.pt", f"c{name}\n(N}}V__defaults__\n(I1\ntstb.".encode())
        before = torch_pickle.tensor.__defaults__
        zipped(tmp_path / "model.pt", (tmp_path / "model.pt").read_bytes())
        with pytest.raises(ValueError, match="truncated or not a state dict by torch.save"):
            files.read(tmp_path / "model.pt")
        assert torch_pickle.tensor.__defaults__ == before
    assert not hasattr(torch_pickle.Ignored, "__defaults__")


def cut(write, size=-10):
    def broken(folder):
        file = write(folder)
        file.write_bytes(file.read_bytes()[:size])

    return broken


def pytorch(change, name="state_dict.pt"):
    """The recorded file with its bytes changed."""
    return lambda folder: (folder / "model.pt").write_bytes(change((GOLDEN / name).read_bytes()))


def longer(data):
    """Declares the 3 x 4 matrix as 3 x 5."""
    assert b"K\x03K\x04\x86" in data
    return data.replace(b"K\x03K\x04\x86", b"K\x03K\x05\x86")


def pickled(value):
    return lambda folder: zipped(folder / "model.pt", pickle.dumps(value))


def compressed(folder):
    with zipfile.ZipFile(GOLDEN / "state_dict.pt") as old, zipfile.ZipFile(folder / "model.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)


def big_endian(folder):
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/byteorder", "big")


def without_shard(folder):
    write_shards(folder)
    (folder / "part1.safetensors").unlink()


def wrong_index(change):
    def broken(folder):
        index = write_shards(folder)
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    return broken


def float8(folder):
    safetensors.numpy.save_file({"w": np.zeros(2, ml_dtypes.float8_e4m3fn)}, folder / "model.safetensors")


def flax_file(value):
    return lambda folder: (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(value))


def two_files(folder):
    (folder / "a.pt").touch()
    (folder / "b.pt").touch()


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (lambda folder: None, r"holds none of diffusion_pytorch_model\.safetensors, .* nor a single weight file"),
        (two_files, r"holds none of .* nor a single weight file"),
        (cut(write_safetensors), r"model\.safetensors is truncated or not a safetensors file .* download it again"),
        (cut(write_safetensors, 20), r"model\.safetensors is truncated"),
        (cut(write_safetensors, 0), r"model\.safetensors is truncated"),
        (float8, r"model\.safetensors holds F8_E4M3, only F32, "),
        (without_shard, r"part1\.safetensors is missing, but the index lists it"),
        (wrong_index(lambda x: x["weight_map"].update(a="part0.safetensors")), r"part0\.safetensors lacks a, but "),
        (wrong_index(lambda x: x.pop("weight_map")), r"index\.json has weight_map = None, where dict is expected"),
        (wrong_index(lambda x: x["weight_map"].update(a=[])), r"index\.json names the shard \[\], which is no file"),
        (cut(write_shards), r"index\.json is not valid JSON"),
        (cut(write_msgpack), r"flax_model\.msgpack is truncated or not a Flax msgpack file"),
        (cut(write_msgpack, 50), r"flax_model\.msgpack is truncated"),
        (cut(write_msgpack, 0), r"flax_model\.msgpack is truncated"),
        (flax_file({"step": 3}), r"flax_model\.msgpack is truncated or not a Flax msgpack file .*0x3"),
        (flax_file({"a": np.zeros(2, np.complex64)}), r"flax_model\.msgpack is truncated or not .*complex64"),
        (pytorch(lambda x: x[:-10]), r"model\.pt is truncated or not a state dict by torch\.save .*BadZipFile"),
        (pytorch(lambda x: x[:300]), r"model\.pt is truncated"),
        (pytorch(lambda x: x[:-10], "state_dict_before_1_6.pt"), r"model\.pt is truncated .*storages are missing"),
        (pytorch(lambda x: x[:100], "state_dict_before_1_6.pt"), r"model\.pt is truncated"),
        (pytorch(lambda x: b""), r"model\.pt is truncated or not a state dict by torch\.save"),
        (pytorch(longer, "state_dict_before_1_6.pt"), r"model\.pt is truncated or .* lies outside of its storage"),
        (compressed, r"model\.pt is truncated or not .* is compressed"),
        (big_endian, r"model\.pt was written on a big-endian machine"),
        (pickled([1, 2]), r"model\.pt holds a list, not a state dict: save the network's state_dict\(\)"),
        (pickled({"epoch": 3}), r"model\.pt is not a plain state dict: its 'epoch' is of type int, not a tensor"),
        (pickled({"model": {}}), r"model\.pt is not a plain state dict: its 'model' is of type dict"),
    ],
)
def test_each_kind_of_broken_file_has_its_own_error(tmp_path, broken, sentence):
    broken(tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        files.read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_file_truncated_after_opening_is_refused(tmp_path):
    file = write_safetensors(tmp_path)
    tensors = files.read(tmp_path).tensors
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        np.asarray(tensors["a.kernel"])


LOAD = """
import json, pathlib, re, sys
import jax
from cddistill import models

def memory(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

models.abstract(json.loads(pathlib.Path(sys.argv[1], "config.json").read_text()))
jax.block_until_ready(jax.device_put(0.0))
before = memory("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
params = jax.block_until_ready(models.load(sys.argv[1]).params)
print((memory("VmHWM") - before) / sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """300 MB, mostly kernels, which must be transposed."""
    from cddistill import models
    from cddistill.models import convert

    module, shapes = models.abstract({
        "block_out_channels": [832], "layers_per_block": 1, "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"], "mid_block_type": "UNetMidBlock2D",
    })  # fmt: skip
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    models.save(tmp_path, ".", params, module.to_config(), dtype=np.float32)
    assert (tmp_path / convert.TORCH_FILE).stat().st_size > 290e6
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.3
