"""Token ids to text as they come: no half characters, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mnemosyne.serve.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # shown by decoding for bytes that are no character (yet)
MAX_HELD = 3  # a character has at most 4 bytes, so at most 3 wait for the rest
WINDOW = 16  # tokens decoded again for each new one; twice that at most
NUM_LOOKED_AT = 1024  # tokens at the end of a prompt among which its last text is looked for


class Detokenizer:
    """Text of a growing list of ids, piece by piece, each at a bounded cost.

    The pieces together are what the decode of prompt and ids has beyond the decode of the prompt:
    a space that a tokenizer hides at the beginning of a text is there where it follows a prompt,
    and a character that begins in the prompt is shown once it is whole.

    One exception: a tokenizer that spells rare characters in byte tokens (Llama 2) decodes a whole
    run of them to replacement characters if one byte is wrong; here the characters shown before
    the wrong byte stay.

    Args:
        tokenizer: decodes.
        prompt_ids: what the ids follow.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] | np.ndarray = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._shown = ""  # text of the window that was handed out, or is part of the prompt
        self._num_held = 0  # characters at the end of its text that were not
        self._owed = ""  # of those, what the prompt shows already; it may yet become a character
        if len(prompt_ids):
            self._follow(prompt_ids)

    def push(self, token_id: int) -> str:
        """Text that is certain once this token is known, possibly none."""
        # Tokens without text would count as context and hide the leading space of the next one.
        if not self._tokenizer.is_text(token_id, skip_special_tokens=self._skip):
            return ""
        self._window.append(token_id)
        text = self._decode()
        if not text.startswith(self._shown):
            # A run of byte tokens that was whole is not with this one: begin a new character.
            self._window = self._window[-1 - self._num_held :]
            self._shown, text = "", self._decode()
        unseen = text[len(self._shown) :]
        self._num_held = min(len(unseen) - len(unseen.rstrip(REPLACEMENT)), MAX_HELD)
        piece = unseen[: len(unseen) - self._num_held]
        self._shown += piece
        if len(self._window) == 2 * WINDOW:
            starts = [(start, 0) for start in range(WINDOW, WINDOW - MAX_HELD - 1, -1)]
            start, _ = self._whole(self._window, starts)
            self._window = self._window[start:]
            text = self._decode()
            self._shown = text[: len(text) - self._num_held]
        return self._beyond_prompt(piece)

    def close(self) -> str:
        """The characters that were held back; no other will complete them."""
        text = self._decode()[len(self._shown) :]
        self._shown, self._num_held = self._shown + text, 0
        return self._beyond_prompt(text)

    def _follow(self, prompt_ids: Sequence[int] | np.ndarray) -> None:
        """Begin with the last tokens of a prompt as context."""
        last = np.asarray(prompt_ids[-NUM_LOOKED_AT:]).tolist()
        last = [i for i in last if self._tokenizer.is_text(i, skip_special_tokens=self._skip)]
        last = last[-WINDOW - MAX_HELD :]
        few = range(MAX_HELD + 1)
        cuts = [(start, n) for n in few for start in few if start + n < len(last)]
        cuts += [(0, len(last))] if len(last) <= MAX_HELD else []
        start, num_open = self._whole(last, cuts)
        self._window, begun = last[start:], last[len(last) - num_open :]
        self._shown = self._decode(last[start : len(last) - num_open])
        text = self._decode()
        is_more = text.startswith(self._shown)
        self._owed = text[len(self._shown) :] if is_more else self._decode(begun)
        self._num_held = len(self._owed)

    def _whole(self, ids: list[int], cuts: list[tuple[int, int]]) -> tuple[int, int]:
        """The first cut, in tokens at both ends, after which no character is broken at either.

        A window that begins inside a character would spoil a whole run of byte tokens. Bytes that
        are no text have no such cut: then it is the first one.
        """
        for start, num_dropped in cuts:
            text = self._decode(ids[start : len(ids) - num_dropped])
            if text.strip(REPLACEMENT) == text:
                return start, num_dropped
        return cuts[0]

    def _beyond_prompt(self, piece: str) -> str:
        """A piece without the text that is in the prompt already."""
        num_common = _num_common(piece, self._owed)
        if piece:
            self._owed = self._owed[num_common:] if num_common == len(piece) else ""
        return piece[num_common:]

    def _decode(self, ids: list[int] | None = None) -> str:
        listed = self._window if ids is None else ids
        return self._tokenizer.decode(listed, skip_special_tokens=self._skip)


class StopStrings:
    """Text up to the first stop string.

    The string that is complete first counts, the longest one if several end together, so that the
    cut does not depend on how the text was divided into pieces.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""  # may be the beginning of a stop string
        self._marks = ""  # of each character of it: "+" if it is shown, "-" if not
        self.matched: str | None = None

    def push(self, piece: str, *, is_shown: bool = True) -> str:
        """The text that certainly comes before any stop string; none after a match.

        Args:
            piece: what comes next.
            is_shown: whether it is part of the text, or only of what stop strings are looked for
                in, as special tokens are.
        """
        if self.matched is not None:
            return ""
        if not self._strings:
            return piece if is_shown else ""
        text = self._held + piece
        self._marks += ("+" if is_shown else "-") * len(piece)
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._strings]
        found = [entry for entry in found if entry[2] in text]
        if found:
            end, _, self.matched = min(found)
            return self._release(text[: end - len(self.matched)], held="")
        num_held = max((_overlap(text, stop) for stop in self._strings), default=0)
        return self._release(text[: len(text) - num_held], held=text[len(text) - num_held :])

    def close(self) -> str:
        """The text held back, which turned out to be no stop string."""
        return self._release(self._held, held="")

    def _release(self, text: str, held: str) -> str:
        """The part of a text that is shown; the rest waits."""
        marks, self._marks = self._marks[: len(text)], self._marks[len(text) :]
        self._held = held
        if "-" not in marks:
            return text
        return "".join(char for char, mark in zip(text, marks, strict=True) if mark == "+")


class TextStream:
    """Text of one request: ids in, pieces out, cut at a stop string.

    Stop strings are looked for in the text with its special tokens, whether those are shown or
    not: ``<|im_end|>`` ends a text as any other string does.

    Args:
        tokenizer: decodes.
        prompt_ids: what the ids follow.
        stop: strings that end the text; the text ends before them.
        min_tokens: stop strings are looked for in the text of later tokens only.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] | np.ndarray = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, prompt_ids=prompt_ids, skip_special_tokens=skip_special_tokens
        )
        self._stops = StopStrings(stop)
        self._num_exempt = min_tokens  # tokens still to come that no stop string can end
        self._hidden = tokenizer.special_ids if skip_special_tokens and stop else frozenset()
        self._tokenizer = tokenizer

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, None as long as there is none."""
        return self._stops.matched

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens make certain; none after a stop string."""
        pieces = []
        for token_id in token_ids:
            piece = self._detokenizer.push(token_id)
            is_exempt, self._num_exempt = self._num_exempt > 0, max(0, self._num_exempt - 1)
            pieces.append(piece if is_exempt else self._stops.push(piece))
            if token_id in self._hidden and not is_exempt:
                special = self._tokenizer.decode([token_id], skip_special_tokens=False)
                pieces.append(self._stops.push(special, is_shown=False))
        return "".join(pieces)

    def close(self) -> str:
        """The text that was held back; call it once, when no token will follow."""
        return self._stops.push(self._detokenizer.close()) + self._stops.close()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, not the whole."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _num_common(a: str, b: str) -> int:
    """Length of the longest text that both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(a), len(b)))
