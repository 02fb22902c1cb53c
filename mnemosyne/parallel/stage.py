"""One stage for one number of rows: torch's pipeline stage, driven a step at a time.

The public schedules wait for every send at the end of a call, which would let one step at a time
into the pipeline; this one leaves receives, steps and sends to its caller. For that it reaches
behind the public interface of ``torch.distributed.pipelining``, in this file alone;
``tests/parallel/test_stage.py`` names each hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from mnemosyne.parallel.mesh import Axis

StageFunction = Callable[[Tensor], Tensor]


class StepModule(nn.Module):
    """Stands in for the layers of a stage: calls the function of a step, arguments bound in it."""

    def forward(self, x: Tensor, *, function: StageFunction) -> Tensor:
        return function(x)


class StepSchedule(PipelineScheduleSingle):
    """Forward only, and nothing is waited for: the caller orders receives, steps and sends.

    Args:
        stage: from ``build_stage``.
    """

    def __init__(self, stage: PipelineStage) -> None:
        super().__init__(stage, n_microbatches=1)
        self._our_stage = stage
        # The library would have all stages vote on whether shapes are known, for each stage object:
        # a round trip through a pipeline that is full of steps. Ours are known, always.
        if hasattr(stage, "_inference_mode"):
            from torch.distributed.pipelining._utils import InferenceMode  # not in torch 2.11

            stage._inference_mode = InferenceMode.STATIC
        stage._prepare_forward_infra(1, ())

    def receive(self, input_TE: Tensor) -> dist.Work:
        """Start to receive from the stage before."""
        self._set_input(input_TE)
        return _start(self._our_stage.get_fwd_recv_ops(0))

    def compute(self, function: StageFunction, input: Tensor) -> Tensor:
        """Run a step.

        Args:
            function: computes the stage.
            input: ids [T] of the first stage; hidden states [T, E] that have arrived, of others.
        """
        if not self._our_stage.is_first:
            self._set_input(input)
        try:
            self._step_microbatches([(input,)], [{"function": function}])
        except RuntimeError as error:
            # The library hides what the function raised behind a dump of its arguments.
            failure = error.__cause__ or error
        else:
            (output_TE,), _ = self._our_stage.fwd_cache[0]
            return output_TE
        raise failure

    def send(self) -> dist.Work:
        """Start to send the output of the step to the next stage, which must stay as it is."""
        return _start(self._our_stage.get_fwd_send_ops(0))

    def forget(self) -> None:
        """Let go of the input and output of the step."""
        self._our_stage.clear_runtime_states()

    def _set_input(self, input_TE: Tensor) -> None:
        (info,) = self._our_stage.args_recv_info[0]
        info.buffer = input_TE

    def _step_microbatches(
        self,
        arg_mbs: list[Any] | None = None,
        kwarg_mbs: list[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs)
        self._our_stage.forward_one_chunk(0, arg_mbs[0], kwarg_mbs[0])


def build_stage(axis: Axis, num_rows: int, *, width: int, dtype: torch.dtype) -> StepSchedule:
    """The stage of this rank for steps of ``num_rows`` rows; no message is exchanged for it.

    Args:
        axis: the stages.
        num_rows: T.
        width: E.
        dtype: of hidden states.
    """
    # On the meta device the stage allocates no buffer of its own: it is lent one for each step.
    meta = torch.device("meta")
    hidden_TE = torch.empty(num_rows, width, dtype=dtype, device=meta)
    ids_T = torch.empty(num_rows, dtype=torch.int64, device=meta)
    stage = PipelineStage(
        StepModule(),
        stage_index=axis.index,
        num_stages=axis.degree,
        device=meta,
        input_args=ids_T if axis.index == 0 else hidden_TE,
        output_args=hidden_TE,
        group=axis.group,
    )
    return StepSchedule(stage)


def _start(ops: list[dist.P2POp]) -> dist.Work:
    # Not as a batch: on nccl that puts both directions of a stage in one queue.
    (op,) = ops
    peer = {"group_src" if op.op is dist.irecv else "group_dst": op.group_peer}
    work = op.op(op.tensor, group=op.group, **peer)
    assert work is not None
    return work
