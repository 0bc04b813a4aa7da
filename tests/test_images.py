"""Image files as cameras, editors and archives write them: one 8-bit RGB picture, or an error that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cddistill.data import configure, images, load

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]], np.uint8)
SIX = Image.fromarray(COLOURS.repeat(16, 0).repeat(16, 1))  # six squares of 16 px, in two rows


def pixels(content, name="a.png"):
    """The pixels of an encoded image."""
    return np.asarray(images.read(io.BytesIO(content), name))


def encoded(image, kind, **options):
    """An image as the bytes of a file."""
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def png(depth, colour, row, transparent=b"", palette=b""):
    """A PNG file with one row of pixels, of any bit depth. https://www.w3.org/TR/png-3"""
    width = len(row) * 8 // depth // {0: 1, 2: 3, 3: 1}[colour]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))]
    chunks += [(b"PLTE", palette)] * bool(palette) + [(b"tRNS", transparent)] * bool(transparent)
    chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif(*tags, order="<"):
    """EXIF of (tag, type, count, four bytes) each."""
    body = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, len(tags)) + body + bytes(4)


TURNED = (0x112, 3, 1, b"\6\0\0\0")  # orientation 6: to be turned clockwise by 90 degrees


# --- EXIF


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("value", TURNS)
@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_images_are_turned_upright(kind, value):
    tags = Image.Exif()
    tags[0x112] = value
    found = pixels(encoded(SIX, kind, exif=tags, **({"lossless": True} if kind == "webp" else {})))
    np.testing.assert_array_equal(found, TURNS[value](np.asarray(SIX)))


@pytest.mark.parametrize(
    "odd",
    [
        (0x11A, 2, 4, b"72\0\0"),  # XResolution as text
        (0x11A, 5, 1, b"\xff\xff\xff\x7f"),  # beyond the end
        (0x128, 7, 4, b"\xff\xff\xff\xff"),  # ResolutionUnit as bytes
        (0x9999, 99, 7, b"abcd"),  # a type that does not exist
        (0x8769, 4, 1, b"\x08\0\0\0"),  # the EXIF folder is this one again
        (0x8825, 2, 4, b"GPS\0"),  # GPS as text
        (0x132, 2, 0, b"\0\0\0\0"),  # an empty date
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_odd_exif_tags_neither_refuse_nor_turn_otherwise(kind, odd):
    content = encoded(SIX, kind, exif=exif(TURNED, odd), quality=100)
    assert pixels(content).shape == (48, 32, 3)
    assert abs(pixels(content)[8, 24].astype(int) - (255, 0, 0)).max() < 20  # the first square is at the right


@pytest.mark.parametrize(
    "broken",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        exif(TURNED)[:-9],
        exif((0x112, 2, 4, b"six\0")),
        exif((0x112, 5, 1, b"\0\0\0\0")),
        exif((0x112, 3, 1, b"\x63\0\0\0")),
        exif(TURNED)[:10] + b"\xff\xff\xff\xff",
        exif(TURNED).replace(b"II*", b"XX*"),
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_broken_exif_is_ignored(kind, broken):
    assert pixels(encoded(SIX, kind, exif=broken, quality=90)).shape == (32, 48, 3)


# --- transparency


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(1, 0, b"\xf0", struct.pack(">H", 1)), [255] * 4 + [0] * 4),
        (png(1, 0, b"\xf0", struct.pack(">H", 0)), [255] * 8),
        (png(1, 0, b"\xf0"), [255] * 4 + [0] * 4),
        (png(2, 0, b"\x1b", struct.pack(">H", 1)), [0, 255, 170, 255]),
        (png(4, 0, b"\x1f", struct.pack(">H", 1)), [255, 255]),
        (png(4, 0, b"\x1f", struct.pack(">H", 15)), [17, 255]),
        (png(8, 0, b"\x07\xf1", struct.pack(">H", 7)), [255, 241]),
        (png(16, 0, b"\x12\x34\x12\x35", struct.pack(">H", 0x1234)), [255, 0x12]),
        (png(8, 2, b"\1\2\3\4\5\6", struct.pack(">HHH", 4, 5, 6)), [(1, 2, 3), (255, 255, 255)]),
        (png(16, 2, b"\1\1\2\2\3\3\4\4\5\5\6\6", struct.pack(">HHH", 0x101, 0x202, 0x303)), [(255,) * 3, (4, 5, 6)]),
        (png(8, 3, b"\0\1\1", b"\0\x80", b"\xff\0\0\0\0\0"), [(255,) * 3, (127,) * 3, (127,) * 3]),
        (png(1, 3, b"\xf0", b"\0", b"\xff\0\0\0\xff\0"), [(0, 255, 0)] * 4 + [(255,) * 3] * 4),
        (png(4, 3, b"\x01", b"\0", b"\xff\0\0\0\xff\0"), [(255,) * 3, (0, 255, 0)]),
    ],
)
def test_transparent_colours_of_png_become_white(content, expected):
    expected = [(x,) * 3 if isinstance(x, int) else x for x in expected]
    assert pixels(content).tolist() == [[list(x) for x in expected]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "PA"])
def test_alpha_is_composited_on_white(mode):
    clear, solid = (Image.new("RGBA", (4, 4), (0, 0, 0, a)).convert("LA") for a in (0, 255))
    steps = {"LA": ["LA"], "PA": ["RGBA", "PA"]}.get(mode, ["RGBA", mode])
    for step in steps:
        clear, solid = clear.convert(step), solid.convert(step)
    assert (np.asarray(images.to_rgb(clear, "a")) == 255).all()
    assert (np.asarray(images.to_rgb(solid, "a")) == 0).all()


def test_a_picture_given_is_not_changed():
    given = Image.new("RGB", (4, 4), (255, 0, 0))
    given.info["transparency"] = (255, 0, 0)
    assert (np.asarray(images.read(given)) == 255).all()
    assert given.info["transparency"] == given.getpixel((0, 0)) == (255, 0, 0)


# --- modes


def test_cmyk_is_converted_as_pillow_does():
    content = encoded(SIX.convert("CMYK"), "jpeg", quality=100, subsampling=0)
    assert abs(pixels(content).astype(int) - np.asarray(SIX)).max() < 10


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_grey_keeps_its_upper_bits(kind):
    deep = np.array([[0, 255, 256, 0x1280, 65535]], np.uint16)
    assert pixels(encoded(Image.fromarray(deep), kind))[..., 0].tolist() == [[0, 0, 1, 0x12, 255]]
    assert np.asarray(images.read(Image.fromarray(deep.astype(np.int32))))[..., 0].tolist() == [[0, 0, 1, 0x12, 255]]


def test_16_bit_colour_keeps_its_upper_bits():
    assert pixels(png(16, 2, b"\x12\xff\x34\0\xff\xff")).tolist() == [[[0x12, 0x34, 0xFF]]]


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (Image.new("F", (2, 2), 0.5), r"x.tiff has 1 channel\(s\) of mode F; convert it to 8-bit grey or RGB"),
        (Image.new("LAB", (2, 2)), r"x.tiff has 3 channel\(s\) of mode LAB; convert it"),
        (Image.new("I", (2, 2), 65536), "x.tiff has values 65536 to 65536; convert it"),
        (Image.new("I", (2, 2), -1), "x.tiff has values -1 to -1; convert it"),
    ],
)
def test_values_of_unknown_scale_are_refused(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        pixels(encoded(image, "tiff"), "x.tiff")


@pytest.mark.parametrize("suffix", images.SUFFIXES)
def test_every_suffix_is_read(tmp_path, suffix):
    (tmp_path / "train").mkdir()
    SIX.save(tmp_path / f"train/a{suffix.upper()}", Image.registered_extensions()[suffix])
    dataset = load(configure(source="folder", path=str(tmp_path), size=32), "train", augment=False)
    assert abs(dataset.source.element(0, None)["image"].astype(int)[4, 4] - (255, 0, 0)).max() < 20


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert (pixels(content) == (255, 0, 0)).all()


def test_whatever_pillow_raises_names_the_file(monkeypatch):
    errors = [
        KeyError("x"),
        struct.error("y"),
        ZeroDivisionError(),
        MemoryError(),
        NotImplementedError("z"),
        EOFError(),
    ]
    for error in errors:
        monkeypatch.setattr(Image, "open", lambda path, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match=r"a.png cannot be read \(.+\)"):
            images.read("sub/a.png")


def test_a_damaged_picture_given_is_an_error_of_one_sentence():
    content = encoded(SIX, "png")
    with pytest.raises(ValueError, match="the image cannot be read"):
        images.read(Image.open(io.BytesIO(content[:-40])))


# --- sizes


def test_crop_is_central_and_keeps_the_aspect():
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 255
    fitted = images.fit(Image.fromarray(stripes), 10)
    assert (fitted[:, 2:8] > 240).all()  # the white third, with blurred edges


@pytest.mark.parametrize(("width", "height"), [(2, 16000), (16000, 2), (1, 60000)])
def test_thin_images_need_no_room_for_what_is_cropped(monkeypatch, width, height):
    ramp = np.abs(np.arange(max(width, height)) - max(width, height) / 2 + 0.5) < 1
    stripe = np.broadcast_to(ramp[:, None] if height > width else ramp[None], (height, width))
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    fitted = images.fit(Image.fromarray(np.uint8(stripe * 255)).convert("RGB"), 256)
    assert fitted.shape == (256, 256, 3)
    assert sizes == [(256, 256)]
    assert (fitted[128, 128] > 240).all()  # the middle is white in all of these


@pytest.mark.parametrize(("width", "height"), [(40, 30), (333, 100), (17, 90)])
def test_the_cropped_square_equals_the_one_of_the_whole_image(monkeypatch, width, height):
    y, x = np.mgrid[:height, :width]
    smooth = Image.fromarray(np.uint8(127 + 120 * np.sin(x / 9) * np.cos(y / 7))).convert("RGB")
    whole = images.fit(smooth, 32).astype(int)
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    assert abs(images.fit(smooth, 32) - whole).max() <= 1


def test_usual_sizes_are_resized_as_a_whole():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8))
    whole = np.asarray(noise.resize((43, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(images.fit(noise, 32), whole[:, 5:37])
