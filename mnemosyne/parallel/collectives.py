"""Sums and gathers over an axis of the mesh, for gloo on CPU and nccl on GPUs, in every dtype."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mnemosyne.parallel.mesh import Axis, Mesh


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks of an axis; the same bits on each of them.

    Args:
        x: of the same shape and dtype on every rank; its memory may be used for the sum.
        axis: the ranks; with degree 1 ``x`` comes back as it is.
    """
    if axis.group is None:
        return x
    x = x.contiguous()
    dist.all_reduce(x, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """The tensors of all ranks of an axis.

    Args:
        x: of the same shape and dtype on every rank.
        axis: the ranks.

    Returns:
        ``[degree, *x.shape]`` in the order of the axis.
    """
    if axis.group is None:
        return x[None]
    gathered = torch.empty((axis.degree, *x.shape), dtype=x.dtype, device=x.device)
    dist.all_gather(list(gathered.unbind()), x.contiguous(), group=axis.group)
    return gathered


def smallest(value: int, mesh: Mesh) -> int:
    """The smallest of the values that the ranks of a mesh bring; every rank calls it at once."""
    if mesh.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64)  # on CPU: gloo is there on every mesh
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)
