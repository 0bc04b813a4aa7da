"""The embedded icons, and scenes beside them: captions, splits by concept, masks, held-out combinations, mixtures."""

import collections
import shutil

import numpy as np
import pytest

from cddistill import data
from cddistill.data import configure, splits
from cddistill.data.sources import emoji, icons, scenes
from cddistill.data.sources.make_icon_pack import concepts, parse


@pytest.fixture(scope="module")
def opened():
    """{split: IconImages}."""
    return {split: data.load(configure(source="icons", size=64), split).source for split in splits.SPLITS}


def rows():
    return [row for style in icons.pack()[0].values() for row in style]


def test_the_pack_holds_every_drawing():
    styles, labels = icons.pack()
    assert {style: len(of) for style, of in styles.items()} == {
        "fluent": 3174, "flat": 3174, "noto": 3819, "twemoji": 4169, "emojione": 1834,
    }  # fmt: skip
    assert len(labels) == 9
    for style, of in styles.items():
        images = icons.pictures(style)[: len(of)]
        assert images.shape[1:] == (64, 64, 3)
        assert images[:50].std((1, 2, 3)).min() > 3  # none is empty


def test_a_concept_is_in_one_split_in_every_style(opened):
    found = {
        split: {icons.pack()[0][style][row]["concept"] for element in source.elements for style, row in element}
        for split, source in opened.items()
    }
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert sum(map(len, found.values())) == len({row["concept"] for row in rows()}) == 1975
    names = collections.defaultdict(set)
    for row in rows():
        names[row["name"]].add(row["concept"])
    assert max(map(len, names.values())) == 1  # the same name never means two concepts


def test_elements_are_names_in_a_style_and_skin_tones_are_drawn(opened):
    assert {split: len(source) for split, source in opened.items()} == {"train": 6661, "validation": 830, "test": 815}
    source = opened["train"]
    i = next(i for i, element in enumerate(source.elements) if len(element) == 6)
    rng = np.random.default_rng(0)
    captions = {source.element(i, rng)["caption"] for _ in range(60)}
    assert len(captions) == 6
    plain = source.element(i, None)["caption"]
    assert plain in captions
    assert sum("skin tone" in caption for caption in captions) == 5
    firsts = [source.elements[i][0] for i in range(100)]
    assert len({icons.pack()[0][style][row]["concept"] for style, row in firsts}) == 100
    assert len({style for style, _ in firsts}) == 5


def test_captions_are_words():
    record = {"name": "red-apple", "style": "noto", "tone": ""}
    assert icons.caption(record) == "red apple, noto style"
    record = {"name": "people-holding-hands", "style": "fluent", "tone": "medium-dark+light"}
    assert icons.caption(record) == "people holding hands, medium dark skin tone, light skin tone, fluent style"


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("boy-medium-dark-skin-tone", (), ("boy", ["medium-dark"])),
        ("kiss-person-person-dark-skin-tone-light-skin-tone", (), ("kiss-person-person", ["dark", "light"])),
        ("mermaid-tone2", (), ("mermaid", ["medium-light"])),
        ("artist-medium-light", [f"artist-{tone}" for tone in emoji.TONES], ("artist", ["medium-light"])),
        ("flashlight-light", ["flashlight-light", "flashlight"], ("flashlight-light", [])),
        ("flag-for-flag-peru", (), ("flag-peru", [])),
    ],
)
def test_skin_tones_are_written_in_four_ways(name, names, expected):
    assert parse(name, names) == expected


def test_aliases_and_code_points_join_names():
    """A mirrored alias is another drawing."""
    a = {"icons": {"icons": {"bear-face": 0, "left": 0}, "aliases": {"bear": {"parent": "bear-face"},
         "right": {"parent": "left", "hFlip": True}}}, "chars": {"1f43b": "bear-face"}}  # fmt: skip
    b = {"icons": {"icons": {"bear": 0, "right": 0, "brown-bear": 0}}, "chars": {"1f43b-fe0f": "brown-bear"}}
    found = concepts({"a": a, "b": b})
    assert found["bear"] == found["bear-face"] == found["brown-bear"]
    assert found["left"] != found["right"]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_pack_is_named(damage, tmp_path, monkeypatch):
    broken = tmp_path / "icons_flat.webp"
    if damage == "truncated":
        broken.write_bytes((icons.ASSETS / "icons_flat.webp").read_bytes()[:5000])
    shutil.copy(icons.ASSETS / "icons.csv", tmp_path)
    monkeypatch.setattr(icons, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"icons_flat.webp is part of this package .* reinstall cddistill"):
        icons.pictures.__wrapped__("flat")


def test_larger_icons_are_refused():
    with pytest.raises(ValueError, match="icons are 64 px; data.size must be at most that, not 128"):
        data.load(configure(source="icons", size=128))


# --- scenes


def test_training_scenes_have_no_held_out_combination():
    def combinations(training):
        for i in range(150):
            scene = scenes.scene.__wrapped__((0, i), 8, training)
            for text in (*scene["caption"].split(" and "), scene["instruction"]):
                words = text.split()
                yield from {(c, s) for c, s in scenes.HELD_OUT if f"{c} {s}" in text}
                if words[0] == "make":  # the red ball blue
                    yield from {(words[-1], words[3])} & scenes.HELD_OUT
                if words[0] == "turn":  # the red ball into a cube
                    yield from {(words[2], words[-1])} & scenes.HELD_OUT

    assert not list(combinations(training=True))
    assert set(combinations(training=False)) == scenes.HELD_OUT
    train = data.load(configure(source="scenes", size=8, num_classes=24), "train", augment=False)
    assert train.item(3, np.random.default_rng(0))["caption"] == scenes.scene((0, 3), 8, True)["caption"]


def test_masks_say_where_each_solid_of_the_caption_is():
    """The colour under the mask is nearer to the named colour than to any other, for every solid of ten scenes."""
    found = 0
    for i in range(10):
        scene = scenes.scene((2, i), 64)
        for k, text in enumerate(scene["caption"].split(" and "), 1):
            pixels = scene["image"][scene["mask"] == k]
            if len(pixels) < 40:  # hidden by another
                continue
            lit = pixels[pixels.sum(1) >= np.quantile(pixels.sum(1), 0.5)].mean(0) / 255
            angle = {
                name: lit @ np.array(rgb) / np.linalg.norm(lit) / np.linalg.norm(rgb)
                for name, rgb in scenes.COLOURS.items()
            }
            best = sorted(angle, key=angle.get)[-2:]
            assert text.split()[2] in best
            found += 1
        assert (scene["mask"] == 0).mean() > 0.5
    assert found > 12


# --- mixtures


def test_a_mixture_has_every_example_of_its_sources():
    config = configure(source="mixture", size=8, num_classes=33)
    mixed = data.load(config, "test")
    assert len(mixed) == 815 + 1000
    first = [mixed.source.elements[i][0] for i in range(400)]
    assert 100 < first.count("icons") < 260
    i = first.index("scenes")
    row = mixed.source.elements[i][1]
    expected = data.load(configure(source="scenes", size=8, num_classes=24), "test").source.element(row, None)
    assert mixed.source.element(i, None)["label"] == expected["label"] + 9
    assert mixed.source.element(i, None)["caption"] == expected["caption"]


@pytest.mark.parametrize(
    ("mixture", "sentence"),
    [
        (("icons", "arrays"), "data.mixture has 'arrays': it may have emoji, icons, icon_edits, scenes"),
        ((), "data.mixture=.* must be at least one value"),
    ],
)
def test_a_wrong_mixture_is_refused(mixture, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.load(configure(source="mixture", mixture=mixture))
