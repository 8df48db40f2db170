"""A small CLIP tokenizer: byte-level BPE fitted to the captions, so any Unicode text encodes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Final

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from jobs.small_model.captions import every_caption
from jobs.small_model.recipe import MAX_TOKENS

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
WORD_END: Final = "</w>"
# No caption has so many distinct words: fitting stops when each word is one token.
MOST_MERGES: Final = 1_000

Pair = tuple[str, str]


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer, the same on every machine: 512 byte tokens, the merges, start and end."""
    vocabulary, merges = fit_merges(every_caption())
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, padding_side="right"
    )


def save_tokenizer(tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Write ``tokenizer.json`` and, for older readers, ``vocab.json`` and ``merges.txt``."""
    tokenizer.save_pretrained(directory)
    vocabulary, merges = fit_merges(every_caption())
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")


def fit_merges(captions: Iterable[str]) -> tuple[dict[str, int], list[Pair]]:
    """Byte-pair encoding (Sennrich et al. 2016) of the captions' words: vocabulary and merges."""
    counts = Counter(word for caption in captions for word in _words(caption))
    spellings: dict[str, list[str]] = {
        word: [*word[:-1], word[-1] + WORD_END] for word in sorted(counts)
    }
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet)]
    merges: list[Pair] = []
    for _ in range(MOST_MERGES):
        pairs: Counter[Pair] = Counter()
        for word, parts in spellings.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(sorted(pairs), key=lambda pair: pairs[pair])  # sorted: ties fall the same way
        merges.append(best)
        tokens.append("".join(best))
        spellings = {word: _merged(parts, best) for word, parts in spellings.items()}
    # Two merges may spell the same token; the vocabulary names it once.
    tokens = list(dict.fromkeys([*tokens, START, END]))
    return {token: index for index, token in enumerate(tokens)}, merges


def _words(caption: str) -> list[str]:
    separated = "".join(f" {c} " if not c.isalpha() else c for c in caption)
    return separated.split()


def _merged(parts: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
