"""The processes that read bodies, without a server around them."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing

import pytest

from mnemosyne.server import readers as room
from mnemosyne.server.body import SMALL_BYTES, Body
from mnemosyne.server.readers import Readers
from mnemosyne.server.reading import Rules

RULES = Rules(
    model="tiny",
    names=["tiny"],
    vocab_size=100,
    max_model_len=1 << 20,
    max_request_tokens=1 << 20,
    tokenizer_dir=None,
    max_prompts=1,
    max_tokens=None,
)


def body_of(num_ids: int) -> Body:
    body = Body(1 << 30)
    body.add(json.dumps({"prompt": [5] * num_ids}).encode())
    return body


def test_who_leaves_while_a_body_is_read_costs_a_process_only_if_the_body_is_long() -> None:
    async def leave(readers: Readers, body: Body) -> tuple[int, int]:
        """Process ids of the readers, once one was left alone with a body."""
        reading = asyncio.create_task(readers.read("completions", body))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        body.close()
        for num_ids in (3, SMALL_BYTES):  # each lane reads as before
            with closing(body_of(num_ids)) as after:
                _, ids = await readers.read("completions", after)
            assert len(ids) == num_ids
        return tuple(p._child.pid for p in (*readers._short, *readers._long))

    async def run() -> list[tuple[int, int]]:
        readers = Readers(2)
        readers.start()
        readers.know(RULES)
        try:
            return [await leave(readers, body_of(num)) for num in (3, 3, 1_000_000)]
        finally:
            await readers.close()

    (short, long), once, twice = asyncio.run(run())

    assert once == (short, long)
    assert twice[0] == short
    assert twice[1] != long


def test_a_reader_that_cannot_start_for_a_while_is_there_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, refusals = socket.socketpair, [OSError(24, "Too many open files")] * 2

    def socketpair() -> tuple[socket.socket, socket.socket]:
        if refusals:
            raise refusals.pop()
        return usual()

    async def run() -> int:
        readers = Readers(2)
        readers.start()
        readers.know(RULES)
        monkeypatch.setattr(room.socket, "socketpair", socketpair)
        monkeypatch.setattr(room, "AGAIN_S", 0.01)
        try:
            with closing(body_of(1_000_000)) as body:
                left = asyncio.create_task(readers.read("completions", body))
                await asyncio.sleep(0.01)
                left.cancel()
                await asyncio.gather(left, return_exceptions=True)
            with closing(body_of(SMALL_BYTES)) as body:
                _, ids = await asyncio.wait_for(readers.read("completions", body), 30)
            return len(ids)
        finally:
            await readers.close()

    assert asyncio.run(run()) == SMALL_BYTES
    assert not refusals
