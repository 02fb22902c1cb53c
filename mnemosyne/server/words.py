"""Words between the front and rank 0, as bytes: msgpack, ids raw, every value checked."""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec import Struct

from mnemosyne.request import SamplingParams
from mnemosyne.server.backend import About, Event, Status

NUM_BYTES = 4  # of one id: no vocabulary has 2**31 tokens


class Submit(Struct, array_like=True, tag="submit", frozen=True):
    """A job for the engine; ``job`` numbers it on this link."""

    job: int
    ids: bytes  # int32, little-endian
    params: SamplingParams
    # tokens that each sample has; None: that sample is at its end. (): none has any
    given: tuple[tuple[int, ...] | None, ...] = ()

    def prompt_ids(self) -> np.ndarray:
        """The prompt, int64."""
        if len(self.ids) % NUM_BYTES:
            raise ValueError(f"ids must be whole numbers of 4 bytes, got {len(self.ids)} bytes")
        return np.frombuffer(self.ids, "<i4").astype(np.int64)


class Cancel(Struct, array_like=True, tag="cancel", frozen=True):
    """Nobody reads that job any more."""

    job: int


class Clear(Struct, array_like=True, tag="clear", frozen=True):
    """Forget kept prefixes."""


class End(Struct, array_like=True, tag="end", frozen=True):
    """No job will follow: end in good order, all ranks."""


class Loading(Struct, array_like=True, tag="loading", frozen=True):
    """The progress of the start, for people."""

    stage: str


class Ready(Struct, array_like=True, tag="ready", frozen=True):
    """Jobs are taken from here on."""

    about: About
    files: dict[str, bytes] = {}  # of a tokenizer that is nowhere on disk, by name


class Events(Struct, array_like=True, tag="events", frozen=True):
    """Progress of jobs since the last word: one event per sample at most, with its job."""

    items: list[tuple[int, Event]]


class Refused(Struct, array_like=True, tag="refused", frozen=True):
    """The engine does not take a job; ``reason`` is for the client."""

    job: int
    reason: str


class Beat(Struct, array_like=True, tag="beat", frozen=True):
    """The process lives, and how its engine is."""

    status: Status


class Cleared(Struct, array_like=True, tag="cleared", frozen=True):
    """The number of pages that became free."""

    num_pages: int


class Leaving(Struct, array_like=True, tag="leaving", frozen=True):
    """The ranks got a signal to end: drain now."""

    reason: str


ToEngine = Submit | Cancel | Clear | End
ToFront = Loading | Ready | Events | Refused | Beat | Cleared | Leaving

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
_TO_FRONT = msgspec.msgpack.Decoder(ToFront)


def encode(word: ToEngine | ToFront) -> bytes:
    """A word as bytes."""
    return _ENCODER.encode(word)


def decode_for_engine(data: bytes) -> ToEngine:
    """Read a message of the front.

    Raises:
        ValueError: if it is no word of the front's, or holds a value that breaks its rule.
    """
    word: ToEngine = _TO_ENGINE.decode(data)
    return word


def decode_for_front(data: bytes) -> ToFront:
    """Read a message of rank 0.

    Raises:
        ValueError: if it is no word of rank 0's, or holds a value that breaks its rule.
    """
    word: ToFront = _TO_FRONT.decode(data)
    return word


def id_bytes(ids: np.ndarray) -> bytes:
    """Ids as ``Submit`` takes them; they are checked against a vocabulary already."""
    return ids.astype("<i4").tobytes()
