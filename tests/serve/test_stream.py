"""Streamed text is the decoded text, whole characters at a time, cut at stop strings."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.serve.stream import WINDOW, Detokenizer, StopStrings, TextStream
from mnemosyne.serve.tokenizer import Tokenizer
from tests.serve.made_tokenizers import (
    END,
    TEXTS,
    byte_fallback_bpe,
    byte_level_bpe,
    metaspace_bpe,
    words,
)

BYTE_LEVEL = Tokenizer(byte_level_bpe())
BYTE_FALLBACK = Tokenizer(byte_fallback_bpe())
METASPACE = Tokenizer(metaspace_bpe())
WORDS = Tokenizer(words())

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
emoji_text = st.lists(
    st.sampled_from(["👩‍👩‍👧", "é", "€", " ", "a", "日本", "🎉", "\n"]), max_size=40
).map("".join)


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.close()]


@given(
    corpus=st.lists(unicode_text | emoji_text, min_size=1, max_size=5),
    vocab_size=st.integers(258, 400),
    text=unicode_text | emoji_text,
)
@settings(max_examples=100)
def test_pieces_of_any_byte_level_tokenizer_make_the_text(
    corpus: list[str], vocab_size: int, text: str
) -> None:
    tokenizer = Tokenizer(byte_level_bpe(corpus, vocab_size))
    ids = tokenizer.encode(text).tolist()

    pieces = stream(tokenizer, ids)

    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 345), max_size=120), st.booleans())
@settings(max_examples=200)
def test_pieces_of_random_ids_make_their_decode(ids: list[int], skip_special_tokens: bool) -> None:
    pieces = stream(BYTE_LEVEL, ids, skip_special_tokens=skip_special_tokens)

    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip_special_tokens)


@given(unicode_text | emoji_text)
@settings(max_examples=200)
def test_pieces_of_a_byte_fallback_tokenizer_make_the_text(text: str) -> None:
    ids = BYTE_FALLBACK.encode(text).tolist()

    pieces = stream(BYTE_FALLBACK, ids)

    assert "".join(pieces) == BYTE_FALLBACK.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 266) | st.sampled_from([2, 259, 263]), max_size=80))
@settings(max_examples=200)
def test_byte_fallback_differs_in_invalid_bytes_only(ids: list[int]) -> None:
    text = BYTE_FALLBACK.decode(ids)

    streamed = "".join(stream(BYTE_FALLBACK, ids))

    assert streamed == text or "\ufffd" in text


def test_special_tokens_between_words_keep_the_space_of_the_next() -> None:
    backend = byte_fallback_bpe()
    ids = [backend.token_to_id(token) for token in ("▁a", END, END, "▁b", END, "c")]

    pieces = stream(BYTE_FALLBACK, ids)

    assert pieces == ["a", "", "", " b", "", "c", ""]


def test_words_are_joined_by_spaces() -> None:
    pieces = stream(WORDS, [1, 2, 0, 3])

    assert pieces == ["one", " two", "", " three", ""]


def test_characters_split_over_tokens_come_whole() -> None:
    tokenizer = Tokenizer(byte_level_bpe(["x"], 258))

    pieces = stream(tokenizer, tokenizer.encode("a€🎉").tolist())

    assert pieces == ["", "a", "", "", "€", "", "", "", "🎉", ""]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
def test_the_window_stays_short_even_for_bytes_that_never_make_a_character(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = next(i for i in range(300) if tokenizer.decode([i]) == "\ufffd")
    lengths = []
    decode = tokenizer.decode

    def counted(ids: list[int], *, skip_special_tokens: bool = True) -> str:
        lengths.append(len(ids))
        return decode(ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    pieces = stream(tokenizer, [wrong] * 500)

    assert "".join(pieces) == "\ufffd" * 500
    assert max(lengths) <= 2 * WINDOW
    assert len(lengths) <= 3 * 500


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300)
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    whole, parts = StopStrings(stops), StopStrings(stops)

    at_once = whole.push(text) + whole.close()
    in_parts = "".join(parts.push(piece) for piece in pieces) + parts.close()

    assert in_parts == at_once
    assert parts.matched == whole.matched
    if whole.matched is None:
        assert at_once == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(at_once + whole.matched)
        ended = at_once + whole.matched
        assert not any(stop in ended[:-1] for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nUser:", "END"])

    pieces = [
        stops.push(piece) for piece in ["one\n", "two\n", "\nUs", "ers E", "N", "D more", "x"]
    ]

    assert pieces == ["one", "\ntwo", "", "\n\nUsers ", "", "", ""]
    assert stops.matched == "END"


@given(text=emoji_text, stop=st.sampled_from(["a", "é€", "🎉 ", "本a", "\n"]))
def test_a_stream_ends_before_its_stop_string(text: str, stop: str) -> None:
    ids = BYTE_LEVEL.encode(text).tolist()
    text_stream = TextStream(BYTE_LEVEL, stop=[stop])

    shown = "".join(text_stream.push([token_id]) for token_id in ids) + text_stream.close()

    assert shown == text.partition(stop)[0]
    assert text_stream.matched == (stop if stop in text else None)


def test_stop_strings_do_not_count_in_the_first_min_tokens() -> None:
    ids = [1, 2, 1, 2, 3]
    text_stream = TextStream(WORDS, stop=["two"], min_tokens=2)

    pieces = [text_stream.push([token_id]) for token_id in ids]

    assert pieces == ["one", " two", " one", " ", ""]
    assert text_stream.matched == "two"


def test_many_tokens_at_once_give_the_same_text() -> None:
    ids = list(itertools.chain.from_iterable(BYTE_LEVEL.encode(text).tolist() for text in TEXTS))
    one_by_one, at_once = TextStream(BYTE_LEVEL), TextStream(BYTE_LEVEL)

    singly = "".join(one_by_one.push([token_id]) for token_id in ids) + one_by_one.close()

    assert at_once.push(ids) + at_once.close() == singly == "".join(TEXTS)


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    text_stream = TextStream(WORDS, stop=["one two three"])

    pieces = [text_stream.push([1, 2]), text_stream.close()]

    assert pieces == ["", "one two"]
    assert text_stream.matched is None


def stream_after(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt)
    return "".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.close()])


def num_whole(tokenizer: Tokenizer, prompt: list[int], text: str) -> int:
    """Characters of a text that a prompt, which may end inside one, has whole."""
    decoded = (tokenizer.decode(prompt[:n]).rstrip("\ufffd") for n in range(len(prompt) + 1))
    return max(len(part) for part in decoded if text.startswith(part))


@given(
    st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK, METASPACE]),
    st.lists(
        st.sampled_from(["a", "b", "ab ", " c", "é", "€", "日本", "🎉", "👩‍👩‍👧"]),
        min_size=1,
        max_size=60,
    ).map("".join),
    st.floats(0, 1),
)
@settings(max_examples=300)
def test_an_answer_joins_its_prompt_wherever_that_ends(
    tokenizer: Tokenizer, text: str, where: float
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).tolist()
    cut = round(where * len(ids))
    whole = tokenizer.decode(ids)

    answer = stream_after(tokenizer, ids[:cut], ids[cut:])

    assert answer == whole[num_whole(tokenizer, ids[:cut], whole) :]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "answer"),
    [(BYTE_FALLBACK, "a", " b"), (METASPACE, "a", " b"), (WORDS, "one", " two")],
    ids=["llama", "metaspace", "words"],
)
def test_the_space_that_a_tokenizer_hides_at_the_start_is_there_after_a_prompt(
    tokenizer: Tokenizer, prompt: str, answer: str
) -> None:
    ids = tokenizer.encode(prompt + answer).tolist()

    assert stream_after(tokenizer, ids[:1], ids[1:]) == answer
    assert stream_after(tokenizer, [], ids[1:]) == answer.lstrip()


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
@pytest.mark.parametrize("num_left", [0, 1, 2])
def test_a_character_that_the_prompt_began_is_shown_by_the_answer_or_not_at_all(
    tokenizer: Tokenizer, num_left: int
) -> None:
    first, second, third = (byte_token(tokenizer, byte) for byte in "€".encode())
    letter = tokenizer.encode("a", add_special_tokens=False).tolist()[-1]
    prompt, rest = [letter, first, second, third], [third, letter]
    prompt = prompt[: 4 - num_left]

    broken = stream_after(tokenizer, prompt, [letter])

    assert broken.strip() == "a"
    if num_left == 1:
        assert stream_after(tokenizer, prompt, rest).replace(" ", "") == "€a"


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    """The token of one byte beyond ASCII, which byte-level tokenizers write as Latin-1 does."""
    name = chr(byte) if tokenizer is BYTE_LEVEL and byte >= 0xAE else f"<0x{byte:02X}>"
    if tokenizer is BYTE_LEVEL and byte < 0xAE:
        name = {0x82: "Ĥ"}.get(byte, chr(byte))
    token_id = tokenizer._backend.token_to_id(name)
    assert token_id is not None
    return token_id


def test_a_long_prompt_costs_no_more_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], **options: bool) -> str:
        lengths.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", counted)

    Detokenizer(BYTE_LEVEL, prompt_ids=[5] * 100_000)

    assert max(lengths) <= WINDOW + 3
    assert len(lengths) <= 8


def test_a_special_token_is_a_stop_string_though_it_is_not_shown() -> None:
    ids = BYTE_LEVEL.encode(f"the cat{END} sat", add_special_tokens=False).tolist()
    text_stream = TextStream(BYTE_LEVEL, stop=[END])

    assert text_stream.push(ids) + text_stream.close() == "the cat"
    assert text_stream.matched == END


def test_a_stop_string_may_go_on_where_a_special_token_ends() -> None:
    ids = BYTE_LEVEL.encode(f"the{END} cat{END} mat", add_special_tokens=False).tolist()
    text_stream = TextStream(BYTE_LEVEL, stop=[f"{END} mat", "dog"])

    assert text_stream.push(ids) + text_stream.close() == "the cat"
    assert text_stream.matched == f"{END} mat"
