"""CLIP's byte-pair tokenizer from the files of a diffusers folder, with the ids of transformers' CLIPTokenizer."""

import dataclasses
import functools
import json
import logging
import math
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from cddistill import io
from cddistill.typed import brief

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # a contraction, a word, a digit, or punctuation
POSITIONS = 77  # model_max_length where a folder does not say


@dataclasses.dataclass(frozen=True)
class ClipTokenizer:
    """tokenizer(["a cat"]) is called, and answers, like those of transformers: {"input_ids": [[...]]}."""

    bpe: tokenizers.Tokenizer
    pad: int  # id
    model_max_length: int = POSITIONS

    def __call__(self, texts, padding="max_length", max_length=None, truncation=True):
        """Ids between the start and end tokens, padded to max_length.

        Texts that are too long lose their last tokens, with one warning for all. Unknown characters are kept as bytes.
        """
        length = max_length or self.model_max_length
        encoded = [e.ids for e in self.bpe.encode_batch(list(texts))]
        if long := {text: ids for text, ids in zip(texts, encoded, strict=True) if len(ids) > length}:
            text, ids = next(iter(long.items()))
            warn_truncated(" ".join(text.split())[:60], len(ids) - 2, length - 2, len(long) - 1)
        return {"input_ids": [self.fit(ids, length) for ids in encoded]}

    def fit(self, ids: list[int], length: int) -> list[int]:
        """ids padded or truncated to a length."""
        ids = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
        return ids + [self.pad] * (length - len(ids))


@functools.cache
def warn_truncated(start: str, tokens: int, kept: int, others: int) -> None:
    """Warn of a prompt that is too long, and of others with it; once, although SDXL has two tokenizers."""
    logging.warning(
        "a prompt of %d tokens is truncated to %d: %r ... loses its last %d%s",
        *(tokens, kept, start, tokens - kept),
        f"; {others} more are too long" if others else "",
    )


def load(path: Path) -> ClipTokenizer:
    """The tokenizer in a folder: vocab.json with merges.txt, or tokenizer.json. Raises ValueError if it is neither."""
    files, options = {file.name for file in path.glob("*.*")}, {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second one counts
        options |= io.read_json(path / name) if name in files else {}
    pad, longest = options.get("pad_token") or END, options.get("model_max_length", POSITIONS)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str) or not is_length(longest):
        said = f"pad_token {brief(pad)} or model_max_length {brief(longest)}"
        raise ValueError(f"{path}: its {said} is no text or no positive number: download it again")
    if not {"vocab.json", "merges.txt"} <= files and "tokenizer.json" not in files:  # it would be empty
        raise ValueError(f"{path} holds neither vocab.json with merges.txt nor tokenizer.json")
    try:
        bpe = read_bpe(path, {"vocab.json", "merges.txt"} <= files)
    except Exception as error:  # the library's own errors have no class of their own
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            why if str(path) in why else f"{path} holds no tokenizer ({why}): download it again"
        ) from error
    if (pad_id := bpe.token_to_id(pad)) is None:
        raise ValueError(f"{path}: its pad_token {brief(pad)} is not in the vocabulary")
    # As in transformers, the padding token is special: Stable Diffusion 2's "!" in a text is one.
    bpe.add_special_tokens([AddedToken(pad, normalized=False, special=True)])
    return ClipTokenizer(bpe, pad_id, int(min(longest, 10**6)))


def described(tokenizer: ClipTokenizer, length: int) -> dict:
    """What another program needs to give the same ids: vocab, merges, special tokens, and the ids of the frame.

    Raises ValueError for a tokenizer that does not split and lower-case texts as `clip` does.
    """
    whole = json.loads(tokenizer.bpe.to_str())
    model = whole["model"]
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    ours = json.loads(clip(model["vocab"], pairs).to_str())
    for part in ("normalizer", "pre_tokenizer"):
        if whole[part] != ours[part]:
            raise ValueError(f"this tokenizer's {part} is not CLIP's: only texts that are split as CLIP's have a page")
    return {
        "vocab": model["vocab"],
        "merges": [" ".join(pair) for pair in pairs],
        "special": {token["content"]: token["id"] for token in whole["added_tokens"]},
        "unknown": model["vocab"][END],
        "start": model["vocab"][START],
        "end": model["vocab"][END],
        "pad": tokenizer.pad,
        "length": length,
    }


def is_length(x) -> bool:
    """Whether a value is a number of tokens; libraries write 1e30 for no limit."""
    return type(x) in (int, float) and 3 <= x < math.inf


def read_bpe(path: Path, split: bool) -> tokenizers.Tokenizer:
    """The tokenizer of vocab.json and merges.txt if `split`, else of tokenizer.json; any error for broken ones."""
    if split:
        return clip(io.read_json(path / "vocab.json"), read_merges(path / "merges.txt"))
    bpe = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    bpe.no_padding()
    bpe.no_truncation()
    return bpe


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, whose first line may be a comment."""
    lines = path.read_text("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"{path} has the line {' '.join(wrong[0])!r}; expected two tokens on each")
    return pairs


def clip(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's tokenizer with these tokens and merges (Radford et al. 2021, sec. 2.4: lower-cased byte-pair encoding)."""
    model = tokenizers.models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False)
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ends = [(token, vocab[token]) for token in (END, START)]
    bpe.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False, trim_offsets=False)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (START, END)])
    return bpe
