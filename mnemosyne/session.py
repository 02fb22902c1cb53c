"""An open model: this rank's engine, its ties to the other ranks, and its current user."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from mnemosyne.config import EngineConfig
from mnemosyne.joining.checkpoint import Progress
from mnemosyne.joining.rank import Rank, build_rank
from mnemosyne.joining.real import build_engine
from mnemosyne.metrics import StepListener, StepLog, StepRecord
from mnemosyne.parallel.keys import MeshKey, mesh_key
from mnemosyne.parallel.trace import Trace, claim_trace, write_trace
from mnemosyne.request import RequestOutput
from mnemosyne.runtime.leaves import RankLeaves
from mnemosyne.schedule.foreign_predictor import check_predictor
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.ownership import Claim, Ownership

if TYPE_CHECKING:
    from mnemosyne.joining.crew import Driver, Follower


class Session:
    """The state of an ``LLM`` from its opening to its end.

    Args:
        config: all choices, the same on every rank.
        on_step: called with the ``StepRecord`` of each step.
        predictor: step time, in place of the one that is fitted here, until it fails.
        progress: called while weights are read.
        compiling: called while the model is compiled.

    Raises:
        ValueError: for what cannot be used (see ``build_rank``).
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_step: Callable[[StepRecord], None] | None,
        predictor: Predictor | None,
        progress: Progress | None,
        compiling: Progress | None,
    ) -> None:
        self._config = config
        if predictor is not None:
            check_predictor(predictor)
        # the files are rank 0's; whether they can be written is known before weights are read
        writes = config.mesh.world_size == 1 or os.environ.get("RANK", "0") == "0"
        if writes and config.metrics.trace:
            claim_trace(config.metrics.trace)
        path = config.metrics.path if writes else None
        self._step_log = StepLog(path) if path else None
        # apart from the log of steps: one may fail without the other
        self._on_step = None if on_step is None else StepListener(on_step)
        self._ownership = Ownership()
        self._engine: Engine | None = None
        self._trace: Trace | None = None
        self._leaves: RankLeaves | None = None
        self._driver: Driver | None = None
        self.follower: Follower | None = None
        try:
            key = mesh_key(config.mesh.key) if config.mesh.world_size > 1 else None
            rank = build_rank(config, progress=progress, compiling=compiling)
            self._trace, self._leaves = rank.trace, rank.leaves
            if rank.mesh.world_size > 1:
                self._driver, self.follower = _join(rank, key)
            if self.follower is None:
                self._engine = build_engine(
                    rank, config, crew=self._driver, predictor=predictor, on_step=self._record
                )
                self._ownership = self._engine.ownership
            if self._driver is not None:
                self._driver.tell_ready(self._engine)
        except BaseException as error:
            self.close(error)
            raise

    @property
    def engine(self) -> Engine:
        """The engine of rank 0.

        Raises:
            ValueError: after ``close``, and on every rank of a mesh but the first.
        """
        if self.follower is not None:
            raise ValueError("LLM.engine must be used on rank 0 alone; call follow() on the others")
        if self._engine is None:
            raise ValueError("LLM must be open, got one that was closed; make a new LLM")
        return self._engine

    @property
    def is_here(self) -> bool:
        """Return whether this process opened it: a fork has a copy that it must not use."""
        return self._ownership.is_here

    def claim(self, name: str, *, ends_alone: bool = True) -> AbstractContextManager[Claim]:
        """The use of this rank's part for one call.

        On a mesh calls do not wait for one another: each rank would choose an order of its own.
        """
        return self._ownership.claim(
            name,
            ends_alone=ends_alone,
            remedy="exhaust or close its stream first, or use AsyncEngine",
            waits=self._config.mesh.world_size == 1,
        )

    @contextmanager
    def idle_engine(self, name: str, *, ends_alone: bool = True) -> Iterator[tuple[Engine, Claim]]:
        """The engine, for one call at a time; whatever interrupts it ends what still runs."""
        with self.claim(name, ends_alone=ends_alone) as claim:
            engine = self.engine
            if engine.has_work:
                raise ValueError(
                    f"{name} must have an idle engine, got one with requests that were added to "
                    "it; step it until they are done, or use AsyncEngine"
                )
            try:
                yield engine, claim
            except GeneratorExit:
                raise
            except BaseException as error:
                engine.abort("cancelled")
                if self._driver is not None:
                    self._driver.tell_interrupted(error)
                raise

    def tell_outputs(self, outputs: list[RequestOutput]) -> None:
        """End a call on the other ranks, which return the same."""
        if self._driver is not None:
            self._driver.tell_outputs(outputs)

    def close(self, error: BaseException | None) -> None:
        """Release all of it (see ``LLM.close``); ``error`` is what ended the use of it."""
        if not self._ownership.is_here:
            return
        if self._engine is not None:
            self._engine.close()
        if self._driver is not None:
            self._driver.close(error)
        elif self._trace is not None and self._config.metrics.trace and self.follower is None:
            write_trace(self._config.metrics.trace, [self._trace.dump()])
        if self.follower is not None:
            self.follower.close(error)
        if self._leaves is not None:
            self._leaves.close()
        self._engine = self._driver = self.follower = self._trace = self._leaves = None
        if self._step_log is not None:
            self._step_log.close()

    def _record(self, record: StepRecord) -> None:
        if self._step_log is not None:
            self._step_log.write(record)
        if self._on_step is not None:
            self._on_step(record)


def _join(rank: Rank, key: MeshKey | None) -> tuple[Driver | None, Follower | None]:
    """This rank's tie to the others of its mesh."""
    from mnemosyne.joining.crew import Driver, Follower  # one process needs no channel

    return (Driver(rank, key), None) if rank.mesh.rank == 0 else (None, Follower(rank, key))
