"""The tokenizer beside transformers', on words, bytes, contractions and texts that are too long."""

import json

import pytest
from golden import make_clip as golden

from cddistill.models import tokenizer

TEXTS = [
    "a photo of a cat, isn't it?", "  Two\n\nspaces\tand CAPITALS ", "", "2024: naïve café ½ 日本 😀",
    "don't we'll I'm", "<|endoftext|> inside <|startoftext|>", "x" * 40, "the quick brown fox jumps over the lazy dog",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    golden.write_tokenizer(tmp_path / "tokenizer", golden.PADS["clip_l"])
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_ids_are_those_of_transformers(pad, tmp_path):
    transformers = pytest.importorskip("transformers")
    golden.write_tokenizer(tmp_path / "tokenizer", pad)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = tokenizer.load(tmp_path / "tokenizer")
    for length in (12, 77):
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        assert ours(TEXTS, **options)["input_ids"] == theirs(TEXTS, **options)["input_ids"]


def test_a_long_prompt_is_truncated_with_a_warning(folder, caplog):
    ours = tokenizer.load(folder)
    (ids,) = ours(["cat " * 30], max_length=12)["input_ids"]
    assert len(ids) == 12
    assert (ids[0], ids[-1]) == (ours.bpe.token_to_id(tokenizer.START), ours.bpe.token_to_id(tokenizer.END))
    assert "is truncated to 10: 'cat cat" in caplog.text


def test_tokenizer_json_alone_is_read(folder, tmp_path):
    ours = tokenizer.load(folder)
    alone = tmp_path / "alone"
    alone.mkdir()
    ours.bpe.save(str(alone / "tokenizer.json"))
    assert tokenizer.load(alone)(TEXTS, max_length=12) == ours(TEXTS, max_length=12)


def test_bad_files_are_named(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    with pytest.raises(ValueError, match=r"tokenizer: its pad_token '\[PAD\]' is not in the vocabulary"):
        tokenizer.load(folder)
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match="merges.txt has the line 'a b c'; expected two tokens"):
        tokenizer.load(folder)
