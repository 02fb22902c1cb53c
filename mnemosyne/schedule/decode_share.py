"""Which decodes run in a step when all of them together would take longer than its target."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import inf

from mnemosyne.config import ScheduleConfig
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.policy import Policy
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.ready import ReadyDecodes
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.work import Work


class DecodeShare:
    """Under ``mlfq`` as many decodes as fit into ``target_tbt``, those that got least first.

    Whoever is left out for too long goes before them, and pages stay where they are. Under other
    policies all decodes run: where a step costs much whatever it holds, that gives more tokens.
    The same where the target holds not even one decode, and with a fixed chunk.

    Where steps overlap a step takes no more than its share: decodes that gathered in one of several
    steps in flight would all wait for each other.

    Args:
        config: target time between tokens.
        policy: who goes first.
        predictor: step time.
        table: of prefill times.
        depth: steps that may be in flight.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        policy: Policy,
        predictor: Predictor,
        table: PrefillTable,
        depth: int,
    ) -> None:
        self._target_s = config.target_tbt_s if config.is_adaptive else inf
        self._key, self._patience_s = policy.decode_key, policy.patience_s
        self._predictor, self._table, self._depth = predictor, table, depth
        self._waits_since_s: dict[int, float] = {}  # of those left out, by request

    def clear(self) -> None:
        """Forget who waits."""
        self._waits_since_s.clear()

    def take(
        self,
        ready: ReadyDecodes,
        num_decoding: int,
        states: Mapping[int, RequestState],
        now_s: float,
    ) -> tuple[list[Chunk], Work]:
        """Take decodes out.

        Args:
            ready: all that may run.
            num_decoding: requests that decode, those of steps in flight included.
            states: of their requests.
            now_s: seconds on the clock of arrivals.
        """
        share = -(-num_decoding // self._depth)
        if self._key is None or self._fits(ready.work()):
            self._waits_since_s.clear()
            return ready.take(share, states)
        chunks = self._in_order(ready.chunks(), states, now_s)[:share]
        if not chunks or not self._fits(ready.work_of(chunks[:1], states)):
            return ready.take(share, states)

        def exceeds(count: int) -> bool:
            return not self._fits(ready.work_of(chunks[:count], states))

        count = bisect_left(range(2, len(chunks) + 1), True, key=exceeds) + 1
        taken = ready.take_these(chunks[:count], states)
        waits = self._waits_since_s
        self._waits_since_s = {request_id: waits.get(request_id, now_s) for request_id in ready}
        return taken

    def _fits(self, work: Work) -> bool:
        return all(self._predictor.predict(part) <= self._target_s for part in work)

    def _in_order(
        self, chunks: list[Chunk], states: Mapping[int, RequestState], now_s: float
    ) -> list[Chunk]:
        """Decodes, those that wait longest at the front, in the order in which they should run."""
        waits, factor, decode_key = self._waits_since_s, self._table.factor(), self._key
        assert decode_key is not None

        def key(chunk: Chunk) -> tuple[int, bool, float]:
            state = states[chunk.request_id]
            request = state.request
            if now_s - waits.get(chunk.request_id, now_s) >= self._patience_s:
                return request.priority, False, 0.0
            num_output = chunk.start - request.num_prompt_tokens + request.num_given
            level = decode_key(state, num_output * self._target_s, factor)
            return request.priority, True, level

        return sorted(chunks, key=key)
