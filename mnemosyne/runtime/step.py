"""One forward pass over the rows of a step: what the model layers call, and the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mnemosyne.attention.segments import Attend, AttentionBackend
from mnemosyne.cache.pages import PagePool
from mnemosyne.runtime.inputs import StepInputs


class Model(Protocol):
    """What the runtime needs of a decoder; it arrives as an argument."""

    def __call__(self, x: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states ``[T, E]`` of the packed rows."""

    def logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits ``[B, V]``, float32 or wider."""


class PagedAttention:
    """Stores the K and V of a step in the pool and attends over it: the ``Attend`` of one step.

    Args:
        pool: the cache of this rank.
        backend: how attention is computed.
        inputs: the rows of the step.
        windows: sliding window per layer, None for full attention.
        scale: factor on the scores.
    """

    def __init__(
        self,
        pool: PagePool,
        backend: AttentionBackend,
        inputs: StepInputs,
        *,
        windows: Sequence[int | None],
        scale: float,
    ) -> None:
        self._pool = pool
        self._backend = backend
        self._slots_T = inputs.slots_T
        self._windows = windows
        self._scale = scale
        device = inputs.slots_T.device
        self._prepared: dict[int | None, Any] = {
            window: backend.prepare(inputs.batch, window, device) for window in set(windows)
        }

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        self._pool.write(layer, self._slots_T, k_TKD, v_TKD)
        out_THD, _ = self._backend.attend(
            q_THD,
            self._pool.k[layer],
            self._pool.v[layer],
            self._prepared[self._windows[layer]],
            scale=self._scale,
        )
        return out_THD

    def feed_forward(self, mlp: Callable[[Tensor], Tensor], x_TE: Tensor) -> Tensor:
        """The MLP of a layer."""
        return mlp(x_TE)


@torch.inference_mode()
def forward(model: Model, inputs: StepInputs, attend: Attend) -> Tensor:
    """Hidden states ``[T, E]`` of a step, ready for ``model.logits``."""
    return model(inputs.token_ids_T, inputs.positions_T, attend)
