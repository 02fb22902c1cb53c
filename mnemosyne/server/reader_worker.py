"""Program of a process that reads bodies: frames come in on a socket, frames go out.

A frame is its length in 8 bytes, then MessagePack. Behind one that says so, the descriptor of a
file follows: the body lies in it, and the ids are written over it.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from typing import Any

import msgspec
import numpy as np

from mnemosyne.server.errors import ApiError
from mnemosyne.server.reading import Reader, Reading, Rules, read_body

NICE = 10  # of processes that read long bodies: steps of the engine come first


def main() -> None:
    """Serve the socket whose descriptor is the first argument, until it is closed."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    if sys.argv[2] == "long":
        os.nice(NICE)
    opening = receive_frame(channel)
    if opening is None:
        return
    reader = Reader(msgspec.convert(opening, Rules))
    while (asked := receive_frame(channel)) is not None:
        file = receive_file(channel) if asked["in_file"] else None
        answer, ids = answer_to(reader, asked, file)
        if file is None:
            answer["ids"] = ids.tobytes()
        else:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            write_all(file, ids)
            os.close(file)
        send_frame(channel, answer)


def answer_to(
    reader: Reader, asked: dict[str, Any], file: int | None
) -> tuple[dict[str, Any], np.ndarray]:
    """Read a body: the reading or the error, and the ids of all its prompts."""
    none = np.empty(0, dtype=np.int64)
    try:
        reading = read_from(reader, asked, file)
    except ApiError as error:
        said = [error.status, str(error), error.kind, error.param, error.code]
        return {"api_error": said}, none
    except ValueError as error:
        return {"error": str(error)}, none
    except MemoryError:
        return {
            "error": "body must be small enough to be read in memory, got a larger one; cut"
        }, none
    ids = np.concatenate(reading.ids) if len(reading.ids) > 1 else (reading.ids or [none])[0]
    return {"said": msgspec.to_builtins(reading.said, builtin_types=(bytes,))}, ids


def read_from(reader: Reader, asked: dict[str, Any], file: int | None) -> Reading:
    if file is None:
        return read_body(reader, asked["kind"], asked["body"])
    # closed once nothing looks into it any more, as the trace of an error may
    mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    return read_body(reader, asked["kind"], memoryview(mapped))


def write_all(file: int, ids: np.ndarray) -> None:
    view = memoryview(ids.data).cast("B") if len(ids) else memoryview(b"")
    while len(view):
        view = view[os.write(file, view) :]


def receive_frame(channel: socket.socket) -> dict[str, Any] | None:
    """The next frame; None once the other side is gone."""
    head = receive_exactly(channel, 8)
    body = head and receive_exactly(channel, int.from_bytes(head, "little"))
    return msgspec.msgpack.decode(body) if body else None


def receive_exactly(channel: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = channel.recv(min(num_bytes - len(parts), 1 << 20))
        if not part:
            return b""
        parts += part
    return bytes(parts)


def receive_file(channel: socket.socket) -> int:
    _, files, _, _ = socket.recv_fds(channel, 1, 1)
    return files[0]


def send_frame(channel: socket.socket, content: dict[str, Any]) -> None:
    body = msgspec.msgpack.encode(content)
    channel.sendall(len(body).to_bytes(8, "little") + body)


if __name__ == "__main__":
    main()
