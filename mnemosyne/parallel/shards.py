"""Which part of a parameter this rank holds, and its place in memory once it is to be filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnemosyne.kernels.cpu.memory import huge_zeros

Slices = tuple[slice, ...]


def held_slices(parameter: Tensor) -> Slices:
    """The part of the whole parameter that this rank holds, a slice per dim.

    Args:
        parameter: a DTensor, or a plain tensor, which is held whole.
    """
    # By the protocol that checkpoints use of DTensors: one process need not import them (0.6 s).
    create_chunk_list: Any = getattr(parameter, "__create_chunk_list__", None)
    if create_chunk_list is None:
        return tuple(slice(0, size) for size in parameter.shape)
    (chunk,) = create_chunk_list()
    return tuple(
        slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )


def allocate(owner: nn.Module, attribute: str, device: torch.device | str) -> Tensor:
    """The memory of a parameter on this rank, unset if it was on the meta device.

    A parameter of the meta device, DTensor or not, is replaced by a plain one of the shape that
    this rank holds: layers compute on local tensors.

    Args:
        owner: the module that has the parameter.
        attribute: the name it has there.
        device: where a parameter of the meta device goes; others stay where they are.
    """
    parameter = owner.get_parameter(attribute)
    if not parameter.is_meta:
        return parameter.data
    shape = tuple(held.stop - held.start for held in held_slices(parameter))
    if torch.device(device).type == "cpu":
        local = huge_zeros(shape, parameter.dtype)
    else:
        local = torch.empty(shape, dtype=parameter.dtype, device=device)
    owner.register_parameter(attribute, nn.Parameter(local, requires_grad=False))
    return local
