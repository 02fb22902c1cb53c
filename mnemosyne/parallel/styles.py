"""How one module is cut over an axis: its parameters become DTensors, its output is completed.

DTensors only say which rank loads what. Once loaded the parameters are plain local tensors, and
what crosses ranks is one explicit collective per module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from mnemosyne.parallel.collectives import all_gather, all_reduce_sum
from mnemosyne.parallel.mesh import Axis
from mnemosyne.parallel.shards import held_slices


class ColumnParallel(ParallelStyle):
    """A linear layer of which each rank computes neighbouring outputs, from the whole input."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters()):
            _shard(module, name, device_mesh, dim=0)
        return module


class _SummedParallel(ParallelStyle):
    """A module of which each rank computes a part of all outputs; the parts are summed.

    Args:
        axis: the ranks.
        dims: over which dim each parameter is cut, by its name; others are whole on every rank.
        bias: the name of the bias of the outputs, which the sum takes from the first rank.
    """

    def __init__(self, axis: Axis, dims: dict[str, int], bias: str) -> None:
        super().__init__()
        self._axis, self._dims, self._bias = axis, dims, bias

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        axis = self._axis
        for name, _ in list(module.named_parameters()):
            if name in self._dims:
                _shard(module, name, device_mesh, dim=self._dims[name])
        if axis.index > 0:
            setattr(module, self._bias, None)

        def complete(module: nn.Module, args: tuple[Tensor, ...], out_TE: Tensor) -> Tensor:
            return all_reduce_sum(out_TE, axis)

        module.register_forward_hook(complete)
        return module


class RowParallel(_SummedParallel):
    """A linear layer of which each rank takes neighbouring inputs; the outputs are summed.

    Args:
        axis: the ranks.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis, {"weight": 1}, "bias")


class ExpertsParallel(_SummedParallel):
    """Stacked experts of which each rank holds neighbouring inner widths; outputs are summed.

    Args:
        axis: the ranks.
    """

    def __init__(self, axis: Axis) -> None:
        dims = {"gate": 1, "up": 1, "down": 2, "gate_bias": 1, "up_bias": 1}
        super().__init__(axis, dims, "down_bias")


class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank holds the rows of neighbouring words.

    Args:
        whole: the embedding, on the meta device.
        axis: the ranks that share it.
        look_up: rows of a table, from ids and the table.
    """

    weight: nn.Parameter

    def __init__(
        self, whole: nn.Module, axis: Axis, look_up: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        assert axis.device_mesh is not None
        self.register_parameter("weight", whole.get_parameter("weight"))
        _shard(self, "weight", axis.device_mesh, dim=0)
        self._words = held_slices(self.weight)[0]
        self._axis = axis
        self._look_up = look_up

    def forward(self, ids_T: Tensor) -> Tensor:
        """Embeddings [T, E] of word ids, int64 [T]."""
        is_elsewhere_T = (ids_T < self._words.start) | (ids_T >= self._words.stop)
        local_T = (ids_T - self._words.start).masked_fill(is_elsewhere_T, 0)
        x_TE = self._look_up(local_T, self.weight).masked_fill(is_elsewhere_T[:, None], 0.0)
        return all_reduce_sum(x_TE, self._axis)


class ShardedRMSNorm(nn.Module):
    """An RMSNorm of rows of which each rank holds neighbouring elements.

    Args:
        whole: the norm, on the meta device.
        eps: added to the mean of squares.
        offset: added to the weight.
        axis: the ranks that hold the elements, several of them the same ones where there are
            fewer shards than ranks.
        device_mesh: the shards.
    """

    weight: nn.Parameter

    def __init__(
        self, whole: nn.Module, *, eps: float, offset: float, axis: Axis, device_mesh: DeviceMesh
    ) -> None:
        super().__init__()
        self.register_parameter("weight", whole.get_parameter("weight"))
        _shard(self, "weight", device_mesh, dim=0)
        self._eps, self._offset = eps, offset
        self._axis = axis

    def forward(self, x_TE: Tensor) -> Tensor:
        """The normed elements of this rank; computed in float32 or wider."""
        wide = torch.promote_types(x_TE.dtype, torch.float32)
        x, weight = x_TE.to(wide), self.weight.to(wide) + self._offset
        squares_T1 = all_reduce_sum(x.square().sum(dim=-1, keepdim=True), self._axis)
        mean_T1 = squares_T1 / (self._axis.degree * x.shape[-1])
        return (x * (mean_T1 + self._eps).rsqrt() * weight).to(x_TE.dtype)


def gather_words(module: nn.Module, axis: Axis, vocab_size: int) -> None:
    """Let a module that gives logits of this rank's words give those of all words.

    Args:
        module: its output is ``[B, words of this rank]``.
        axis: the ranks that share the vocabulary.
        vocab_size: words of all ranks.
    """

    def complete(module: nn.Module, args: tuple[Tensor, Tensor], logits_BV: Tensor) -> Tensor:
        num_words = -(-vocab_size // axis.degree)
        # The last shard may be shorter; messages are of one size.
        padded_BV = F.pad(logits_BV, (0, num_words - logits_BV.shape[1]))
        return all_gather(padded_BV, axis).transpose(0, 1).flatten(1)[:, :vocab_size]

    module.register_forward_hook(complete)


def _shard(module: nn.Module, name: str, device_mesh: DeviceMesh, dim: int) -> None:
    """Cut a parameter into neighbouring parts, one for each rank of an axis."""
    parameter = module.get_parameter(name)
    assert parameter.is_meta, "parameters are cut before they are loaded"
    # Without a source of data nothing is sent: there are no values yet.
    whole, cut = parameter.detach(), [Shard(dim)]
    sharded = distribute_tensor(whole, device_mesh, cut, src_data_rank=None)
    module.register_parameter(name, nn.Parameter(sharded, requires_grad=False))
