"""Hostile model files: each is refused in one sentence that names it, in seconds, and without gigabytes of memory."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import msgpack
import pytest
import safetensors.numpy

from cddistill.models import (
    convert,
    files,
    index,
    ldm,
    parts,
    peft,
    schedulers,
    state_dict,
    tokenizer,
    torch_pickle,
)
from cddistill.perceptual import latent_lpips

NAN, INF = float("nan"), float("inf")
SECONDS = 2


def refused(call, *args, names):
    """The sentence with which a call ends, which names a file, within two seconds."""
    start = time.process_time()
    with pytest.raises(ValueError, match="^.{1,900}$") as error:
        call(*args)
    assert time.process_time() - start < SECONDS
    assert names in str(error.value)
    return str(error.value)


# ---- pickles


P = b"\x80\x02"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aX\x03\0\0\0cpuK\x0ctQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE
LONG = b"\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20  # an integer of 8 million bits
DICT = b"}X\x01\0\0\0w"  # {"w": ...
PAIRS = b"](" + b"X\x01\0\0\0aN\x86" * 100_000 + b"e\x85q\x01"
PICKLES = {  # nothing in them needs more than the opcodes of state dicts
    "tuples of tuples as a key": P + b"})" + b"2\x86" * 60 + b"Ns.",
    "a deep tuple as a key": P + b"})" + b"\x85" * 200_000 + b"Ns.",
    "a deep tuple": P + DICT + b")" + b"\x85" * 200_000 + b"s.",
    "a million tuples": P + b")" * 10**6 + b".",
    "a million opcodes": P + b"N" * 10**6 + b"}.",
    "a million marks": P + b"(" * 10**6 + b".",
    "lists in lists": P + DICT + b"]" * 30_000 + b"a" * 29_999 + b"s.",
    "a list of itself": P + DICT + b"]q\x01h\x01as.",
    "a dict of itself": P + b"}q\x01X\x05\0\0\0modelh\x01s.",
    "dicts in dicts": P + b"}X\x01\0\0\0a" * 200 + b"N" + b"s" * 200 + b".",
    "lists of the same lists": P + b"]q\0" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"0"
    + DICT + b"h<s.",
    "the same list again and again": P + b"](cargparse\nNamespace\n" + b"N" * 50_000 + b"eq\x010}(" + b"".join(
        b"X\x04\0\0\0%04dh\x01" % i for i in range(9000)) + b"u.",
    "a memo index of 2^29": P + DICT + b"Nsr" + struct.pack("<I", 2**29) + b".",
    "a memo index of 2^31": P + DICT + b"Nsp2147483648\n.",
    "an item of no memo": P + b"h\x07.",
    "a call of a text": P + b"X\x01\0\0\0a)R.",
    "a call of a number": P + b"K\x01)R.",
    "a call of a dtype": P + b"ctorch\nFloatStorage\n)R.",
    "a call of a call": P + b"ccollections\nOrderedDict\n)R)R.",
    "a new object of a text": P + b"X\x01\0\0\0a)\x81.",
    "many arguments again and again": P + b"(" + b"N" * 10**5 + b"tq\x010cargparse\nNamespace\nq\x020"
    + b"h\x02h\x01R0" * 10**5 + b"}.",
    "pairs again and again": P + PAIRS + b"0" + b"ccollections\nOrderedDict\nh\x01R0" * 50_000 + b"}.",
    "a long persistent id again and again": P + STORAGE[:-2] + b"N" * 10**5 + b"tq\x010" + b"h\x01Q0" * 10**5 + b"}.",
    "integers of a megabyte as a shape": P + DICT + TENSOR + b"K\0(" + LONG * 16 + b"t)\x89}tRs.",
    "integers as hashes of each other": P + b"}(" + b"".join(
        b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little") + b"N" for i in range(50_000)) + b"u.",
    "floats as keys": P + b"}G" + b"\x7f\xf8" + b"\0" * 6 + b"Ns.",
    "a set of itself": b"\x80\x04\x8f(N\x90.",
    "a text of 4 GB": P + b"X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
    "an array of 2^62 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.",
    "an integer of 10^6 digits": P + b"L" + b"9" * 10**6 + b"L\n.",
    "an integer of 2^31 bytes": P + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "a name of a megabyte": P + b"c" + b"a" * 10**6 + b"\n" + b"b" * 10**6 + b"\n.",
    "a name of two lines": b"\x80\x04X\x03\0\0\0a\nbX\x01\0\0\0c\x93.",
    "an extension": P + b"\x82\x01.",
    "a shape that is a text": P + DICT + TENSOR + b"K\0X\x02\0\0\x00333)\x89}tRs.",
    "a shape of 2^62": P + DICT + TENSOR + b"K\0\x8a\x08" + struct.pack("<Q", 2**62) + b"\x85K\0\x85\x89}tRs.",
    "strides of 0": P + DICT + TENSOR + b"K\0\x8a\x06" + struct.pack("<Q", 2**40)[:6] + b"\x85K\0\x85\x89}tRs.",
    "negative strides": P + DICT + TENSOR + b"K\x03K\x03\x85J\xff\xff\xff\xff\x85\x89}tRs.",
    "a forged storage": P + DICT + b"ctorch._utils\n_rebuild_tensor_v2\n((NNK\x0ctK\0)" b")\x89}tRs.",
    "a tensor that is none": P + DICT + b"ctorch._utils\n_rebuild_parameter\n(NtRs.",
    "a key of a megabyte": P + b"}X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"Ns.",
    "no end": P + b"}",
    "nothing on the stack": P + b".",
}  # fmt: skip


BARE = ("tuples of tuples as a key", "a deep tuple", "a call of a text", "a text of 4 GB", "no end", "a forged storage")


def bare(file, pickled):
    """A file of torch.save before PyTorch 1.6."""
    file.write_bytes(b"".join(pickle.dumps(x, 2) for x in (torch_pickle.MAGIC, 1001, {})) + pickled + P + b"](Va\ne.")


def zipped(file, pickled, **options):
    """A file of torch.save."""
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/a", bytes(48))


@pytest.mark.parametrize(("wrap", "name"), [*((zipped, name) for name in PICKLES), *((bare, name) for name in BARE)])
def test_a_hostile_pickle_is_refused(tmp_path, name, wrap):
    wrap(tmp_path / "model.pt", PICKLES[name])
    refused(files.read, tmp_path, names="model.pt")


# ---- archives, safetensors, msgpack, JSON


def inflated(folder):
    """A pickle of 30 MB in an archive of 30 KB."""
    zipped(folder / "model.pt", bytes(3 * 10**7), compression=zipfile.ZIP_DEFLATED)


def many_files(folder):
    """An archive of more files than a network has weights."""
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", P + b"}.")
    data = (folder / "model.pt").read_bytes()
    at = data.index(b"PK\1\2")
    entry, end = data[at : data.index(b"PK\5\6")], bytearray(data[-22:])
    end[12:16] = struct.pack("<I", len(entry) * 200_000)
    (folder / "model.pt").write_bytes(data[:at] + entry * 200_000 + end)


def two_pickles(folder):
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("a/data.pkl", P + b"}.")
        archive.writestr("b/data.pkl", P + b"}.")


def byte_order(folder):
    with zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", P + b"}.", zipfile.ZIP_STORED)
        archive.writestr("archive/byteorder", bytes(60))


def repeated(folder):
    """A trillion numbers that are all the same one."""
    shape = b"K\0\x8a\x06" + struct.pack("<Q", 2**40)[:6] + b"\x85K\0\x85\x89}tRs."
    zipped(folder / "model.pt", P + DICT + TENSOR + shape)


def shard(text):
    """An index that names this shard."""
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": text}}))


def safetensors_header(header: bytes, size=None):
    size = len(header) if size is None else size
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header)


def flax_file(content: bytes):
    return lambda folder: (folder / "flax_model.msgpack").write_bytes(content)


def array(*content, code=1):
    """A msgpack file of one array."""
    return flax_file(msgpack.packb({"w": msgpack.ExtType(code, msgpack.packb(content))}))


def pipe(folder):
    os.mkfifo(folder / "model.safetensors")


DEEP = "[" * 100_000
ENTRY = b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
FILES = {
    "a pickle that inflates": inflated,
    "a byte order that inflates": byte_order,
    "an archive of 200,000 files": many_files,
    "an archive of two pickles": two_pickles,
    "an archive of nothing": lambda folder: (folder / "model.pt").write_bytes(b"PK\5\6" + bytes(18)),
    "repeated numbers": repeated,
    "a header of 2^63 bytes": safetensors_header(b"{}", 2**63),
    "a header of 100 MB": safetensors_header(b"{}", 10**8),
    "a header of 30 MB": safetensors_header(b"{" + b",".join(ENTRY % i for i in range(500_000)) + b"}"),
    "a deep header": safetensors_header(b'{"__metadata__":' + DEEP.encode()),
    "a header of a list": safetensors_header(b"[]"),
    "a negative shape": safetensors_header(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'),
    "a huge shape": safetensors_header(b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
    "a deep map": flax_file(b"\x81\xa1a" * 100_000 + b"\x80"),
    "a map of 2^32": flax_file(b"\xdf\xff\xff\xff\xff" + b"\xa0\x80" * 10**6),
    "a name of 4 GB": flax_file(b"\x81\xdb\xff\xff\xff\xff"),
    "a name of 10 KB": flax_file(msgpack.packb({"a" * 10_000: {}})),
    "an array of 2^32": flax_file(b"\x81\xa1w\xc9\0\0\0\x20\x01\x93\xdd\xff\xff\xff\xff" + bytes(40)),
    "a deep array": flax_file(b"\x81\xa1w\xc9\0\0\1\0\x01\x93" + b"\x91" * 300),
    "an array of texts": array(["a", 10**9], "float32", b""),
    "an array of -1": array([-1, 2], "float32", b""),
    "an array of 1.5": array([1.5], "float32", b"1234"),
    "an array of no type": array([1], ["float32"], b"1234"),
    "an array of another kind": array([1], "float32", b"1234", code=2),
    "a deep index": lambda folder: (folder / "model.safetensors.index.json").write_text(DEEP),
    "an index 900 deep": shard(json.loads("[" * 900 + "]" * 900)),
    "an index of 17 MB": lambda folder: (folder / "model.safetensors.index.json").write_bytes(b" " * 17 * 2**20),
    "an index of nothing": lambda folder: (folder / "model.safetensors.index.json").write_text("null"),
    "an index of a list": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'),
    "a pipe": pipe,
} | {f"an index of {text!r}": shard(text) for text in (
    "../../outside.safetensors", "/etc/passwd", "a/../b", "..", "", ".", "a\\b", "a\0b", 3, None, {}, "sub/x.bin",
)}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_weight_file_is_refused(tmp_path, name):
    FILES[name](tmp_path)
    file = next(iter(tmp_path.iterdir()))
    said = refused(files.read, file if name == "a pipe" else tmp_path, names=file.name)
    assert ("is compressed" in said) == ("inflates" in name)
    if name.startswith("an index of"):  # it copies the shards
        refused(parts.part_files, tmp_path, names=file.name)


@pytest.mark.parametrize("part", ["..", "../..", "/etc", "a/b", "", ".", "a\\b", "a\0b"])
def test_an_index_of_a_pipeline_names_subfolders_only(tmp_path, part):
    (tmp_path / "model_index.json").write_text(json.dumps({part: ["diffusers", "AutoencoderKL"]}))
    said = refused(index.read_index, tmp_path, names="model_index.json")
    assert "which is no folder beside it" in said


@pytest.mark.parametrize(
    "text", [DEEP, "[" * 60 + "]" * 60, "null", "[]", " " * 17 * 2**20, "9" * 5000, '{"a":' * 99_999]
)
@pytest.mark.parametrize("name", ["config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_json_that_is_no_object_is_refused(tmp_path, name, text):
    folder = write_pipeline(tmp_path)
    (folder / name).write_text(text)
    refused(convert.load, folder, names=name)


@pytest.mark.parametrize(
    "options",
    [{"rank_pattern": {"(a+)+$": 2}}, {"alpha_pattern": {"(.*a){20}": 2}}, {"rank_pattern": {".*.*.*.*.*x": 2}},
     {"rank_pattern": {"(": 2}}, {"rank_pattern": ["a"]}, {"rank_pattern": {"a": "2"}}, {"r": 0}, {"r": "2"},
     {"lora_alpha": NAN}, {"lora_alpha": INF}, {"lora_alpha": -1}, {"alpha_pattern": {"a" * 1000: 2}}, {"bias": []}],
    ids=str,
)  # fmt: skip
def test_a_hostile_adapter_config_is_refused(tmp_path, options):
    file = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2} | options))
    refused(peft.beside, file, names="adapter_config.json")


@pytest.mark.parametrize("text", ["[]", "null", "{", DEEP, "3"], ids=lambda x: x[:9])
def test_hostile_metadata_of_a_lora_is_refused(tmp_path, text):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.numpy.save_file({}, file, metadata={"lora_adapter_metadata": text})
    refused(peft.header, file, "unet.", names=file.name)


@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("vocab.json", DEEP, "vocab.json"),
        ("vocab.json", '{"a": "b"}', "holds no tokenizer"),
        ("vocab.json", '{"a": -1}', "holds no tokenizer"),
        ("merges.txt", "a b c", "merges.txt"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"pad_token": 3}', "pad_token 3"),
        ("tokenizer_config.json", '{"pad_token": {"content": []}}', "pad_token []"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length nan"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length '77'"),
        ("tokenizer_config.json", '{"model_max_length": -1}', "model_max_length -1"),
        ("tokenizer.json", DEEP, "holds no tokenizer"),
        ("tokenizer.json", "{}", "holds no tokenizer"),
    ],
)
def test_a_hostile_tokenizer_is_refused(tmp_path, file, content, names):
    if file != "tokenizer.json":
        (tmp_path / "vocab.json").write_text(json.dumps({tokenizer.START: 0, tokenizer.END: 1}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / file).write_text(content)
    assert str(tmp_path) in refused(tokenizer.load, tmp_path, names=names)


def test_names_of_many_tensors_are_read_in_time():
    """Names on which a regular expression would go back and forth."""
    start = time.process_time()
    for name in ("_ema_" * 100, "lora_A" * 100, "input_blocks.1." * 60):
        state_dict.bare_names({f"{name}.{i}": 0 for i in range(1000)}, "model.pt")
    deep = {f"input_blocks.{i}.0.out_layers.3.weight": (32,) for i in range(2000)}
    assert len(ldm.blocks(deep, "input_blocks", 1, "0.op")[0]) < 50
    assert time.process_time() - start < SECONDS
    with pytest.raises(ValueError, match="ten resnets in a block"):
        ldm.unet_names(["down_blocks.0.resnets.10.conv1"])


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[]",
        "{}",
        '{"x": 1}',
        '{"channels": -1}',
        '{"channels": 4, "widths": [8]}',
        '{"pools": [9]}',
        '{"groups": 0}',
    ],
    ids=lambda x: x[:20],
)
def test_a_hostile_layout_of_a_metric_is_refused(tmp_path, text):
    file = tmp_path / "sd15_latent_lpips.safetensors"
    safetensors.numpy.save_file({}, file, metadata={"layout": text})
    assert "has a layout that cannot be read" in refused(latent_lpips.load, file, names=file.name)


# ---- configs


UNET = {
    "_class_name": "UNet2DConditionModel", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2, "cross_attention_dim": 8,
}  # fmt: skip
NETWORKS = {
    "UNet2DConditionModel": UNET,
    "ControlNetModel": {k: v for k, v in UNET.items() if k != "up_block_types"} | {"_class_name": "ControlNetModel"},
    "AutoencoderKL": {"_class_name": "AutoencoderKL", "block_out_channels": [32]},
    "AutoencoderTiny": {"_class_name": "AutoencoderTiny"},
    "CLIPTextModel": {"architectures": ["CLIPTextModel"], "hidden_size": 8},
    "CLIPTextModelWithProjection": {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 8},
    "DhariwalUNet": {"_class_name": "DhariwalUNet", "num_blocks": 1},
    "SongUNet": {"_class_name": "SongUNet", "num_blocks": 1},
}
ABSURD = (
    -1, 10**9, -(2**40), 10**400, 1.5, NAN, -INF, "8", "", [], {}, [0], [-1], [10**9] * 2, [NAN], ["8"], [[]], [[8]],
    [None], [1] * 1000, [True], "a\n" * 99,
)  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_no_option_of_a_network_may_be_absurd(name):
    """Also of options that are added later: each value is refused with its key, unless a list or null may be meant."""
    for key, default in convert.CLASSES[name]().options().items():
        for value in (None, *ABSURD):
            try:
                convert.build(NETWORKS[name] | {key: value})
            except ValueError as error:
                said = str(error)
                assert key in said, said
                assert len(said.splitlines()) == 1, said
                assert len(said) < 500, said
            else:
                small = value in (-1, 1.5) and (isinstance(default, float) or key == "latent_magnitude")
                assert value is None or small or isinstance(default, tuple | None), (key, value)


SCHEDULERS = [
    ("num_train_timesteps", 2 * 10**9, "at least 1 and at most 100000"), ("num_train_timesteps", 0, "at least 1"),
    ("num_train_timesteps", -1, "at least 1"), ("num_train_timesteps", "1000", "is not an integer"),
    ("num_train_timesteps", None, "is not an integer"), ("num_train_timesteps", True, "is not an integer"),
    ("num_train_timesteps", [1000], "is not an integer"), ("num_train_timesteps", 10**400, "32 bits"),
    ("beta_start", NAN, "a finite number"), ("beta_start", 5, "above 0 and below 1"), ("beta_start", 0, "above 0"),
    ("beta_start", -0.1, "above 0"), ("beta_end", INF, "a finite number"), ("beta_end", "0.02", "is not a number"),
    ("beta_end", None, "is not a number"), ("beta_end", 1, "below 1"), ("beta_schedule", ["linear"], "beta_schedule"),
    ("beta_schedule", None, "beta_schedule"), ("prediction_type", ["epsilon"], "prediction_type"),
    ("prediction_type", 3, "prediction_type"), ("steps_offset", -1, "at least 0"), ("steps_offset", 10**9, "below"),
    ("clip_sample_range", 0, "above 0"), ("clip_sample_range", NAN, "finite"), ("clip_sample", "yes", "is not"),
    ("set_alpha_to_one", 1, "is not"), ("solver_order", 0, "at least 1"), ("solver_order", 10**9, "at most 3"),
    ("original_inference_steps", 0, "at least 1"), ("timestep_scaling", 0, "above 0"),
    ("trained_betas", [NAN] * 1000, "must be"), ("trained_betas", [0.1], "has 1 numbers, but num_train_timesteps"),
    ("trained_betas", [2.0] * 1000, "at most 1"), ("trained_betas", ["0.1"] * 1000, "is not a number"),
    ("trained_betas", "betas.npy", "is not a list"), ("trained_betas", {}, "is not a list"),
    ("_class_name", ["DDIMScheduler"], "_class_name"), ("_class_name", {}, "_class_name"),
    ("_class_name", "os.system", "_class_name"), ("_class_name", 3, "_class_name"), ("a\nb", 3, "is not supported"),
    ("variance_type", [], "variance_type"), ("timestep_type", 10**400, "timestep_type"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "said"), SCHEDULERS, ids=lambda x: str(x)[:20])
def test_an_absurd_value_of_a_scheduler_is_refused_with_its_key(tmp_path, key, value, said):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", key: value}))
    assert said in refused(schedulers.read_scheduler, file, names="scheduler_config.json")


@pytest.mark.parametrize("value", [3, "a", {}, None, True, [["beta_start"]]])
def test_default_values_that_are_no_list_of_names_are_ignored(tmp_path, value):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "_use_default_values": value, "beta_end": 0.5}))
    assert schedulers.read_scheduler(file)[0].beta_end == 0.5


@pytest.mark.parametrize(
    "value", [[5, 5], ["5"], [NAN], [-1], [10**9], 3, "999", {}, [[999]], [5, 999], [1.5]], ids=str
)
def test_timesteps_of_a_student_that_are_none_are_refused(tmp_path, value):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "LCMScheduler", "_timesteps": value}))
    assert "timesteps" in refused(schedulers.read_sampling, file, names="scheduler_config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_num_groups": 0}, "norm_num_groups = 0 (must be at least 1"),
        ({"norm_num_groups": 7}, "block_out_channels[0] = 8 cannot be split into norm_num_groups = 7"),
        ({"in_channels": -4}, "in_channels = -4 (must be at least 1"),
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000 (must be at least 0 and at most 100)"),
        ({"layers_per_block": 100, "transformer_layers_per_block": 100}, "make 20200 layers in the encoder"),
        ({"attention_head_dim": 3}, "block_out_channels[1] = 16 cannot be split into attention_head_dim = 3"),
        ({"block_out_channels": []}, "block_out_channels = [] (must be 1 to 10 values)"),
        ({"block_out_channels": [8] * 1000}, "(must be 1 to 10 values)"),
        ({"_class_name": ["UNet2DConditionModel"]}, "does not name the class"),
        ({"_class_name": "os.system"}, "_class_name 'os.system' is not supported"),
        ({"norm_eps": NAN}, "norm_eps = nan (must be"),
        ({"sample_size": [8, 8, 8]}, "sample_size = [8, 8, 8] (must be a height and a width)"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
        ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
        ({"a\nb": 1}, "does not support 'a\\nb' = 1"),
        ({f"key_{i}": i for i in range(10_000)}, "and 9995 more"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_config_is_checked_before_weights_are_read(tmp_path, change, said):
    folder = write_pipeline(tmp_path, change)
    assert said in refused(convert.load, folder, names="config.json")


def write_pipeline(folder, change=()):
    """A pipeline's folder whose UNet has a config.json and broken weights."""
    for name, content in (("config.json", UNET | dict(change)), ("model_index.json", {}),
                          ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"})):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    return folder


# ---- memory


CHILD = """
import resource, sys
from cddistill.models import files
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        files.read(files.Path(path))
    except ValueError:
        continue
    print(path, "was read")
print("more:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
"""


def test_hostile_files_take_little_memory(tmp_path):
    """All of them in one process, in less than 1 GB more than the imports take; Linux counts in KB."""
    names = [*FILES, *PICKLES]
    for i, name in enumerate(names):
        (tmp_path / str(i)).mkdir()
        if name in FILES:
            FILES[name](tmp_path / str(i))
        else:
            zipped(tmp_path / str(i) / "model.pt", PICKLES[name])
    folders = [str(tmp_path / str(i)) for i, name in enumerate(names) if name != "a pipe"]
    done = subprocess.run([sys.executable, "-c", CHILD, *folders], capture_output=True, text=True, check=True)
    assert "was read" not in done.stdout
    assert int(done.stdout.rpartition("more:")[2]) < 500_000
