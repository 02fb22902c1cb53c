"""Attention written out, for models without an engine; no oracle is imported, ranks start fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnemosyne.attention.chunked import Chunked, Reach
from mnemosyne.operators import TORCH, Rotary
from mnemosyne.parallel.feed_forward import own_rows
from mnemosyne.step_context import StepContext


class DenseAttend:
    """Attention over everything seen so far, written out; scores in the dtype of the queries.

    Args:
        windows: of the layers held.
        scale: factor on scores; unset: 1/sqrt(D).
    """

    def __init__(self, windows: Sequence[Reach], scale: float | None = None) -> None:
        self.windows = windows
        self.scale = scale
        self.past: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rotary: Rotary | None = None,
        sink_H: Tensor | None = None,
    ) -> Tensor:
        if rotary is not None:
            q_THD, k_TKD = TORCH.rotate(q_THD, *rotary), TORCH.rotate(k_TKD, *rotary)
        if layer in self.past:
            k_TKD = torch.cat((self.past[layer][0], k_TKD))
            v_TKD = torch.cat((self.past[layer][1], v_TKD))
        self.past[layer] = k_TKD, v_TKD
        groups = q_THD.shape[1] // k_TKD.shape[1]
        k_SHD, v_SHD = (x.repeat_interleave(groups, dim=1) for x in (k_TKD, v_TKD))
        keys = torch.arange(len(k_SHD))
        rows = keys[-len(q_THD) :, None]
        seen_TS = keys <= rows
        reach = self.windows[layer]
        if isinstance(reach, Chunked):
            seen_TS &= keys // reach.size == rows // reach.size
        elif reach is not None:
            seen_TS &= keys > rows - reach
        scores_HTS = torch.einsum("thd,shd->hts", q_THD, k_SHD)
        scores_HTS *= q_THD.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores_HTS = scores_HTS.masked_fill(~seen_TS, float("-inf"))
        if sink_H is not None:
            sinks_HT1 = sink_H[:, None, None].expand(-1, len(q_THD), 1)
            scores_HTS = torch.cat((scores_HTS, sinks_HT1), dim=-1)
        weights_HTS = scores_HTS.softmax(dim=-1)[..., : len(k_SHD)]
        return torch.einsum("hts,shd->thd", weights_HTS, v_SHD)


def dense_context(windows: Sequence[Reach], scale: float | None = None) -> StepContext:
    """Make what the layers of a decoder meet where there is no engine."""
    return StepContext(DenseAttend(windows, scale), own_rows)
