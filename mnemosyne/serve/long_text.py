"""Long texts to token ids by pieces: in bounded memory, and the same ids as at once.

The tokenizers library keeps some hundred bytes for each token of what it encodes at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import tokenizers

PIECE = 1 << 18  # characters that are settled at a time
MARGIN = 2048  # characters that neighbouring windows share on either side of a cut
NUM_CUTS = 64  # tokens that are tried as the place of a cut


class _Window(NamedTuple):
    """Part of a text, encoded by itself."""

    ids: list[int]
    starts: list[int]  # characters of the whole text, in order

    def near(self, cut: int) -> list[tuple[int, int]]:
        """Tokens within half a margin of a cut."""
        low = bisect_left(self.starts, cut - MARGIN // 2)
        high = bisect_left(self.starts, cut + MARGIN // 2)
        return list(zip(self.starts[low:high], self.ids[low:high], strict=True))


def encode_by_pieces(backend: tokenizers.Tokenizer, text: str) -> np.ndarray | None:
    """The ids of a text, without tokens that are added around it.

    Windows overlap. What two of them say around the place where one ends and the next goes on must
    be the same, hundreds of tokens on either side: then no token depends on where a window ends.

    Args:
        backend: a tokenizer without truncation and padding.
        text: long.

    Returns:
        int64; None where windows agree nowhere, as in a word of millions of characters.
    """
    parts = []
    window, cut = _encode(backend, text, 0, PIECE + MARGIN), 0
    while cut + PIECE + MARGIN < len(text):
        for end in islice(_cuts(window, cut + PIECE), NUM_CUTS):
            after = _encode(backend, text, end - MARGIN, end + PIECE + MARGIN)
            if after.near(end) == window.near(end):
                break
        else:
            return None
        parts.append(_between(window, cut, end))
        window, cut = after, end
    parts.append(_between(window, cut, len(text) + 1))
    return np.concatenate(parts).astype(np.int64)


def _encode(backend: tokenizers.Tokenizer, text: str, low: int, high: int) -> _Window:
    # a batch of one: unlike `encode`, it lets other threads run
    (made,) = backend.encode_batch([text[low:high]], add_special_tokens=False)
    return _Window(made.ids, [low + start for start, _ in made.offsets])


def _cuts(window: _Window, near: int) -> Iterator[int]:
    """Starts of tokens from some character downwards."""
    starts = window.starts[: bisect_left(window.starts, near)]
    return iter(dict.fromkeys(reversed(starts)))


def _between(window: _Window, low: int, high: int) -> np.ndarray:
    first, last = (bisect_left(window.starts, character) for character in (low, high))
    return np.array(window.ids[first:last], dtype=np.int32)
