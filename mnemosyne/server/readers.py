"""The processes that read bodies: few, some of them kept free for short ones."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from contextlib import closing
from functools import partial
from typing import Any

import msgspec
import numpy as np

from mnemosyne.server.body import Body
from mnemosyne.server.errors import FAILED, ApiError, invalid
from mnemosyne.server.reading import Rules

log = logging.getLogger(__name__)

MODULE = "mnemosyne.server.reader_worker"
STOP_S = 2.0
AGAIN_S = 0.5  # to the next try, where no descriptor or process is to be had


class ReaderLost(RuntimeError):
    """The process of a reader ended in the middle of a body."""


class Readers:
    """Reads bodies in processes of their own, on one event loop.

    Large bodies have processes apart, of lower priority, so that a short prompt waits for no long
    one and a step of the engine for neither.

    Args:
        num_readers: processes, at least one for short bodies and one for long ones.
    """

    def __init__(self, num_readers: int) -> None:
        num_long = max(1, num_readers // 2)
        self._long = [_Process("long") for _ in range(num_long)]
        self._short = [_Process("short") for _ in range(max(1, num_readers - num_long))]
        self._free: dict[str, asyncio.LifoQueue[_Process]] = {}
        self._replacing: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._rules: Rules | None = None

    def start(self) -> None:
        """Start the processes; they import while the model loads."""
        for lane, processes in (("short", self._short), ("long", self._long)):
            self._free[lane] = asyncio.LifoQueue()
            for process in processes:
                process.start()
                self._free[lane].put_nowait(process)

    def know(self, rules: Rules) -> None:
        """Set the model; nothing is read before."""
        self._rules = rules

    async def read(self, kind: str, body: Body) -> tuple[Any, np.ndarray]:
        """Read a body.

        Args:
            kind: what it is, such as "chat".
            body: all of it.

        Returns:
            What the worker says, as JSON data, and the ids of all prompts.

        Raises:
            ApiError: if it is refused.
        """
        lane = "short" if body.file is None else "long"
        return await self._ask(lane, kind, body)

    async def token_bytes(self, ids: list[int]) -> list[bytes]:
        """The bytes of single tokens."""
        with closing(Body(1 << 30)) as body:
            body.add(msgspec.json.encode({"ids": ids}))
            said, _ = await self.read("names", body)
        return [bytes(each) for each in said]

    async def _ask(self, lane: str, kind: str, body: Body) -> tuple[Any, np.ndarray]:
        assert self._rules is not None, "the model is known before bodies are read"
        process = await self._free[lane].get()
        asking = asyncio.ensure_future(process.ask(self._rules, kind, body))
        asking.add_done_callback(partial(self._release, lane, process))
        try:
            answer, ids = await asyncio.shield(asking)
        except ReaderLost as error:
            message = "the process that read this request ended; send it again"
            raise ApiError(500, message, kind=FAILED) from error
        except asyncio.CancelledError:  # the client left: a long body is not worth the time
            if lane == "long":
                asking.cancel()
            raise
        if "error" in answer:
            raise invalid(ValueError(answer["error"]))
        if "api_error" in answer:
            status, message, error_kind, param, code = answer["api_error"]
            raise ApiError(status, message, kind=error_kind, param=param, code=code)
        return answer["said"], ids

    def _release(self, lane: str, process: _Process, asking: asyncio.Future[Any]) -> None:
        """Let others have a process; one that did not say all it had to is replaced before."""
        if not asking.cancelled() and asking.exception() is None:
            self._free[lane].put_nowait(process)
            return
        if self._is_closed:
            return
        task = asyncio.ensure_future(self._replace(lane, process))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replace(self, lane: str, process: _Process) -> None:
        while not self._is_closed:
            try:
                await asyncio.to_thread(process.replace)  # an end and a start take milliseconds
            except OSError as error:
                log.warning(
                    "a reader of %s bodies cannot start (%s); it is tried again", lane, error
                )
                await asyncio.sleep(AGAIN_S)
            else:
                self._free[lane].put_nowait(process)
                return

    async def close(self) -> None:
        """End the processes."""
        self._is_closed = True
        await asyncio.gather(*self._replacing)
        for process in (*self._short, *self._long):
            process.stop()


class _Process:
    """One worker and the socket to it."""

    def __init__(self, lane: str) -> None:
        self._lane = lane
        self._child: subprocess.Popen[bytes] | None = None
        self._is_told = False

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), self._lane],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "TOKENIZERS_PARALLELISM": "false",
                    "OMP_NUM_THREADS": "1",
                },
                start_new_session=True,  # Ctrl-C is for its owner
            )
        ours.setblocking(False)
        self._channel, self._is_told = ours, False

    def stop(self) -> None:
        if self._child is None:
            return
        self._channel.close()
        try:
            self._child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None

    def replace(self) -> None:
        """End it at once, even in the middle of work, and start another."""
        if self._child is not None:
            self._child.kill()
        self.stop()
        self.start()

    async def ask(self, rules: Rules, kind: str, body: Body) -> tuple[dict[str, Any], np.ndarray]:
        """One body in, one answer out.

        Raises:
            ReaderLost: if the process ended.
        """
        try:
            if not self._is_told:
                await self._send(msgspec.to_builtins(rules))
                self._is_told = True
            file = body.file
            asked = {"kind": kind, "in_file": file is not None}
            if file is None:
                await self._send({**asked, "body": body.in_memory()})
            else:
                file.flush()
                await self._send(asked)
                socket.send_fds(self._channel, [b"F"], [file.fileno()])
            answer = await self._receive()
        except OSError as error:
            raise ReaderLost(str(error)) from error
        if file is None:
            return answer, np.frombuffer(answer.pop("ids"), dtype=np.int64)
        file.seek(0)
        # 80 MB for ten million ids: not on the loop
        return answer, await asyncio.to_thread(np.fromfile, file, np.int64)

    async def _send(self, content: dict[str, Any]) -> None:
        data = msgspec.msgpack.encode(content)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._channel, len(data).to_bytes(8, "little") + data)

    async def _receive(self) -> dict[str, Any]:
        head = await self._exactly(8)
        answer: dict[str, Any] = msgspec.msgpack.decode(
            await self._exactly(int.from_bytes(head, "little"))
        )
        return answer

    async def _exactly(self, num_bytes: int) -> bytes:
        loop, parts = asyncio.get_running_loop(), bytearray()
        while len(parts) < num_bytes:
            part = await loop.sock_recv(self._channel, min(num_bytes - len(parts), 1 << 20))
            if not part:
                raise ReaderLost("its socket was closed")
            parts += part
        return bytes(parts)
