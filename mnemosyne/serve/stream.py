"""Token ids to text as they come: no half characters, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mnemosyne.serve.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoding shows for bytes that are no character (yet)
MAX_HELD = 3  # a character has at most 4 bytes, so at most 3 wait for the rest
WINDOW = 16  # tokens decoded again for each new one; twice that at most


class Detokenizer:
    """Text of a growing list of ids, piece by piece, each at a bounded cost.

    The pieces together are the decode of all ids. One exception: a tokenizer that spells rare
    characters in byte tokens (Llama 2) decodes a whole run of them to replacement characters if
    one byte is wrong; here the characters shown before the wrong byte stay.

    Args:
        tokenizer: decodes.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._shown = ""  # text of the window that was handed out
        self._num_held = 0  # characters at the end of its text that were not

    def push(self, token_id: int) -> str:
        """Text that is certain once this token is known, possibly none."""
        # Tokens without text would count as context and hide the leading space of what follows.
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
            # A window may begin inside a character: what that spoils is shown already.
            self._window = self._window[WINDOW:]
            text = self._decode()
            self._shown = text[: len(text) - self._num_held]
        return piece

    def close(self) -> str:
        """The characters that were held back; no other will complete them."""
        text = self._decode()[len(self._shown) :]
        self._shown, self._num_held = self._shown + text, 0
        return text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)


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
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain to stand before any stop string; none after a match."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._strings]
        found = [entry for entry in found if entry[2] in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        num_held = max((_overlap(text, stop) for stop in self._strings), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def close(self) -> str:
        """The text held back, which turned out to be no stop string."""
        text, self._held = self._held, ""
        return text


class TextStream:
    """Text of one request: ids in, pieces out, cut at a stop string.

    Args:
        tokenizer: decodes.
        stop: strings that end the text; the text ends before them.
        min_tokens: stop strings are looked for in the text of later tokens only.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stop)
        self._num_exempt = min_tokens  # tokens still to come that no stop string can end

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
        return "".join(pieces)

    def close(self) -> str:
        """The text that was held back; call it once, when no token will follow."""
        return self._stops.push(self._detokenizer.close()) + self._stops.close()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, not the whole."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
