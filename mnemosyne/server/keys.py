"""API keys, compared in constant time, and the limits of each per minute."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mnemosyne.server.errors import ApiError, too_much

MINUTE_S = 60.0
EVERYONE = ""  # the client without a key, where none is asked for


@dataclass(slots=True)
class Allowance:
    """A bucket that fills evenly, and may be overdrawn by the request that empties it.

    Args:
        per_minute: what it holds and what comes in a minute.
    """

    per_minute: int
    level: float = field(init=False)
    filled_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.level = float(self.per_minute)

    def wait_s(self, now_s: float) -> float:
        """Seconds until something may be taken."""
        rate = self.per_minute / MINUTE_S
        self.level = min(self.per_minute, self.level + rate * (now_s - self.filled_s))
        self.filled_s = now_s
        return 0.0 if self.level > 0 else (1e-9 - self.level) / rate

    def take(self, amount: float) -> None:
        self.level -= amount


class Keys:
    """Clients that may ask, and how much.

    Args:
        path: a file with one key per line; None: everybody may.
        requests_per_minute: of each key; None: any number.
        tokens_per_minute: likewise, of prompts and answers.
        clock: seconds.

    Raises:
        ValueError: if the file cannot be read or holds no key.
    """

    def __init__(
        self,
        path: str | None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digests = [] if path is None else _read(Path(path))
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._clock = clock
        self._allowances: dict[tuple[str, str], Allowance] = {}

    @property
    def is_open(self) -> bool:
        """Tell if no key is asked for."""
        return not self._digests

    def check(self, authorization: str | None) -> str:
        """Name the client that asks, by a name of its key that can be logged.

        Args:
            authorization: the header.

        Raises:
            ApiError: 401 without a key that is in the file.
        """
        if self.is_open:
            return EVERYONE
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # all of them are compared, whichever it is
        is_known = sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0
        if scheme.lower() != "bearer" or not is_known:
            raise ApiError(
                401,
                "Authorization must hold a key of this server, got none that is known; send "
                "'Bearer KEY'",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()[:8]

    def admit(self, who: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429 where a minute's requests or tokens are used up.
        """
        now_s = self._clock()
        for what, limit in self._limits.items():
            allowance = self._allowance(who, what)
            wait_s = 0.0 if allowance is None else allowance.wait_s(now_s)
            if wait_s > 0:
                raise too_much(
                    f"{what} of this key must be at most {limit:,} a minute, got more; "
                    f"wait {wait_s:.0f} s",
                    wait_s,
                )
        self._take(who, "requests", 1)

    def take_tokens(self, who: str, num_tokens: int) -> None:
        """Count tokens of a request that was admitted."""
        self._take(who, "tokens", num_tokens)

    def _take(self, who: str, what: str, amount: float) -> None:
        allowance = self._allowance(who, what)
        if allowance is not None:
            allowance.take(amount)

    def _allowance(self, who: str, what: str) -> Allowance | None:
        limit = self._limits[what]
        if limit is None:
            return None
        if (who, what) not in self._allowances:
            self._allowances[who, what] = Allowance(limit)
        return self._allowances[who, what]


def _read(path: Path) -> list[bytes]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"serve.api_keys must be a text file that can be read, got {str(path)!r} ({error}); "
            "write one key per line"
        ) from error
    if not lines:
        raise ValueError(
            f"serve.api_keys must hold a key, got {str(path)!r} with none; write one per line"
        )
    return [hashlib.sha256(key.encode()).digest() for key in lines]
