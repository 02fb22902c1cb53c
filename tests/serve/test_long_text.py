"""Texts encoded by pieces give the ids that they give at once, whatever kind the tokenizer is."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from mnemosyne.serve import long_text
from mnemosyne.serve import tokenizer as tokenizer_module
from mnemosyne.serve.long_text import encode_by_pieces
from mnemosyne.serve.tokenizer import Tokenizer

WORDS = [
    "the",
    "door",
    "code",
    "is",
    "Straße",
    "日本語",
    "🙂🙂",
    "12345",
    "\n\n",
    "    ",
    "foo_bar()",
    "é",
]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def made_text(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", " ", "  "]) for _ in range(num_words))


def trained(backend: tokenizers.Tokenizer, alphabet: list[str]) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator([made_text(seed, 500) for seed in range(8)], trainer)
    return backend


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA), "isolated")
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, spelt])
    return trained(backend, pre_tokenizers.ByteLevel.alphabet())


def sentence_piece() -> tokenizers.Tokenizer:
    """A whole text is one word, with a space put before it."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<s>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trained(backend, [])
    backend.pre_tokenizer = None
    return backend


def words() -> tokenizers.Tokenizer:
    vocabulary = {word: index for index, word in enumerate(["?", "<s>", "</s>", *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@pytest.mark.parametrize("make", [byte_level, sentence_piece, words])
def test_pieces_give_the_ids_of_the_whole(
    make: Callable[[], tokenizers.Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_text, "PIECE", 1500)
    monkeypatch.setattr(long_text, "MARGIN", 400)
    backend = make()
    for seed in range(4):
        text = made_text(100 + seed, 5000)
        expected = backend.encode(text, add_special_tokens=False).ids

        ids = encode_by_pieces(backend, text)

        assert ids is not None
        assert ids.dtype == np.int64
        assert ids.tolist() == expected


@pytest.mark.parametrize("word", ["a", "ab", " ", "\n", "1", "é", "\u200d🙂"])
def test_a_word_without_end_gives_the_ids_of_the_whole_or_none(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_text, "PIECE", 1500)
    monkeypatch.setattr(long_text, "MARGIN", 400)
    backend = byte_level()
    text = "the door " + word * 9001 + " is"

    ids = encode_by_pieces(backend, text)

    expected = backend.encode(text, add_special_tokens=False).ids
    assert ids is None or ids.tolist() == expected


def test_tokens_around_a_long_text_are_those_of_a_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_AT_ONCE", 3000)
    monkeypatch.setattr(long_text, "PIECE", 1500)
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    text = made_text(3, 5000)
    tokenizer, body = Tokenizer(backend), backend.encode(text, add_special_tokens=False).ids

    assert tokenizer.encode(text).tolist() == [0, *body, 1]
    assert tokenizer.encode(text, add_special_tokens=False).tolist() == body
    assert tokenizer.encode("<s>" + text).tolist() == [0, *body, 1]
