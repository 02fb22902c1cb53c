"""The bytes of single tokens, and a tokenizer that another process reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mnemosyne.serve.chat import ChatTemplate
from mnemosyne.serve.tokenizer import Tokenizer


@pytest.mark.parametrize("text", ["a", " b", "é", "\n", "\ufffd"])
def test_bytes_of_a_byte_level_token_are_those_it_is_spelt_with(text: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend)

    spelt = [tokenizer.bytes_of(int(i)) for i in tokenizer.encode(text)]

    assert b"".join(spelt) == text.encode()
    assert all(len(byte) == 1 for byte in spelt)


def test_bytes_of_a_word_keep_the_space_before_it() -> None:
    vocabulary = {"\u2581door": 0, "s": 1, "<0xC3>": 2}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)

    assert [tokenizer.bytes_of(i) for i in range(4)] == [b" door", b"s", b"\xc3", b""]


def test_a_saved_tokenizer_is_read_as_the_same(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat = ChatTemplate(
        {"default": "{{ bos_token }} {{ messages[0].content }}"}, {"bos_token": "a"}
    )

    Tokenizer(backend, chat).save(tmp_path)

    made = Tokenizer.from_dir(tmp_path)
    assert made is not None
    assert made.folder == tmp_path
    assert made.encode("b a").tolist() == [1, 0]
    assert made.apply_chat_template([{"role": "user", "content": "b"}]) == "a b"
