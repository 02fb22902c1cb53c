"""The ranks of a mesh as one: rank 0 drives, the others follow, and all return the same outputs."""

from __future__ import annotations

from torch.distributed import distributed_c10d

from mnemosyne.build import Rank
from mnemosyne.parallel.address import Store
from mnemosyne.parallel.control import (
    DriverChannel,
    FollowerChannel,
    Interrupted,
    Message,
    Outputs,
    Stop,
)
from mnemosyne.parallel.trace import gather_traces, write_trace
from mnemosyne.request import RequestOutput
from mnemosyne.runtime.follower import follow


class Driver:
    """Rank 0's tie to the others.

    Args:
        rank: what this process holds; every rank opens its end at the same time.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.channel = DriverChannel(_store(), rank.mesh.world_size)

    def tell_ready(self) -> None:
        """Let the others out of their constructors."""
        self.channel.send_outputs([])

    def tell_outputs(self, outputs: list[RequestOutput]) -> None:
        """End a call that every rank made."""
        self.channel.send_outputs(outputs)

    def tell_interrupted(self, error: BaseException) -> None:
        """End a call that every rank made with the error that ends it here."""
        self.channel.send_interrupted(error)

    def close(self) -> None:
        """Let the others go, and write the trace that all of them made."""
        self.channel.send_stop()
        self._rank.worker.close()
        finish_trace(self._rank)
        self.channel.close()


class Follower:
    """The tie of every other rank to rank 0. It returns from its constructor when rank 0 is ready.

    Args:
        rank: what this process holds.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._channel = FollowerChannel(_store(), rank.mesh.rank)
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

    def close(self, *, is_failed: bool = False) -> None:
        """Wait for rank 0 to close, unless this rank failed."""
        if not is_failed:
            self.follow_to_the_end()
            self._rank.worker.close()
            finish_trace(self._rank)
        self._channel.close()

    def _next(self) -> Message:
        if self._is_stopped:
            return Stop()
        message: Message = follow(self._channel, self._rank.worker)
        self._is_stopped = isinstance(message, Stop)
        return message


def finish_trace(rank: Rank) -> None:
    """Bring the traces of all ranks together; rank 0 writes the file."""
    if rank.trace is None or rank.trace_path is None:
        return
    dumps = gather_traces(rank.trace, _store(), rank.mesh.world_size)
    if dumps is not None:
        write_trace(rank.trace_path, dumps)


def _store() -> Store:
    """The store that the ranks met in; torch has no public name for it."""
    return distributed_c10d._get_default_store()
