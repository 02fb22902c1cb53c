"""Requests that have ended engines: known by a digest, refused until they are forgotten."""

from __future__ import annotations

import time
from dataclasses import replace
from hashlib import blake2b

import msgspec

from mnemosyne.server.backend import Job

REMEMBERED_S = 3600.0
DIGEST_BYTES = 16


class Condemned:
    """Digests of requests, each for an hour."""

    def __init__(self) -> None:
        self._until_s: dict[bytes, float] = {}

    def add(self, job: Job) -> None:
        """Refuse a request from now on, from any client."""
        self._until_s[_digest(job)] = time.monotonic() + REMEMBERED_S

    def check(self, job: Job) -> None:
        """Let others pass.

        Raises:
            ValueError: for a request that was added.
        """
        now_s = time.monotonic()
        self._until_s = {k: until_s for k, until_s in self._until_s.items() if until_s > now_s}
        until_s = self._until_s.get(_digest(job)) if self._until_s else None
        if until_s is not None:
            raise ValueError(
                "prompt must be one that the engine survives, got one that ended it twice; "
                f"send it again in {(until_s - now_s) / 60:.0f} minutes, or another one"
            )


def _digest(job: Job) -> bytes:
    # each API key has a salt of its own, and no salt changes the computation
    params = replace(job.params, cache_salt=None)
    told = blake2b(msgspec.json.encode(params), digest_size=DIGEST_BYTES)
    told.update(job.prompt_ids.tobytes())
    return told.digest()
