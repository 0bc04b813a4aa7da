"""Checksums: each bit counts, however an array is divided; files of the package are compared when they are used."""

import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cddistill as package
from cddistill import checksums
from cddistill.data.sources.emoji import ASSETS as sheets
from cddistill.models import folders

DTYPES = ("f4", "f2", ml_dtypes.bfloat16, "f8", "i4", "i8", "u1", "?", "c8", "c16")


def of(x) -> int:
    return checksums.host_sums({"x": checksums.blocks(x)})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 3, 5)])
def test_every_bit_of_every_element_counts(dtype, shape):
    x = np.random.default_rng(0).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    seen = {of(x.view(dtype).reshape(shape))}
    for i in range(x.size):
        changed = x.copy()
        changed.reshape(-1)[i] ^= 1 << (0 if dtype == "?" else i % 8)
        seen.add(of(changed.view(dtype).reshape(shape)))
    assert len(seen) == x.size + 1


def test_the_sum_of_a_small_array_is_what_the_docstring_says():
    x = np.array([[1.5, -0.0, 3.0], [4.0, np.nan, 6.0]], np.float32)
    bits, expected = x.view("u4"), 0
    for i in range(2):
        for j in range(3):
            expected += int(bits[i, j]) * int(checksums.weights(0, i, 1)[0]) * int(checksums.weights(1, j, 1)[0])
    assert of(x) == expected % 2**64
    assert all(int(w) % 2 for w in checksums.weights(3, 5, 100))


@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b")), P(None, None, "a")])
def test_the_sum_does_not_depend_on_sharding(spec):
    x = np.random.default_rng(0).normal(size=(8, 16, 4)).astype("f4")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    assert of(jax.device_put(x, NamedSharding(mesh, spec))) == of(x)
    assert of(jnp.asarray(x[::-1])) != of(x)
    assert of(x.transpose(1, 0, 2)) != of(x)


def test_arrays_and_rows_have_the_crc_of_their_bytes(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f2")
    (tmp_path / "x").write_bytes(x.tobytes())
    crc = f"{zlib.crc32(x.tobytes()):08x}"
    assert checksums.crc32(x) == checksums.crc32_file(tmp_path / "x") == crc
    assert checksums.crc32_rows(x).tolist() == [zlib.crc32(row.tobytes()) for row in x]


def test_every_file_of_the_package_has_its_checksum():
    for folder in (sheets, *sorted(p for p in folders.ASSETS.iterdir() if p.is_dir())):
        listed = json.loads((folder / checksums.DIGESTS).read_text())
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in checksums.SHIPPED}
        assert {*listed, checksums.DIGESTS} == there, folder
        checksums.check_shipped(folder)


def test_a_flipped_bit_in_shipped_weights_is_named(tmp_path, monkeypatch):
    shutil.copytree(folders.ASSETS / "emoji", tmp_path / "emoji")
    monkeypatch.setattr(folders, "ASSETS", tmp_path)
    weights = tmp_path / "emoji" / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for name in ("emoji", tmp_path / "emoji", weights.parent):
        with pytest.raises(
            ValueError, match=r"safetensors is part of this package and damaged .*: reinstall cddistill$"
        ):
            package.load(str(name))


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"x.csv": "00000000"}', "x.csv is part of this package and damaged"), ('{"y.csv": ""}', "y.csv .* missing"),
     ("{", "digests.json is part of this package and damaged"), ("[1]", "digests.json .* damaged")],
)  # fmt: skip
def test_damage_of_shipped_data_is_named(tmp_path, content, said):
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "digests.json").write_text(content)
    with pytest.raises(ValueError, match=f"{said}.*reinstall cddistill"):
        checksums.check_shipped(tmp_path)
    checksums.check_shipped(tmp_path.parent)  # none: a folder of one's own
