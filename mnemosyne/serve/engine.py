"""The loop: take requests, plan a step, run it, hand out tokens. One loop for every executor."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection

from mnemosyne.metrics import StepListener, StepRecord, percentiles
from mnemosyne.request import Piece, Request, RequestOutput, Sampled, SamplingParams
from mnemosyne.schedule.plan import Chunk, Executor, Plan, StepResult
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.serve.active import Active
from mnemosyne.serve.intake import Given, Intake
from mnemosyne.serve.ownership import Ownership
from mnemosyne.serve.prompts import Prompt
from mnemosyne.serve.records import note_hit, step_record

log = logging.getLogger(__name__)

MAX_ERRORS = 4096  # steps that the error of the prediction is told over


class Engine:
    """Admit, plan, step, sample, stream.

    One user at a time: while somebody claims it (see ``ownership``), and in a fork of its process,
    its methods are refused to all others with a ValueError.

    Args:
        scheduler: decides what a step holds.
        executor: runs it.
        intake: checks prompts and parameters.
        on_step: called with the record of each finished step, until it raises: that is logged,
            and requests go on.
        clock: seconds; the simulator brings its own.
        measure: fits the step times that the scheduler predicts; put off until it is needed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        intake: Intake,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        measure: Callable[[], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.intake = intake
        self.on_step = on_step
        self.clock = clock
        self.ownership = Ownership()
        self.logs_text = True  # whether what prompts and outputs say may stand in the log
        self._executor = executor
        self._measure = measure
        self._active: dict[int, Active] = {}
        self._in_flight: deque[tuple[Plan, float]] = deque()
        self._started_s = clock()
        self._num_missed = 0  # deadlines, in the step that is being handed out
        self._errors: deque[float] = deque(maxlen=MAX_ERRORS)  # of predicted step times

    @property
    def has_work(self) -> bool:
        return bool(self._active)

    @property
    def on_step(self) -> StepListener | None:
        """The callback for the record of each step."""
        return self._on_step

    @on_step.setter
    def on_step(self, callback: Callable[[StepRecord], None] | None) -> None:
        self._on_step = None if callback is None else StepListener(callback)

    def add(self, prompt: Prompt, params: SamplingParams, given: Given = ()) -> list[RequestOutput]:
        """Accept a prompt; its tokens come with the next steps.

        Args:
            prompt: text or token ids.
            params: how to sample; ``params.n`` requests are made.
            given: tokens that each sample has already, as after the death of an engine that had
                the same ``params``, seed included; None for one that is not wanted. They count as
                its output, and what follows is what would have followed there. Only new tokens
                come in pieces, and in ``logprobs``.

        Returns:
            One output per sample that is wanted. They fill as the engine steps; one whose given
            tokens end it has its ``finish_reason`` already.

        Raises:
            ValueError: if the prompt is refused; nothing else is affected.
        """
        with self.ownership.use("Engine.add"):
            capacity = self.scheduler.ledger.max_request_tokens()
            requests = self.intake.requests(prompt, params, self.clock(), capacity, given)
            for request in requests[:1]:
                self.scheduler.check_fits(request)  # they are of one size
            if len(self._active) + len(requests) > 1:
                self.measure()
            started = [self._start(request) for request in requests]
            return [self._accept(active) for active in started]

    def measure(self) -> None:
        """Measure step times now, if that was put off and nothing runs.

        One request alone needs none; the tokens of several are protected from each other's
        prompts by them. Who takes requests as they come calls this before the first one.
        """
        if self._measure is not None and not self._in_flight and not self.scheduler.num_running:
            measure, self._measure = self._measure, None
            self.scheduler.clear_cache()  # it writes to any page
            measure()

    def clear_cache(self) -> None:
        """Forget all cached prefixes, on disk as well; what runs keeps what it has."""
        with self.ownership.use("Engine.clear_cache"):
            self.scheduler.clear_cache(on_disk=True)

    def accept(self, request: Request, *, is_filled: bool = False) -> RequestOutput:
        """Queue a request that is checked and numbered already, as a replay makes them.

        Args:
            request: of any kind.
            is_filled: see ``Scheduler.add``.

        Raises:
            ValueError: if no empty cache could hold it.
        """
        with self.ownership.use("Engine.accept"):
            return self._accept(self._start(request), is_filled=is_filled)

    def _start(self, request: Request) -> Active:
        return Active.start(request, self.intake.tokenizer)

    def _accept(self, active: Active, *, is_filled: bool = False) -> RequestOutput:
        output, request = active.output, active.request
        if output.finish_reason is None:
            output.metrics.deadline_s = self.scheduler.add(request, is_filled=is_filled)
            self._active[request.request_id] = active
        return output

    def prediction_error(self) -> dict[int, float]:
        """Percentiles of ``|predicted / actual - 1|`` over recent steps; nan if there are none.

        Steps that ran before step times were measured do not count.
        """
        return percentiles(self._errors)

    @property
    def step_in_flight(self) -> tuple[int, float] | None:
        """Index and predicted seconds of the step that is waited for; any thread may ask."""
        try:
            plan, _ = self._in_flight[0]
        except IndexError:
            return None
        return plan.index, plan.predicted_s

    def unfinished(self) -> list[RequestOutput]:
        """Outputs of the requests that still run or wait."""
        return [active.output for active in self._active.values()]

    def cancel(self, request_id: int) -> None:
        """End a request now; its pages are free at the next step. Unknown ids are ignored."""
        with self.ownership.use("Engine.cancel"):
            active = self._active.get(request_id)
            if active is not None:
                self._finish(active, "cancelled")

    def step(self) -> list[Piece]:
        """Run one step.

        Returns:
            What each request of the step got: tokens, or how far its prompt is computed.
        """
        with self.ownership.use("Engine.step"):
            return self._step()

    def _step(self) -> list[Piece]:
        while len(self._in_flight) < self._executor.depth:
            planned_s = self.clock()
            plan = self.scheduler.plan(planned_s)
            if plan is None:
                break
            self._note_admitted(plan, planned_s)
            self._in_flight.append((plan, planned_s))
            self._executor.submit(plan)
        if not self._in_flight:
            return []
        plan, planned_s = self._in_flight[0]
        result = self._executor.collect()
        while result.index != plan.index:  # left over from a step that was interrupted
            result = self._executor.collect()
        self._in_flight.popleft()
        tokens = {request_id: sampled.token_id for request_id, sampled in result.sampled.items()}
        broken: Collection[int] = result.broken
        if result.error is not None:
            tokens = {chunk.request_id: 0 for chunk in plan.chunks}  # of requests that end here
            broken = tokens
        self.scheduler.complete(plan, tokens, broken, result.restored)
        for restore in plan.restores:
            if restore.request_id in self._active:
                num_tokens = self.scheduler.num_restored(restore.request_id)
                self._active[restore.request_id].note_restored(num_tokens)
        pieces = [
            self._advance_or_end(self._active[chunk.request_id], chunk, result)
            for chunk in plan.chunks
            if chunk.request_id in self._active
        ]
        self._record(plan, planned_s)
        if not self._active and not self._in_flight:
            self._save_rest()
        return pieces

    def _save_rest(self) -> None:
        """Hand what goes to the disk on, when no step follows that would."""
        while (plan := self.scheduler.plan_saves()) is not None:
            self._executor.submit(plan)
            self._executor.collect()

    def abort(self, reason: str, error: str | None = None) -> None:
        """End every request after a step was interrupted or failed, and be ready for new ones."""
        with self.ownership.use("Engine.abort"):
            self._abort(reason, error)

    def close(self) -> None:
        """Cancel every request, after a ``generate`` of another thread; others are cut off."""
        with self.ownership.take("LLM.close"):
            self._abort("cancelled", None)

    def _abort(self, reason: str, error: str | None) -> None:
        self.scheduler.reset([plan for plan, _ in self._in_flight])
        self._in_flight.clear()
        for active in self._active.values():
            active.output.error = error
            self._end(active.output, reason)
        self._active.clear()

    def _advance_or_end(self, active: Active, chunk: Chunk, result: StepResult) -> Piece:
        """Enter what a step brought for one request; what fails there ends that request alone."""
        try:
            return self._advance(active, chunk, result)
        except Exception as error:  # one request's own work, such as the decoding of its text
            log.exception("request %d failed", active.request.request_id)
            active.output.error = f"the request failed: {type(error).__name__}: {error}"
            if active.request.request_id in self._active:
                self._finish(active, "error")
            else:
                self._end(active.output, "error")
            return active.piece()

    def _advance(self, active: Active, chunk: Chunk, result: StepResult) -> Piece:
        """Enter what a step brought for one request."""
        output = active.output
        if result.error is not None:
            output.error = result.error
            self._finish(active, "error")
            return active.piece()
        if not chunk.is_decode:
            active.note_prefill(chunk, result.index)
        if output.prompt_logprobs is not None:
            found = result.prompt_logprobs.get((chunk.request_id, chunk.start), [])
            output.prompt_logprobs += found
        if not chunk.samples:
            return active.piece()
        sampled = result.sampled[chunk.request_id]
        if sampled.error is not None:
            output.error = sampled.error
            self._finish(active, "error")
            return active.piece()
        piece = self._take_token(active, sampled)
        if output.prompt_logprobs is None or chunk.is_decode:
            return piece
        return piece._replace(prompt_logprobs=tuple(output.prompt_logprobs))

    def _take_token(self, active: Active, sampled: Sampled) -> Piece:
        output = active.output
        self._time_token(active)
        if output.logprobs is not None and sampled.logprobs is not None:
            output.logprobs.append(sampled.logprobs)
        text, reason = active.enter(sampled.token_id)
        if reason is not None:
            self._finish(active, reason)
        logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
        return active.piece((sampled.token_id,), text, logprobs)

    def _note_admitted(self, plan: Plan, now_s: float) -> None:
        tables, new = dict(plan.tables), set[int]()
        for admission in plan.admitted:
            metrics = self._active[admission.request_id].output.metrics
            if metrics.queued_s is not None:
                continue  # it was set back
            metrics.queued_s = now_s - metrics.arrival_s
            metrics.num_shards = len(tables[admission.request_id].extents)
            new.add(admission.request_id)
        for hit in plan.hits:
            if hit.request_id in new:
                output = self._active[hit.request_id].output
                note_hit(hit, output, self.intake.tokenizer, logs_text=self.logs_text)
        for request_id in plan.set_back:
            self._active[request_id].output.metrics.num_set_back += 1

    def _time_token(self, active: Active) -> None:
        now_s, metrics = self.clock(), active.output.metrics
        if active.last_token_s is None:
            metrics.ttft_s = now_s - metrics.arrival_s
            assert metrics.deadline_s is not None
            metrics.missed_deadline = metrics.ttft_s > metrics.deadline_s
            self._num_missed += metrics.missed_deadline
        else:
            metrics.tbt_s.append(now_s - active.last_token_s)
        active.last_token_s = now_s

    def _finish(self, active: Active, reason: str) -> None:
        self._end(active.output, reason)
        del self._active[active.request.request_id]
        self.scheduler.release(active.request.request_id)

    def _end(self, output: RequestOutput, reason: str) -> None:
        output.finish_reason = reason
        output.metrics.finished_s = self.clock()

    def _record(self, plan: Plan, planned_s: float) -> None:
        """Measure the step from its planning to here, learn from it, report it."""
        actual_s = self.clock() - planned_s
        self.scheduler.learn(plan, actual_s)
        num_missed, self._num_missed = self._num_missed, 0
        if self._measure is None and plan.predicted_s > 0 and actual_s > 0:
            self._errors.append(abs(plan.predicted_s / actual_s - 1))
        if self._on_step is None:
            return
        self._on_step(
            step_record(
                plan,
                self.scheduler,
                time_s=planned_s - self._started_s,
                actual_s=actual_s,
                num_missed=num_missed,
            )
        )
