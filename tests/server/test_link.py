"""The link: whole messages however they are cut, bounded, from processes of this user alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.parallel import keys
from mnemosyne.request import SamplingParams
from mnemosyne.server import link
from mnemosyne.server.engine_process import Connection
from mnemosyne.server.link import HEADER, MAX_BYTES, Link, connect, frame, inherited, listen
from mnemosyne.server.stages import LOADING
from mnemosyne.server.words import (
    Cancel,
    Loading,
    Submit,
    decode_for_engine,
    decode_for_front,
    encode,
    id_bytes,
)

T = TypeVar("T")


def run(coroutine: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, 30)

    return asyncio.run(bounded())


def test_messages_arrive_whole_and_in_order_however_they_are_cut() -> None:
    messages = [b"", b"a", b"b" * 70_000, bytes(range(256)) * 20_000]

    async def main() -> list[bytes | None]:
        ours, theirs = socket.socketpair()
        writing = asyncio.to_thread(_write_pieces, theirs, b"".join(map(frame, messages)))
        reader = await Link.over(ours)
        task = asyncio.create_task(writing)
        found = [await reader.receive() for _ in range(len(messages) + 1)]
        await task
        reader.close()
        return found

    assert run(main()) == [*messages, None]


def _write_pieces(end: socket.socket, data: bytes) -> None:
    size = 1
    while data:
        end.sendall(data[:size])
        data, size = data[size:], size * 3 % 9973 + 1
    end.close()


def test_a_message_beyond_the_bound_is_refused_at_both_ends() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return MAX_BYTES + 1

    async def main() -> None:
        ours, theirs = socket.socketpair()
        reader = await Link.over(ours)
        theirs.sendall(HEADER.pack(MAX_BYTES + 1))
        with theirs, pytest.raises(ValueError, match="at most 268435456 bytes, got 268435457"):
            await reader.receive()
        reader.abort()

    run(main())
    with pytest.raises(ValueError, match="must fit 268435456 bytes"):
        frame(Long())


def test_a_sender_waits_for_a_reader_that_does_not_read() -> None:
    async def main() -> bool:
        ours, theirs = socket.socketpair()
        writer = await Link.over(ours)
        writer.put(b"x" * 8_000_000)
        flushing = asyncio.create_task(writer.flush())
        done, _ = await asyncio.wait({flushing}, timeout=0.2)
        flushing.cancel()
        writer.abort()
        theirs.close()
        return bool(done)

    assert not run(main())


def test_a_name_belongs_to_one_server_and_to_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connect("nobody-has-this") is None
    with listen("test-link"):
        with pytest.raises(ValueError, match="no other server has, got 'test-link'"):
            listen("test-link")
        found = connect("test-link")
        assert found is not None
        found.close()
        monkeypatch.setattr(link, "user_of", lambda peer: keys.os.geteuid() + 1)
        with pytest.raises(ValueError, match="a front of yours, got 'test-link'"):
            connect("test-link")


@pytest.mark.parametrize("name", ["", "x" * 200, "näme"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"serve\.link must be a short name"):
        listen(name)


def test_a_front_is_told_that_weights_load_only_while_they_do() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(f"fd:{theirs.detach()}")

    async def told() -> list[bytes | None]:
        reader, writer = await Link.over(ours), await connection.link()
        writer.close()
        data = [await reader.receive() for _ in range(3)]
        reader.close()
        return data

    connection.tell_progress(LOADING, 12, 100)
    connection.tell_progress(LOADING, 100, 100)

    said = encode(Loading("loading weights: 12%")), encode(Loading("preparing steps"))
    assert run(told()) == [*said, None]


def test_a_descriptor_that_is_no_socket_is_refused() -> None:
    with pytest.raises(ValueError, match="a socket that this process was given, got fd:999"):
        inherited(999)


@given(
    st.binary(max_size=60)
    | st.lists(st.integers() | st.text(), max_size=4).map(repr).map(str.encode)
)
def test_bytes_of_strangers_are_words_or_refused(data: bytes) -> None:
    for decode in (decode_for_engine, decode_for_front):
        with suppress(ValueError):  # nothing else may come of them
            decode(data)


def test_values_that_break_a_rule_are_refused_where_they_arrive() -> None:
    good = Submit(1, id_bytes(np.arange(5)), SamplingParams(max_tokens=3, seed=1), ((1, 2), None))
    data = encode(good)

    assert decode_for_engine(data) == good
    assert good.prompt_ids().tolist() == [0, 1, 2, 3, 4]
    assert decode_for_engine(encode(Cancel(3))) == Cancel(3)
    with pytest.raises(ValueError, match=r"temperature must be a finite number >= 0"):
        decode_for_engine(data.replace(b"\xabtemperature\xc0", b"\xabtemperature\xff"))
    with pytest.raises(ValueError, match="whole numbers of 4 bytes"):
        Submit(1, b"abc", SamplingParams()).prompt_ids()
