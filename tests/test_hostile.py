"""Hostile values, arrays and records: each is refused in one sentence that names it, before anything is loaded."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import pickle
import re
import sys
from io import BytesIO

import numpy as np
import pytest
from absl import flags
from PIL import Image

from cddistill import api, checkpoint, config, data, health, log, main, train, typed
from cddistill.data import DataConfig, images, loader, ode_pairs
from cddistill.data.loader import option_classes
from cddistill.data.sources import arrays
from cddistill.evals import compare
from cddistill.methods import METHODS

NAN, INF = float("nan"), float("inf")
ABSURD = [  # (method, key, value, what it must be)
    ("codi", "steps", 0, "at least 1"),
    ("codi", "steps", -5, "at least 1"),
    ("codi", "steps", 2**31, "32 bits"),
    ("codi", "steps", 1e300, "32 bits"),
    ("codi", "steps", NAN, "int, not float nan"),
    ("codi", "batch_size", 0, "at least 1"),
    ("codi", "batch_size", 10**9, "at least 1 and at most 1048576"),
    ("codi", "accumulate", 0, "at least 1"),
    ("codi", "seed", -1, "at least 0 and below 2147483548"),
    ("codi", "seed", NAN, "int, not float nan"),
    ("codi", "keep", 0, "at least 1"),
    ("codi", "log_every", -10, "at least 1"),
    ("codi", "checkpoint_every", 0, "at least 1"),
    ("codi", "eval_every", 0, "at least 1"),
    ("codi", "eval_images", -1, "at least 0"),
    ("codi", "fsdp", 0, "-1, or at least 1"),
    ("codi", "fsdp", -2, "-1, or at least 1"),
    ("codi", "lora_scale", NAN, "a finite number"),
    ("codi", "lora_scale", -INF, "a finite number"),
    ("codi", "lora_scale", 1e39, "a finite number that float32 holds"),
    ("codi", "sample_steps", (), "at least one value"),
    ("codi", "sample_steps", (4, 0), "at least 1"),
    ("codi", "sample_steps", (10**9,), "at most 10000"),
    ("codi", "teacher_steps", (-1,), "at least 1"),
    ("codi", "baseline_steps", (0,), "at least 1"),
    ("codi", "teacher_guidance", NAN, "a finite number"),
    ("codi", "teacher_guidance", -3.0, "at least 0"),
    ("codi", "teacher_sampler", "euler", "one of ddim, heun, dpm_solver_pp"),
    ("codi", "parallel", "gpu", "one of jit, pmap"),
    ("codi", "dtype", "float8", "one of float32, bfloat16"),
    ("codi", "encode_dtype", "bfloat16", "one of float16, float32"),
    ("codi", "encode_epochs", 0, "at least 1"),
    ("codi", "num_pairs", 0, "at least 1"),
    ("codi", "pairs_shard", -1, "at least 1"),
    ("codi", "pairs_batch", 0, "at least 1"),
    ("codi", "teacher", "emo\0ji", "without zero bytes"),
    ("codi", "init_from_run", ["a"], "str, not list"),
    ("codi", "optim.lr", -1e-4, "at least 0"),
    ("codi", "optim.lr", NAN, "a finite number"),
    ("codi", "optim.lr", INF, "a finite number"),
    ("codi", "optim.lr", True, "float, not bool"),
    ("codi", "optim.betas", (2.0, 3.0), "at least 0 and below 1"),
    ("codi", "optim.betas", (0.9, 1.0), "at least 0 and below 1"),
    ("codi", "optim.betas", (0.9, 0.99, 0.999), "2 values, not 3"),
    ("codi", "optim.betas", (), "2 values, not 0"),
    ("codi", "optim.betas", (NAN, 0.9), "a finite number"),
    ("codi", "optim.eps", 0.0, "above 0"),
    ("codi", "optim.eps", -1e-8, "above 0"),
    ("codi", "optim.weight_decay", -0.1, "at least 0"),
    ("codi", "optim.clip", -1.0, "at least 0"),
    ("codi", "optim.clip", NAN, "a finite number"),
    ("codi", "optim.warmup", -1, "at least 0"),
    ("codi", "optim.cycles", 0, "at least 1"),
    ("codi", "optim.decay", "sine", "one of constant, cosine, linear"),
    ("dmd2", "optim.critic.lr", -1.0, "at least 0"),
    ("dmd2", "optim.critic.decay", "sine", "one of constant, cosine, linear"),
    ("codi", "data.size", 0, "at least 1"),
    ("codi", "data.size", 10**6, "at most 16384"),
    ("codi", "data.num_classes", 0, "at least 1"),
    ("codi", "data.scale", 0, "at least 1"),
    ("codi", "data.source", ["emoji"], "one of emoji, "),
    ("codi", "data.task", None, "one of none, "),
    ("codi", "data.hole", "star", "one of rectangles, brush, half"),
    ("codi", "data.crop", "native", "one of resize, draft, random"),
    ("codi", "data.split", "folders", "one of auto, hash, fill, all"),
    ("codi", "data.degradation", "jpeg", "one of bicubic, realesrgan"),
    ("codi", "data.depth_files", "cm", "one of inverse, metres"),
    ("codi", "data.canny_sigma", (2.0, 1.0), "(low, high)"),
    ("codi", "data.canny_sigma", (1e9, 1e9), "at most 100"),
    ("codi", "data.canny_low", (0.1,), "2 values, not 1"),
    ("codi", "data.canny_high", (-1.0, 0.3), "at least 0"),
    ("codi", "data.x0_shape", (64, 64), "height, width and channels"),
    ("codi", "data.x0_shape", (64, 64, 0), "at least 1"),
    ("codi", "data.mixture", (), "at least one value"),
    ("codi", "method.ema_decay", 2.0, "at least 0 and below 1"),
    ("codi", "method.ema_decay", 1.0, "at least 0 and below 1"),
    ("codi", "method.ema_decay", -0.5, "at least 0 and below 1"),
    ("codi", "method.ema_decay", NAN, "a finite number"),
    ("codi", "method.delta_t", 0, "at least 1 and below 1000"),
    ("codi", "method.delta_t", 5000, "at least 1 and below 1000"),
    ("codi", "method.grid_size", 1, "0, or at least 2 and at most 1000"),
    ("codi", "method.grid_size", -5, "0, or at least 2 and at most 1000"),
    ("codi", "method.snr_gamma", -1.0, "at least 0"),
    ("codi", "method.signal_weight", -1.0, "at least 0"),
    ("codi", "method.consistency_weight", INF, "a finite number"),
    ("codi", "method.guidance", NAN, "a finite number"),
    ("codi", "method.guidance_range", (4.0, 2.0), "(low, high)"),
    ("codi", "method.guidance_range", (1.0, 2.0, 3.0), "2 values, not 3"),
    ("codi", "method.grid_power", 0.0, "above 0"),
    ("codi", "method.text_dropout", 1.5, "at least 0 and at most 1"),
    ("codi", "method.space", "x", "one of eps, x0"),
    ("diffusion", "method.ema_decay", 2.0, "at least 0 and below 1"),
    ("diffusion", "method.text_dropout", -0.1, "at least 0 and at most 1"),
    ("diffusion", "method.image_dropout", 2.0, "at least 0 and at most 1"),
    ("diffusion", "method.grid_power", -1.0, "above 0"),
    ("diffusion", "method.guidance", -INF, "a finite number"),
    ("lcm", "method.grid_size", 0, "at least 2"),
    ("lcm", "method.guidance_range", (0.5, 2.0), "at least 1"),
    ("lcm", "method.embedding_width", 3, "0, or at least 4"),
    ("lcm", "method.embedding_width", 2, "0, or at least 4"),
    ("lcm", "method.lora_rank", 0, "at least 1"),
    ("lcm", "method.lora_alpha", 0.0, "above 0"),
    ("lcm", "method.ema_decay", 1.5, "at least 0 and below 1"),
    ("gd", "method.halvings", 10**9, "at least 1 and at most 20"),
    ("gd", "method.halvings", 0, "at least 1"),
    ("gd", "method.halve_every", 0, "at least 1"),
    ("gd", "method.first_steps", -64, "at least 1"),
    ("dmd2", "method.ratio", 0, "at least 1"),
    ("dmd2", "method.dm_range", (980, 20), "(low, high)"),
    ("dmd2", "method.fake_range", (0, 1000), "at least 0 and below 1000"),
    ("dmd2", "method.student_timesteps", (), "at least one value"),
    ("dmd2", "method.student_timesteps", (249, 999), "falling"),
    ("dmd2", "method.student_timesteps", (1000, 499), "at least 0 and below 1000"),
    ("dmd2", "method.gan_weight", -1.0, "at least 0"),
    ("dmd2", "method.real_guidance", NAN, "a finite number"),
    ("dmd2", "method.lora_rank", -1, "at least 1"),
    ("diffusion2gan", "method.time", 1000, "at least 0 and below 1000"),
    ("diffusion2gan", "method.mix_share", 1.5, "at least 0 and at most 1"),
    ("diffusion2gan", "method.r1_every", 0, "at least 1"),
    ("diffusion2gan", "method.r1_noise", 0.0, "above 0"),
    ("diffusion2gan", "method.r1_weight", -1.0, "at least 0"),
    ("diffusion2gan", "method.warmup", -1, "at least 0"),
    ("autoencoder", "method.channels", (), "at least one value"),
    ("autoencoder", "method.channels", (24, 0), "at least 8"),
    ("autoencoder", "method.channels", (20,), "a multiple of 8"),
    ("autoencoder", "method.layers", 10**9, "at most 100"),
    ("autoencoder", "method.layers", -1, "at least 1"),
    ("autoencoder", "method.latent_channels", 0, "at least 1"),
    ("autoencoder", "method.lpips_every", 0, "at least 1"),
    ("autoencoder", "method.lpips_crop", -8, "at least 0"),
    ("autoencoder", "method.kl_weight", -1.0, "at least 0"),
    ("latent_lpips", "method.width", 5, "a multiple of 2"),
    ("latent_lpips", "method.pools", (3, 6), "at least 1 and at most 5"),
    ("latent_lpips", "method.classes", 0, "at least 1"),
    ("pretrained", "method.timesteps", (100, 900), "falling"),
    ("pretrained", "method.timesteps", (-1,), "at least 0"),
    ("pretrained", "method.embedded_guidance", NAN, "a finite number"),
    ("pretrained", "method.image_guidance", -1.0, "at least 0"),
]


@functools.cache
def defaults(method):
    """The config of a method as a dict."""
    return config.plain(config.defaults(method))


def refused(method, key, value):
    """The sentence with which a config of this method is refused if this key has this value."""
    *groups, field = key.split(".")
    settings = node = copy.deepcopy(defaults(method))
    for group in groups:
        node = node[group]
    node[field] = value
    with pytest.raises(ValueError, match=f"^{re.escape(key)}") as error:
        config.resolve(settings)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize(("method", "key", "value", "said"), ABSURD, ids=lambda x: str(x)[:24])
def test_an_absurd_value_of_a_config_is_one_sentence_with_its_key(method, key, value, said):
    assert said in refused(method, key, value)


@pytest.mark.parametrize("cls", [config.Run, config.OptimConfig, DataConfig, *option_classes(), *METHODS.values()])
def test_no_number_of_a_config_may_be_absurd(cls):
    """Also of fields that are added later: nothing is NaN or infinite, and no whole number is -1 billion."""
    for field in dataclasses.fields(cls):
        wrong = {int: (NAN, INF, -(10**9), 10**5000), float: (NAN, INF, -INF, 10**400), tuple: ((NAN,), {}, [[1], [2]])}
        for value in wrong.get(type(field.default), ()):
            with pytest.raises(ValueError, match=f"^{field.name}.* must be .{{,200}}$"):
                typed.fit(value, field.type, field.name)


# ---- config files


@pytest.mark.parametrize(
    ("body", "said", "traceback"),
    [
        ("return [1]", "returned list: it must return a config", ()),
        ("return None", "returned NoneType: it must return a config", ()),
        ("yield 1", "returned generator: it must return a config", ()),
        ("c = defaults('codi'); c.data = None; return c", "data holds options and cannot be None", ()),
        ("c = defaults('codi'); c.method = None; return c", "method holds options and cannot be None", ()),
        ("return {'method': {'name': ['codi'], 'ratio': 1}}", "unknown method.name ['codi']: did you mean 'codi'?", ()),
        ("return {'method': {'name': 'codi'}, 1: 2}", "hostile.py: TypeError: '<' not supported", ()),
        ("c = {}; c['a'] = c; return c", "hostile.py: RecursionError: maximum recursion depth exceeded", ()),
        ("return get_config(1)", "hostile.py, line 3: TypeError: get_config()", ("    return get_config(1)",)),
        ("raise OSError('no\\ndisk')", "hostile.py, line 3: OSError: no disk", ("in get_config", "OSError: no")),
        ("import sys; sys.exit(0)", "hostile.py, line 3: it ends the program (SystemExit(0))", ("SystemExit: 0",)),
        ("return 1 / 0", "hostile.py, line 3: ZeroDivisionError: division by zero", ("    return 1 / 0",)),
        ("return '\0'", "hostile.py, line ", ()),
    ],
)
def test_a_config_file_that_makes_no_config_is_one_sentence_after_its_own_traceback(
    body, said, traceback, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(main.os, "_exit", sys.exit)
    (tmp_path / "hostile.py").write_text(f"from cddistill.config import defaults\ndef get_config():\n    {body}\n")
    with pytest.raises(SystemExit) as stopped:
        main.app.run(main.guarded, ["cddistill", f"--config={tmp_path}/hostile.py"], main.parse)
    flags.FLAGS.unparse_flags()
    *own, sentence = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert sentence.startswith("cddistill: ")
    assert said in sentence
    assert bool(own) == bool(traceback)
    assert all(any(part in line for line in own) for part in traceback)
    assert not any("main.py" in line for line in own)


# ---- arrays


RNG = np.random.default_rng(0)
ARRAYS = {
    "x0": RNG.normal(size=(6, 8, 8, 4)).astype("f4"),
    "cond": RNG.uniform(size=(6, 8, 8, 3)).astype("f4"),
    "class_labels": np.arange(6) % 3,
}
TEXT = {"text": RNG.normal(size=(6, 5, 7)).astype("f4"), "null": RNG.normal(size=(5, 7)).astype("f4")}
IDS = {"input_ids": np.arange(30).reshape(6, 5), "null_input_ids": np.arange(5)}
DEEP = "[" * 100_000


def npz(x):
    """An archive of several arrays."""
    file = BytesIO()
    np.savez(file, x=x)
    return file.getvalue()


def header_of(x):
    """The header of a file of 10^12 rows, without them."""
    file = BytesIO()
    header = {"descr": x.dtype.str, "fortran_order": False, "shape": (10**12, *x.shape[1:])}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


HARMS = {
    "complex": lambda x: x * 1j,
    "of no axes": lambda x: x.flat[0],
    "of no rows": lambda x: x[:0],
    "of empty rows": lambda x: np.zeros((len(x), *[0] * (x.ndim - 1)) if x.ndim > 1 else 0, x.dtype),
    "of records": lambda x: np.zeros(x.shape, [("a", "f4"), ("b", "i4")]),
    "of Python objects": lambda x: x.astype(object),
    "of texts": lambda x: x.astype(str),
    "of booleans": lambda x: x > 0,
    "of times": lambda x: np.zeros(x.shape, "M8[s]"),
    "with NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.nan, x),
    "with infinity": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, -np.inf, x),
    "too large for float32": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, 1e300, x.astype(np.float64)),
    "an archive": npz,
    "half": header_of,
    "junk": lambda x: b"junk",
    "nothing": lambda x: b"",
    "a pickle": lambda x: pickle.dumps(x),
}
INTEGER_HARMS = {
    "negative": lambda x: x - 100,
    "too large for int32": lambda x: x + 2**40,
    "the largest": lambda x: np.full(x.shape, 2**64 - 1, "u8"),
}


@pytest.mark.parametrize("harm", HARMS | INTEGER_HARMS)
@pytest.mark.parametrize("name", ["x0", "cond", "class_labels", *TEXT, *IDS])
def test_arrays_that_are_none_are_refused_by_name(tmp_path, name, harm):
    arrays = {name: x for name, x in ARRAYS.items() if name != "class_labels"} | (TEXT if name in TEXT else IDS)
    arrays = ARRAYS if name in ARRAYS else arrays
    if harm in INTEGER_HARMS and arrays[name].dtype.kind == "f":
        return  # they are numbers like others
    (tmp_path / "train").mkdir()
    for key, x in arrays.items():
        np.save(tmp_path / "train" / f"{key}.npy", x)
    harmed = (HARMS | INTEGER_HARMS)[harm](arrays[name])
    path = tmp_path / "train" / f"{name}.npy"
    path.write_bytes(harmed) if isinstance(harmed, bytes) else np.save(path, harmed, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"{name}\.npy") as error:
        data.load(data.configure(source="arrays", path=str(tmp_path)))
    assert "\n" not in str(error.value)
    assert "unsafe" not in str(error.value)


@pytest.mark.parametrize(
    "label", [NAN, np.float32("nan"), 1.5, 1 + 0j, -1, 10, 2**40, "3", True, None, [1], np.ones(2, int)]
)
def test_a_label_that_is_no_class_is_refused_and_not_rounded(label):
    with pytest.raises(ValueError, match="has the label .*labels are whole numbers in 0 .. 8"):
        loader.label_of(label, data.configure())


@pytest.mark.parametrize(
    "image",
    [np.ones((8, 8, 3), complex), np.ones((0, 8), np.uint8), np.uint8(3), np.array(None), np.zeros((8, 8), "U3"),
     np.zeros((8, 8), [("a", "u1")]), np.zeros((2, 8, 8, 3), np.uint8)],
)  # fmt: skip
def test_an_array_that_is_no_image_is_refused(tmp_path, image):
    with pytest.raises(ValueError, match=r"image is .*; expected uint8 \[h,w\]"):
        images.from_array(image, "image")
    np.save(tmp_path / "map.npy", image, allow_pickle=True)
    with pytest.raises(ValueError, match=r"map\.npy"):
        images.read_map(tmp_path / "map.npy")


# ---- records


ROWS = ['"6"', "6.0", "1e12", "10" * 6, "-6", "true", "null", "[]", "NaN", "1" + "0" * 5000]
ENCODED = [*itertools.product(["rows", "total"], ROWS)]


@pytest.mark.parametrize(("key", "value"), [("rows", "6"), *ENCODED], ids=lambda x: x[:9])
def test_a_manifest_of_encoded_data_with_other_rows_is_refused(tmp_path, key, value):
    part = tmp_path / "train" / "00000-of-00001"
    part.mkdir(parents=True)
    np.save(part / "x0.npy", ARRAYS["x0"])
    (part / "manifest.json").write_text(json.dumps({"rows": 6, "total": 6}).replace(f'"{key}": 6', f'"{key}": {value}'))
    refusal = pytest.raises(ValueError, match=r"00000-of-00001") if value != "6" else contextlib.nullcontext()
    with refusal:
        data.load(data.configure(source="arrays", path=str(tmp_path)))


@pytest.mark.parametrize("name", ["00000-of-99999999999", "00001-of-00001", "00000-of-00000", "0-of-1", "00000-of-2"])
def test_parts_that_are_incomplete_or_misnamed_are_refused(tmp_path, name):
    (tmp_path / "train" / name).mkdir(parents=True)
    np.save(tmp_path / "train" / name / "x0.npy", ARRAYS["x0"])
    with pytest.raises(ValueError, match=r"train holds 1 of \d+ parts"):
        data.load(data.configure(source="arrays", path=str(tmp_path)))


PAIRS = {
    "format": 1, "rows": 6, "shard": 2, "seed": 0, "x0": [8, 8, 3], "teacher": "emoji", "weights": "0", "lora": "",
    "lora_scale": 1.0, "made_by": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [*((key, value) for key in ("rows", "shard") for value in (*ROWS, "0")), ("seed", "-1"),
     ("seed", "0.5"), ("x0", "8"), ("x0", "[8, 8]"), ("x0", "[8, 8.0, 3]"), ("x0", '["8", 8, 3]'), ("x0", "[8, 8, 0]"),
     ("format", '"1"'), ("teacher", "null"), ("lora_scale", '"1"'), ("format", "null"), ("format", "true"),
     ("weights", "3"), ("seed", DEEP)],
    ids=lambda x: x[:9],
)  # fmt: skip
def test_a_manifest_of_pairs_with_other_values_is_refused(tmp_path, key, value):
    text = json.dumps(PAIRS).replace(f'"{key}": {json.dumps(PAIRS[key])}', f'"{key}": {value}')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.manifest.json (has|is) .{{,300}}$"):
        ode_pairs.OdePairs(tmp_path)


def test_pairs_of_a_billion_files_are_not_counted_one_by_one(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(PAIRS | {"rows": 2**31 - 1, "shard": 1}))
    with pytest.raises(ValueError, match="lacks null.safetensors, 00000000.safetensors and others of 2147483648 files"):
        ode_pairs.OdePairs(tmp_path)


GOOD = [{"step": 10, "student/loss": 0.5}, {"step": 20, "student/loss": None}]
LINES = [
    b'{"step": 15, "student/loss": "\xff"}', b'{"step": -Infinity, "student/loss": 1}', b'{"step": NaN}', b"null", b"5",
    b'{"step": "15"}', b'{"step": 1e1}', b'{"step": true}', b'{"step": -3}', b"[]", b'{"loss": 1}', DEEP.encode(),
    b'{"step": 1' + b"0" * 5000 + b"}", b'{"step": 99999999999999999999999}', b"\0\0\0", b'{"step": 12, "stu',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda x: repr(x[:20]))
def test_a_line_of_metrics_that_is_no_record_does_not_keep_a_run_from_going_on(tmp_path, line, caplog):
    path = tmp_path / "metrics.jsonl"
    first, second = (json.dumps(record).encode() for record in GOOD)
    path.write_bytes(b"\n".join([first, line, second, b""]))
    assert health.read(path) == GOOD
    log.HealthWriter(tmp_path, None, health.frozen("student"), first_step=20)
    log.JsonlWriter(tmp_path, first_step=20).close()
    assert path.read_bytes() == b"\n".join([first, second, b""])
    assert f"{path} has 1 damaged lines, which are left out" in caplog.text


def test_metrics_that_are_no_numbers_are_none():
    line = b'{"step": 10, "a": -Infinity, "b": NaN, "c": "1", "d": [1], "e": true, "f": 1e999, "g": 7, "h": 1'
    assert health.record(line + b"0" * 400 + b"}") == {"step": 10} | dict.fromkeys("abcdefh") | {"g": 7}


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "3", '"a"', "", "{", DEEP, '{"a": NaN', '{"method": null}', '{"method": []}',
     '{"method": {"name": []}}',
     '{"method": {"name": "codi"}, "data": null}', '{"method": 1, "optim": [], "teacher": null}'],
    ids=lambda x: x[:20] or "nothing",
)  # fmt: skip
def test_a_recorded_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*$"):
        checkpoint.check_config(tmp_path, defaults("codi"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.config.json .{{,300}}$"):
        api.load(tmp_path)


WRONG_INPUTS = [
    "null",
    "{}",
    '{"paths": [], "weights": {}, "data": {}}',
    '{"paths": {"a": 3}, "weights": {}, "data": {}}',
]


@pytest.mark.parametrize("text", [*WRONG_INPUTS, DEEP], ids=lambda x: x[:20])
def test_recorded_inputs_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(ValueError, match=r"inputs\.json .*: delete it"):
        train.read_inputs(tmp_path)


@pytest.mark.parametrize("text", ["null", '{"a": 1}', '{"a": {"n": "4", "metrics": {}}}', '{"a": {"n": 4}}'])
def test_scores_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=r"scores\.json .*: delete it, and evaluate again"):
        compare.read_scores(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", npz(np.array([{}])), npz(np.float32(1)), npz(np.zeros(3))[:60]])
def test_a_kept_example_that_is_damaged_is_refused(tmp_path, content):
    (tmp_path / "example.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"example\.npz is damaged"):
        checkpoint.ExampleItems(str(tmp_path / "example.npz"))


@pytest.mark.parametrize(
    "text",
    ['"\\ud800"', "[1]", "{}", DEEP, '["a", null]', "NaN"],
    ids=lambda x: x[:12],
)
def test_captions_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=r"captions\.json is not a list of texts"):
        arrays.read_captions(tmp_path / "captions.json")


@pytest.mark.parametrize("label", ["true", "[1]", "{}", "1.5", "-1", "Infinity", "1" + "0" * 5000])
def test_a_label_in_metadata_that_is_none_is_refused_with_its_line(tmp_path, label):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "label": {label}}}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*metadata\.jsonl"):
        data.load(data.configure(source="folder", path=str(tmp_path), size=8))


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        *(({"label": x}, {}, "label") for x in (NAN, np.array([NAN]), [1.5], "3", 2**40, np.ones(2, complex), True)),
        ({}, {"n": 0}, "n=0 must be at least 1"),
        ({}, {"steps": -1}, "steps=-1 must be at least 1"),
        ({}, {"steps": 10**9}, "steps=1000000000 must be at least 1 and at most 10000"),
        ({}, {"seed": -1}, "seed=-1 must be at least 0"),
        ({}, {"guidance": NAN}, "guidance=nan must be a finite number"),
        ({}, {"image_guidance": -1.0}, "image_guidance=-1.0 must be at least 0"),
    ],
)
def test_arguments_of_sample_that_are_none_are_refused(given, options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        api.sample_each(emoji(), given, **{"n": None, "steps": None} | options)


@functools.cache
def emoji():
    """The embedded teacher."""
    return api.load("emoji")
