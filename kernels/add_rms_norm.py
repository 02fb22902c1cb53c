"""RMSNorm fused with the residual add before it: the stream is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 8192  # elements of a row; one program holds them, and twice as many spill


@triton.jit
def add_rms_norm_kernel(
    hidden,  # [T, E]
    delta,  # [T, E]
    weight,  # [E]
    total,  # [T, E]
    normed,  # [T, E]
    width,
    EPS: tl.constexpr,  # as an argument it would be rounded to float32
    WIDE: tl.constexpr,  # dtype of the statistics
    BLOCK_E: tl.constexpr,
):
    """One row, whole."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    inside = e < width
    at = row * width + e
    x = tl.load(hidden + at, mask=inside, other=0.0).to(WIDE)
    x += tl.load(delta + at, mask=inside, other=0.0).to(WIDE)
    # The stream is rounded before it is normed, as where the two are apart.
    stream = x.to(total.dtype.element_ty)
    tl.store(total + at, stream, mask=inside)
    x = stream.to(WIDE)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + EPS)
    gain = tl.load(weight + e, mask=inside, other=0.0).to(WIDE)
    tl.store(normed + at, (x * scale * gain).to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    hidden_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a sublayer's output to the residual stream, and norm the sum.

    Twin of ``hidden_TE + delta_TE`` followed by ``torch.nn.RMSNorm``.

    Args:
        hidden_TE: the residual stream, contiguous.
        delta_TE: what to add, in the dtype of ``hidden_TE``, contiguous.
        weight_E: gain of the norm.
        eps: added to the mean square.

    Returns:
        The sum ``hidden_TE`` and its normed copy, both in the dtype of ``hidden_TE``; statistics
        and products are float32 (float64 for float64 input), and each result rounds once.

    Raises:
        ValueError: if a row is wider than one program can hold.
    """
    num_rows, width = hidden_TE.shape
    if width > MAX_WIDTH:
        raise ValueError(
            f"width must be <= {MAX_WIDTH} for add_rms_norm, got {width}; use torch.nn.RMSNorm"
        )
    assert hidden_TE.shape == delta_TE.shape
    assert weight_E.shape == (width,)
    assert all(x.is_contiguous() for x in (hidden_TE, delta_TE, weight_E))
    total_TE, normed_TE = torch.empty_like(hidden_TE), torch.empty_like(hidden_TE)
    if num_rows:
        add_rms_norm_kernel[(num_rows,)](
            *(hidden_TE, delta_TE, weight_E, total_TE, normed_TE),
            width,
            EPS=eps,
            WIDE=tl.float64 if hidden_TE.dtype == torch.float64 else tl.float32,
            BLOCK_E=triton.next_power_of_2(width),
            num_warps=norm_warps(width),
        )
    return total_TE, normed_TE


def norm_warps(width: int) -> int:
    """Warps that hold a row with at most 16 elements per thread, 4 or more."""
    return max(4, triton.next_power_of_2(width) // 512)
