"""The ranks of a mesh as one: rank 0 drives, the others follow, and all return the same outputs."""

from __future__ import annotations

import logging
from functools import partial

from mnemosyne.joining.rank import Rank
from mnemosyne.parallel.address import default_store
from mnemosyne.parallel.control import (
    DriverChannel,
    FollowerChannel,
    Interrupted,
    Message,
    Outputs,
    Stop,
)
from mnemosyne.parallel.keys import MeshKey
from mnemosyne.parallel.trace import gather_traces, write_trace
from mnemosyne.parallel.watchdog import Watchdog
from mnemosyne.request import RequestOutput
from mnemosyne.runtime.follower import follow
from mnemosyne.serve.engine import Engine

log = logging.getLogger(__name__)


class Driver:
    """Rank 0's tie to the others.

    Args:
        rank: what this process holds; every rank opens its end at the same time.
        key: of the mesh, from a file; None: a new one, for ranks of one host.
    """

    def __init__(self, rank: Rank, key: MeshKey | None = None) -> None:
        self._rank = rank
        self._channel = DriverChannel(default_store(), rank.mesh.world_size, key=key)
        self._watchdog = _watchdog(rank, key)
        self.send_plan = self._channel.send_plan
        self.recv_result = self._channel.recv_result
        self.watch_step = self._watchdog.watch_step

    def tell_ready(self, engine: Engine | None = None) -> None:
        """Let the others out of their constructors.

        Args:
            engine: whose unfinished requests are reported if the ranks have to end.
        """
        if engine is not None:
            self._watchdog.on_end = partial(report_lost, engine)
        self._channel.send_outputs([])

    def tell_outputs(self, outputs: list[RequestOutput]) -> None:
        """End a call that every rank made."""
        self._channel.send_outputs(outputs)

    def tell_interrupted(self, error: BaseException) -> None:
        """End a call that every rank made with the error that ends it here."""
        self._channel.send_interrupted(error)

    def close(self, error: BaseException | None = None) -> None:
        """Let the others go, and write the trace that all of them made.

        Args:
            error: what ends this rank before its time, if anything does.
        """
        with self._watchdog.shielded():
            if error is None:
                self._channel.send_stop()
                self._rank.worker.close()
                finish_trace(self._rank)
            self._watchdog.close(error)
            self._channel.close()


class Follower:
    """The tie of every other rank to rank 0. It returns from its constructor when rank 0 is ready.

    Args:
        rank: what this process holds.
        key: of the mesh, from a file; None: that of rank 0, which is on this host.
    """

    def __init__(self, rank: Rank, key: MeshKey | None = None) -> None:
        self._rank = rank
        self._channel = FollowerChannel(default_store(), rank.mesh.rank, key=key)
        self._watchdog = _watchdog(rank, key)
        self._is_stopped = False
        self.follow_call()

    def follow_call(self) -> list[RequestOutput]:
        """Take part in one call of rank 0.

        Returns:
            The outputs that rank 0 returns.

        Raises:
            RuntimeError: if rank 0 ended the call with an error, or is closed.
        """
        message = self._next()
        if isinstance(message, Interrupted):
            raise RuntimeError(f"rank 0 ended the call with {message.kind}: {message.text}")
        if isinstance(message, Stop):
            raise RuntimeError("rank 0 closed its LLM; every rank must make the same calls")
        assert isinstance(message, Outputs), "plans never leave follow"
        return message.outputs

    def follow_to_the_end(self) -> None:
        """Take part in everything until rank 0 closes its LLM."""
        while not self._is_stopped:
            self._next()

    def close(self, error: BaseException | None = None) -> None:
        """Wait for rank 0 to close, unless this rank failed.

        Args:
            error: what ends this rank before its time, if anything does.
        """
        if error is None:
            self.follow_to_the_end()
            self._rank.worker.close()
            finish_trace(self._rank)
        self._watchdog.close(error)
        self._channel.close()

    def _next(self) -> Message:
        if self._is_stopped:
            return Stop()
        message: Message = follow(self._channel, self._rank.worker, self._watchdog.watch_step)
        self._is_stopped = isinstance(message, Stop)
        return message


def report_lost(engine: Engine, reason: str) -> None:
    """Report the requests that end with this process.

    The engine is left alone: the thread that steps it may be in the middle of it.
    """
    for output in engine.unfinished():
        said = f": {output.text or output.token_ids!r}" if engine.logs_text else ""
        log.error(
            "request %s failed with %d tokens so far%s",
            output.request_id,
            len(output.token_ids),
            said,
        )


def finish_trace(rank: Rank) -> None:
    """Bring the traces of all ranks together; rank 0 writes the file."""
    if rank.trace is None or rank.metrics.trace is None:
        return
    dumps = gather_traces(rank.trace, default_store(), rank.mesh.world_size)
    if dumps is not None:
        write_trace(rank.metrics.trace, dumps)


def _watchdog(rank: Rank, key: MeshKey | None) -> Watchdog:
    mesh = rank.mesh
    sizes = {"rank": mesh.rank, "world_size": mesh.world_size}
    return Watchdog(default_store(), **sizes, label=mesh.label, key=key)
