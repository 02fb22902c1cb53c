"""The tokens of a request page by page, and a digest of each page with all that is before it."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

ID_DTYPE = np.dtype("<i4")  # as tokens are hashed and kept


def seed_of(fingerprint: bytes, salt: str | None) -> bytes:
    """The beginning of the chains of one model and one salt; no salt differs from an empty one."""
    marked = b"" if salt is None else b"salt" + salt.encode()
    return sha256(sha256(fingerprint).digest() + marked).digest()


class Chain:
    """Digests of the full pages of a request, which grow as tokens come.

    Two requests have the same digest at the same page only if model, salt and all tokens up to
    the end of the page are the same, short of a collision of SHA-256: so tokens are compared too.

    Args:
        seed: from ``seed_of``.
        ids: int64, tokens that there are already.
        page_size: tokens per page.

    Attributes:
        digests: of each full page.
    """

    def __init__(self, seed: bytes, ids: np.ndarray, page_size: int) -> None:
        self.digests: list[bytes] = []
        self._seed = self._last = seed
        self._page_size = page_size
        num_full = len(ids) // page_size
        self._prompt_PN = ids[: num_full * page_size].astype(ID_DTYPE).reshape(-1, page_size)
        self._later: list[np.ndarray] = []  # pages after those, int32 each
        self._open = ids[num_full * page_size :].tolist()  # of the page that is not full yet
        data, page_bytes = memoryview(self._prompt_PN.tobytes()), page_size * ID_DTYPE.itemsize
        for start in range(0, len(data), page_bytes):
            self._hash(data[start : start + page_bytes])

    @property
    def num_tokens(self) -> int:
        """Tokens that it has."""
        return len(self.digests) * self._page_size + len(self._open)

    def before(self, page: int) -> bytes:
        """Digest of all that is before a page, model and salt included."""
        return self.digests[page - 1] if page else self._seed

    def append(self, token_id: int) -> None:
        """Take one more token."""
        self._open.append(token_id)
        if len(self._open) == self._page_size:
            page = np.array(self._open, dtype=ID_DTYPE)
            self._later.append(page)
            self._open.clear()
            self._hash(memoryview(page.tobytes()))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens of some full pages, int32 ``[stop - start, page_size]``."""
        num_first = len(self._prompt_PN)
        if stop <= num_first or start == stop:
            return self._prompt_PN[start:stop]
        later = self._later[max(0, start - num_first) : stop - num_first]
        return np.concatenate([self._prompt_PN[start:], np.stack(later)])

    def beginning(self, page: int) -> np.ndarray:
        """Tokens of a page that may not be full yet, int32."""
        if page < len(self.digests):
            return self.tokens(page, page + 1)[0]
        return np.array(self._open, dtype=ID_DTYPE)

    def _hash(self, page: memoryview) -> None:
        digest = sha256(self._last)
        digest.update(page)
        self._last = digest.digest()
        self.digests.append(self._last)
