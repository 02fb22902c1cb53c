"""Sums and gathers over an axis of the mesh, for gloo on CPU and nccl on GPUs, in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from mnemosyne.parallel.board import BOARD_BYTES
from mnemosyne.parallel.mesh import Axis, Mesh

# Up to this size a message costs by the round, not by the byte. gloo goes round a ring for a sum,
# and hands every collective to threads of its own; sends and receives go out at once.
SMALL_BYTES = 1 << 19


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks of an axis; the same bits on each of them.

    Args:
        x: of the same shape and dtype on every rank; its memory may be used for the sum.
        axis: the ranks; with degree 1 ``x`` comes back as it is.
    """
    if axis.group is None:
        return x
    if axis.board is not None and x.nbytes <= BOARD_BYTES:
        wide = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype
        return all_gather(x, axis).sum(0, dtype=wide).to(x.dtype)
    x = x.contiguous()
    is_power_of_two = axis.degree & (axis.degree - 1) == 0
    if not (x.is_cpu and x.nbytes <= SMALL_BYTES and is_power_of_two):
        dist.all_reduce(x, group=axis.group)
        return x
    # Sums of 2, 4, 8 ... ranks: both sides of a pair add the same two numbers, in either order.
    distance = 1
    while distance < axis.degree:
        other, peer = torch.empty_like(x), axis.index ^ distance
        received = dist.irecv(other, group=axis.group, group_src=peer)
        dist.send(x, group=axis.group, group_dst=peer)
        assert received is not None, "this rank is on the axis"
        received.wait()
        x = x + other
        distance *= 2
    return x


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """The tensors of all ranks of an axis, on their way.

    ``wait()`` gives ``[degree, *x.shape]`` in the order of the axis, once all have come; it is
    called once. On CUDA the stream waits, not the caller.
    """

    wait: Callable[[], Tensor]


def start_all_gather(x: Tensor, axis: Axis) -> Gather:
    """Start to gather the tensors of all ranks of an axis; what follows runs meanwhile.

    Args:
        x: of the same shape and dtype on every rank; it must stay as it is until the end.
        axis: the ranks.
    """
    if axis.group is None:
        return Gather(lambda: x[None])
    if axis.board is not None and x.nbytes <= BOARD_BYTES:
        axis.board.post(x)
        return Gather(partial(axis.board.wait, x))
    x = x.contiguous()
    gathered = torch.empty((axis.degree, *x.shape), dtype=x.dtype, device=x.device)
    works: list[dist.Work | None] = []
    if not x.is_cpu:
        works = [dist.all_gather(list(gathered.unbind()), x, group=axis.group, async_op=True)]
        return Gather(partial(_finish, works, gathered, x))
    gathered[axis.index] = x
    peers = [index for index in range(axis.degree) if index != axis.index]
    works = [dist.irecv(gathered[peer], group=axis.group, group_src=peer) for peer in peers]
    works += [dist.isend(x, group=axis.group, group_dst=peer) for peer in peers]
    return Gather(partial(_finish, works, gathered, x))


def _finish(works: list[dist.Work | None], gathered: Tensor, sent: Tensor) -> Tensor:
    """Wait for all; ``sent`` is an argument so that its memory lives until then."""
    for work in works:
        assert work is not None, "this rank is on the axis"
        work.wait()
    return gathered


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """The tensors of all ranks of an axis.

    Args:
        x: of the same shape and dtype on every rank.
        axis: the ranks.

    Returns:
        ``[degree, *x.shape]`` in the order of the axis.
    """
    return start_all_gather(x, axis).wait()


def gather_counts(value: int, mesh: Mesh) -> list[int]:
    """The counts of all ranks of a mesh, by rank; every rank calls it at once."""
    if mesh.world_size == 1:
        return [value]
    counts = torch.zeros(mesh.world_size, dtype=torch.int64)  # on CPU: gloo is there on every mesh
    counts[mesh.rank] = value
    dist.all_reduce(counts)
    return [int(count) for count in counts]


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A tensor on its way between two ranks of an axis; it must stay as it is until the end."""

    x: Tensor  # sent, or filled
    work: dist.Work
    axis_name: str  # for reports about a rank that waits here

    def wait(self) -> Tensor:
        """The tensor, once it has come or may be written to again."""
        self.work.wait()
        return self.x


def start_message(
    x: Tensor, axis: Axis, *, to: int | None = None, of: int | None = None
) -> Message:
    """Start to send a tensor to one rank of an axis, or to fill it with what that one sends.

    Both ends of a pair must start the messages that pass between them in the same order.

    Args:
        x: on the CPU, contiguous, of the same shape and dtype on both ranks.
        axis: the ranks.
        to: receives it.
        of: sends it.
    """
    assert x.is_cpu, "nccl wants the messages of a pair in groups"
    if to is not None:
        work = dist.isend(x, group=axis.group, group_dst=to)
    else:
        work = dist.irecv(x, group=axis.group, group_src=of)
    assert work is not None, "this rank is on the axis"
    return Message(x, work, axis.name)
