"""Prompts: equal to the text inputs that diffusers' pipelines pass to their UNets."""

import functools
import json
import unicodedata
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_clip as golden
from test_clip import RECORDED, recorded_net
from tokenizers import pre_tokenizers

from cddistill import models
from cddistill.models import tokenizer
from cddistill.models.families import FAMILIES
from cddistill.models.prompt import Prompts, load_prompts, time_ids
from cddistill.net import Net


def assert_close(ours, theirs):
    """1e-5 of the largest value: sums in another order give 1e-6."""
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


class Lookup:
    """A tokenizer that knows the recorded prompts."""

    model_max_length = golden.LENGTH

    def __init__(self, ids):
        self.ids = dict(zip(golden.PROMPTS, ids, strict=True))

    def __call__(self, texts, padding, max_length, truncation):
        assert (padding, max_length, truncation) == ("max_length", golden.LENGTH, True)
        return {"input_ids": [self.ids[text] for text in texts]}


@functools.cache
def recorded_prompts(name: str, zero_null: bool = False) -> Prompts:
    """The prompts of a recorded pipeline; its tokenizers know only those that were recorded."""
    encoders = golden.PIPELINES[name]
    tokenizers = tuple(Lookup(RECORDED[f"{name}/ids{suffix}"]) for suffix in ("", "_2")[: len(encoders)])
    family = FAMILIES["sd" if len(encoders) == 1 else "sdxl"]
    return Prompts(tokenizers, tuple(map(recorded_net, encoders)), zero_null, family)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_text_and_null_equal_diffusers(name, parity):
    prompts, n = recorded_prompts(name), len(golden.PROMPTS)
    for text, recorded in (
        (prompts(golden.PROMPTS, **golden.SIZES), "text"),
        (prompts.null(n, **golden.SIZES), "null"),
    ):
        assert {*text} == {"encoder_hidden_states"}
        assert text["encoder_hidden_states"].dtype == jnp.float32
        parity(f"Prompts of {name}", "output", text["encoder_hidden_states"], RECORDED[f"{name}/{recorded}"])


def test_text_and_null_of_sdxl_equal_diffusers(parity):
    prompts, n = recorded_prompts("sdxl"), len(golden.PROMPTS)
    sizes = np.tile(RECORDED["sdxl/time_ids"], (n, 1))
    text, null = prompts(golden.PROMPTS, **golden.SIZES), prompts.null(n, **golden.SIZES)
    for ours, hidden, pooled in ((text, "text", "pooled"), (null, "null", "pooled_null")):
        parity("Prompts of sdxl", "output", ours["encoder_hidden_states"], RECORDED[f"sdxl/{hidden}"])
        parity("Prompts of sdxl", "output", ours["added_cond_kwargs"]["text_embeds"], RECORDED[f"sdxl/{pooled}"])
        np.testing.assert_array_equal(ours["added_cond_kwargs"]["time_ids"], sizes)
    zeros = recorded_prompts("sdxl", zero_null=True).null(n, **golden.SIZES)
    assert zeros["encoder_hidden_states"].shape == text["encoder_hidden_states"].shape
    assert not zeros["encoder_hidden_states"].any()
    assert not zeros["added_cond_kwargs"]["text_embeds"].any()
    np.testing.assert_array_equal(zeros["added_cond_kwargs"]["time_ids"], sizes)  # sizes are kept


def test_sizes_are_one_pair_or_one_per_text():
    np.testing.assert_array_equal(time_ids(2, (512, 640)), [[512, 640, 0, 0, 512, 640]] * 2)
    originals = np.array([[300, 400], [900, 800]])
    expected = [[300, 400, 8, 0, 256, 256], [900, 800, 8, 0, 256, 256]]
    np.testing.assert_array_equal(time_ids(2, (256, 256), originals, crop=(8, 0)), expected)
    with pytest.raises(ValueError, match=r"crop must be one pair or one for each of 3 texts, not of shape \(2, 2\)"):
        time_ids(3, crop=np.zeros((2, 2)))


@pytest.mark.parametrize("texts", ["a cat", [], [b"dog!"]])
def test_prompts_must_be_a_list_of_strings(texts):
    with pytest.raises(ValueError, match="prompts are a list of at least one string"):
        recorded_prompts("sd15")(texts)


def test_a_tokenizer_of_another_model_is_refused():
    net = recorded_net("clip_l")
    prompts = Prompts((Lookup(RECORDED["sd15/ids"] + 40),), (net,))
    with pytest.raises(ValueError, match="gives id 101 but the text encoder has vocab_size = 62"):
        prompts(["dog!"])


@pytest.fixture
def folder(tmp_path):
    """An SDXL pipeline's folder without its weights."""
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": False,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for suffix, encoder in zip(("", "_2"), golden.PIPELINES["sdxl"], strict=True):
        golden.write_tokenizer(tmp_path / f"tokenizer{suffix}", golden.PADS[encoder])
    return tmp_path


def change_index(folder, **change):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.fixture
def encoders(monkeypatch):
    """Makes `models.load` return the recorded encoders; a list of its calls."""
    asked, names = [], dict(zip(("text_encoder", "text_encoder_2"), golden.PIPELINES["sdxl"], strict=True))
    monkeypatch.setattr(models, "load", lambda *x, dtype, **_: asked.append((*x, dtype)) or recorded_net(names[x[1]]))
    return asked


def test_prompts_load_from_a_pipelines_folder(folder, encoders):
    prompts = load_prompts(folder, dtype=jnp.bfloat16)
    assert encoders == [(folder, "text_encoder", jnp.bfloat16), (folder, "text_encoder_2", jnp.bfloat16)]
    for ids, suffix in zip(prompts.tokenize(golden.PROMPTS), ("", "_2"), strict=True):
        np.testing.assert_array_equal(ids, RECORDED[f"sdxl/ids{suffix}"])
    assert_close(prompts(golden.PROMPTS)["encoder_hidden_states"], RECORDED["sdxl/text"])
    assert_close(prompts.null(4)["encoder_hidden_states"], RECORDED["sdxl/null"])
    change_index(folder, force_zeros_for_empty_prompt=True)
    assert load_prompts(folder).zero_null
    change_index(folder, text_encoder_2=[None, None])
    prompts = load_prompts(folder)
    assert (len(prompts.nets), prompts.zero_null) == (1, False)
    np.testing.assert_array_equal(prompts.tokenize(golden.PROMPTS)[0], RECORDED["sd15/ids"])


def test_incomplete_and_unsupported_folders_are_refused(folder, encoders):
    (folder / "tokenizer_2" / "merges.txt").unlink()
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(ValueError, match="tokenizer holds neither vocab.json with merges.txt nor tokenizer.json"):
        load_prompts(folder)
    change_index(folder, text_encoder_3=["transformers", "T5EncoderModel"])
    with pytest.raises(ValueError, match="'text_encoder_3'.; supported are .'text_encoder'. and"):
        load_prompts(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"model_index.json is missing"):
        load_prompts(folder)


# ---- texts as people type them


@pytest.fixture
def every_byte():
    """Prompts of a tokenizer whose vocabulary is the 256 bytes, alone and at the end of a word, without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{x}</w>" for x in letters), tokenizer.START, tokenizer.END]
    bpe = tokenizer.clip({token: i for i, token in enumerate(tokens)}, [])
    ours = tokenizer.ClipTokenizer(bpe, len(tokens) - 1, golden.LENGTH)
    encoder = lambda params: None
    encoder.module = SimpleNamespace(max_position_embeddings=golden.LENGTH, vocab_size=len(tokens))
    return Prompts((ours,), (Net(None, encoder),))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "zyzzyva",
        "a\nb\r\n",
        "\N{SNAKE}",
        "e\u0301",
        "a\0b",
        "\ufeffa",
        "\u2028",
        "日本",
        "\N{ZERO WIDTH JOINER}",
    ],
)
def test_any_text_is_a_prompt_whose_unknown_words_are_kept_as_bytes(every_byte, text):
    (ids,) = every_byte.tokenize([text])
    bpe = every_byte.tokenizers[0].bpe
    names = [bpe.id_to_token(i) for i in ids[0]]
    inner = names[1 : names.index(tokenizer.END)]  # END is also the unknown token
    assert names[0] == tokenizer.START
    assert set(names[len(inner) + 1 :]) == {tokenizer.END}
    alphabet = {letter: byte for byte, letter in bytes_to_letters().items()}
    kept = bytes(alphabet[name.removesuffix("</w>")] for name in inner).decode()
    assert kept == "".join(unicodedata.normalize("NFC", text).lower().split())


def bytes_to_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (Radford et al. 2019): printable ones as
    themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_a_text_that_is_no_unicode_is_refused(every_byte):
    with pytest.raises(ValueError, match=r"prompts \['a', 'caf.udce9'\] are not valid Unicode: write them in UTF-8"):
        every_byte.tokenize(["a", b"caf\xe9".decode("utf-8", "surrogateescape")])  # as from a Latin-1 terminal


def test_long_prompts_are_named_once_with_what_is_cut(every_byte, caplog):
    """Also with SDXL's two tokenizers, and where a prompt is asked for several images."""
    twice = Prompts(every_byte.tokenizers * 2, every_byte.nets * 2)
    cut = golden.LENGTH - 2
    twice.tokenize(["x" * (cut + 7)] * 4 + ["short", "y" * (cut + 1)])
    twice.tokenize(["x" * cut])  # fits
    assert [record.getMessage() for record in caplog.records] == [
        f"a prompt of {cut + 7} tokens is truncated to {cut}: {('x' * (cut + 7))[:60]!r} ... loses its last 7; "
        "1 more are too long"
    ]
