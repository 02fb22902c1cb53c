"""Hidden states from stage to stage, step after step, with no step waiting for another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mnemosyne.parallel.mesh import Mesh
from mnemosyne.parallel.trace import Trace

if TYPE_CHECKING:
    from mnemosyne.parallel.stage import StepSchedule

RECEIVE_BUFFERS = 2  # one is read by the step that runs, one fills meanwhile


class LinkError(RuntimeError):
    """A neighbouring stage cannot be reached. The message says which rank, step and operation."""


@dataclass(frozen=True, slots=True, eq=False)
class _Receive:
    """An input on its way, and the memory it was lent."""

    buffer: Tensor
    input_TE: Tensor
    work: dist.Work


@dataclass(frozen=True, slots=True, eq=False)
class _Send:
    """An output on its way; nobody else may hold its memory alive."""

    step: int
    output_TE: Tensor
    work: dist.Work


class Pipeline:
    """The stage of this rank, and its links to the stage before and the stage after.

    All stages of one (kvp, tp) lane must be given the same steps in the same order. A stage keeps
    ``RECEIVE_BUFFERS`` inputs, and an output for each of the at most ``pp`` sends on their way.

    Args:
        mesh: of 2 or more stages. On nccl its groups must be lazily initialised (no ``device_id``):
            in others a send queues behind a receive that was posted ahead.
        width: E of the hidden states.
        dtype: of the hidden states.
        device: of the hidden states.
        trace: records when this rank received, computed and sent.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        trace: Trace | None = None,
    ) -> None:
        assert mesh.pp.degree > 1, "one stage needs no pipeline"
        self._axis = mesh.pp
        self._label = mesh.label
        self._width = width
        self._dtype = dtype
        self._trace = trace
        self._is_first = mesh.pp.index == 0
        self._is_last = mesh.pp.index == mesh.pp.degree - 1
        # Imported lazily: it takes a second and sets an environment variable, for stages alone.
        from mnemosyne.parallel.stage import build_stage

        self._build_stage = partial(build_stage, mesh.pp, width=width, dtype=dtype)
        self._schedules: dict[int, StepSchedule] = {}  # by number of rows
        self._step = -1  # the last one begun
        self._expected: deque[int] = deque()  # rows of announced steps whose receive is not posted
        self._receives: deque[_Receive] = deque()
        self._sends: deque[_Send] = deque()
        empty = torch.empty(0, dtype=dtype, device=device)
        self._free_buffers = [empty] * RECEIVE_BUFFERS

    @torch.inference_mode()
    def expect(self, num_rows: int) -> None:
        """Announce a coming step, so that its input arrives while another one is computed.

        Optional. Announced steps must be run, in the order in which they were announced.

        Args:
            num_rows: T of the step.

        Raises:
            LinkError: if the stage before cannot be reached.
        """
        if not self._is_first:
            self._expected.append(num_rows)
            self._post_receives()

    @torch.inference_mode()
    def run(
        self,
        forward: Callable[[Tensor], Tensor],
        num_rows: int,
        first_input: Tensor | None = None,
        *,
        step: int,
    ) -> Tensor | None:
        """Run a step on this stage: receive its input, compute, start to send its output.

        Args:
            forward: computes the stage. It is given ``first_input`` on the first stage, else
                hidden states [T, E], whose memory is used again once it has returned, and returns
                hidden states [T, E] in memory of their own.
            num_rows: T, equal on all stages.
            first_input: token ids, int64 [T]; first stage only.
            step: index of the plan, for errors.

        Returns:
            The hidden states on the last stage, None elsewhere.

        Raises:
            LinkError: if a neighbouring stage cannot be reached. What ``forward`` raises comes
                through as it is, with a note of rank and step.
        """
        self._step = step
        schedule = self._schedule(num_rows)
        received = None if self._is_first else self._receive(num_rows)
        input = first_input if received is None else received.input_TE
        assert input is not None, "the first stage is given its input"
        with self._span("compute"):
            output_TE = self._compute(schedule, forward, input)
        self._check_output(output_TE, num_rows, received)
        if received is not None:
            self._free_buffers.append(received.buffer)
            self._post_receives()
        if not self._is_last:
            self._send(schedule, output_TE)
        schedule.forget()
        return output_TE if self._is_last else None

    def drain(self) -> None:
        """Wait until the next stage has taken every output.

        Raises:
            LinkError: if it cannot be reached.
        """
        while self._sends:
            self._wait_for_oldest_send()

    def _schedule(self, num_rows: int) -> StepSchedule:
        if num_rows not in self._schedules:
            self._schedules[num_rows] = self._build_stage(num_rows)
        return self._schedules[num_rows]

    def _post_receives(self) -> None:
        """Start as many of the announced receives as there are buffers."""
        while self._expected and self._free_buffers:
            num_rows, buffer = self._expected.popleft(), self._free_buffers.pop()
            num_elements = num_rows * self._width
            if buffer.numel() < num_elements:
                buffer = torch.empty(num_elements, dtype=buffer.dtype, device=buffer.device)
            input_TE = buffer[:num_elements].view(num_rows, self._width)
            try:
                work = self._schedule(num_rows).receive(input_TE)
            except RuntimeError as error:
                raise self._link_error("receive", num_rows, self._step) from error
            self._receives.append(_Receive(buffer, input_TE, work))

    def _receive(self, num_rows: int) -> _Receive:
        if not self._receives:
            self.expect(num_rows)
        received = self._receives.popleft()
        assert len(received.input_TE) == num_rows, "steps run in the order they are announced in"
        with self._span("recv"):
            try:
                received.work.wait()
            except RuntimeError as error:
                raise self._link_error("receive", num_rows, self._step) from error
        return received

    def _compute(
        self, schedule: StepSchedule, forward: Callable[[Tensor], Tensor], input: Tensor
    ) -> Tensor:
        try:
            return schedule.compute(forward, input)
        except BaseException as error:
            error.add_note(f"on {self._label}, in step {self._step}")
            raise

    def _send(self, schedule: StepSchedule, output_TE: Tensor) -> None:
        with self._span("send"):
            try:
                work = schedule.send()
            except RuntimeError as error:
                raise self._link_error("send", len(output_TE), self._step) from error
        self._sends.append(_Send(self._step, output_TE, work))
        while self._sends and self._sends[0].work.is_completed():
            self._sends.popleft()
        # With at most pp steps in flight this never waits, however slow the next stage is. To wait
        # for every send at once would let only one step into the pipeline.
        while len(self._sends) > self._axis.degree:
            self._wait_for_oldest_send()

    def _wait_for_oldest_send(self) -> None:
        sent = self._sends.popleft()
        with self._span("wait"):
            try:
                sent.work.wait()
            except RuntimeError as error:
                raise self._link_error("send", len(sent.output_TE), sent.step) from error

    def _check_output(self, output_TE: Tensor, num_rows: int, received: _Receive | None) -> None:
        """Check what the next stage counts on: else the transport alone would notice, by dying."""
        assert output_TE.shape == (num_rows, self._width), f"got {tuple(output_TE.shape)}"
        assert output_TE.dtype == self._dtype, f"got {output_TE.dtype}"
        if received is not None:
            memory = output_TE.untyped_storage().data_ptr()
            assert memory != received.buffer.data_ptr(), "a stage must not return its input"

    def _link_error(self, verb: str, num_rows: int, step: int) -> LinkError:
        end = f"to stage {self._axis.index + 1}"
        if verb == "receive":
            end = f"from stage {self._axis.index - 1}"
        return LinkError(f"{self._label}, step {step}: {verb} of {num_rows} rows {end} failed")

    def _span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._trace is None else self._trace.span(name)
