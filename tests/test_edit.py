"""Editing by instruction: scenes and icons before and after, and the regions that are scored."""

import jax
import numpy as np
import pytest

from cddistill import data
from cddistill.data.tasks.edit import Editing
from cddistill.methods import METHODS
from cddistill.net import Autoencoder

SOURCES = {"scenes": 24, "icon_edits": 9}


@pytest.mark.parametrize("source", SOURCES)
def test_the_condition_is_the_image_before_and_the_target_the_one_after(source):
    config = data.configure(source=source, task="edit", size=32, num_classes=SOURCES[source])
    batch, element = data.examples(config, "test", 4), data.load(config, "test").source.element(0, None)
    np.testing.assert_allclose(batch["cond"][0] * 255, element["image"], atol=1e-3)
    np.testing.assert_allclose((batch["x0"][0] + 1) * 127.5, element["edited"], atol=1e-3)
    assert batch["caption"][0] == element["instruction"]
    assert (np.abs(element["image"].astype(int) - element["edited"]) > 4).any()


def test_instructions_of_icons_are_what_happens():
    source = data.load(data.configure(source="icon_edits", task="edit", size=64), "train").source
    kinds = {source.element(i, None)["instruction"] for i in range(0, len(source), 50)}
    assert {f"redraw it in {style} style" for style in ("noto", "twemoji", "flat", "fluent")} < kinds
    assert any(kind.startswith("make the skin tone ") for kind in kinds)
    rng = np.random.default_rng(0)
    i = next(i for i in range(len(source)) if source.elements[i].before is source.elements[i].after)
    seen = {source.element(i, rng)["instruction"] for _ in range(40)}
    assert "make the skin tone dark" in seen
    assert len(seen) > 2
    redrawn = next(e for e in source.elements if e.before is not e.after)
    assert redrawn.instruction == f"redraw it in {next(iter(redrawn.after.values()))[0]} style"


def test_splits_of_edits_follow_the_icons():
    """A name that is held out as an icon is never seen in an edit."""
    names = lambda source, split, of: {of(x) for x in data.load(data.configure(source=source), split).source.elements}
    pictures = names("icons", "test", lambda variants: variants[0])
    edits = names("icon_edits", "test", lambda edit: next(iter(edit.before.values())))
    assert edits <= pictures


def test_a_mixture_keeps_what_all_of_its_sources_have():
    options = {"source": "mixture", "size": 16, "num_classes": 33}
    edits = data.configure(task="edit", mixture=("icon_edits", "scenes"), **options)
    assert data.examples(edits, "test", 2)["cond"].shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="data.task edit needs an edited image for every image"):
        data.examples(data.configure(task="edit", **options), "test", 2)


def test_regions_are_what_changed_and_the_rest():
    cond = np.full((1, 8, 8, 3), 0.5, np.float32)
    truth = cond.copy()
    truth[0, 2:4, 2:4, 1] += 0.1
    truth[0, 6, 6] += 1 / 255  # invisible
    found = Editing().regions(cond, truth)
    assert found["in the changed region"].sum() == 4
    np.testing.assert_array_equal(found["outside of it"], 1 - found["in the changed region"])


def test_latents_of_the_condition_are_not_scaled():
    x = {"x0": np.zeros((1, 16, 16, 3), np.float32)}
    vae = METHODS["autoencoder"](channels=(8, 8)).init(jax.random.key(0), {"autoencoder": Autoencoder()}, x)["vae"]
    scaled = vae.replace(encoder=type(vae.encoder)(vae.encoder.module.clone(scaling_factor=0.5)))
    cond = np.random.default_rng(0).random((1, 16, 16, 3), np.float32)
    np.testing.assert_allclose(Editing().encode(scaled, cond), Editing().encode(vae, cond), rtol=1e-5)
