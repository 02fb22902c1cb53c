"""The tokens that a sampler keeps: top-k, top-p and min-p, exact to the last tie."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log

import torch
from torch import Tensor

NUCLEUS_DEPTH = 1024  # most nuclei are smaller; a wider one is looked at again


def truncation_mask(
    scaled_BV: Tensor,
    *,
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
) -> Tensor:
    """Mask of the tokens that are left after top-k, then top-p, then min-p.

    Top-p keeps the fewest tokens whose probability reaches it, among those that top-k left.
    Of equally likely tokens the lower id is kept first.

    Args:
        scaled_BV: float64, logits over temperature, the largest of each row 0.
        top_k: of each row; 0 keeps all.
        top_p: of each row, in (0, 1]; 1 keeps all.
        min_p: of each row, in [0, 1]; tokens below ``min_p`` times the largest probability go.

    Returns:
        bool [B, V], at least one token per row.

    Source: nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751; min-p, Nguyen et al. 2024,
    arXiv:2407.01082.
    """
    floor_B1 = _column([log(p) if p else -inf for p in min_p], scaled_BV)
    mask_BV = scaled_BV >= floor_B1
    if any(top_k) or any(p < 1 for p in top_p):
        num_kept_B1, threshold_B1 = _cut(scaled_BV, top_k, top_p)
        mask_BV &= _leading(scaled_BV, num_kept_B1, threshold_B1)
    return mask_BV


def largest(values_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, and their ids; lower ids first among equals.

    Args:
        values_BV: no nan.
        k: the whole row if it is not longer.

    Returns:
        Values and int64 ids, both [B, min(k, V)], best first.
    """
    k = min(k, values_BV.shape[-1])
    if k == 0:
        return values_BV[:, :0], torch.empty_like(values_BV[:, :0], dtype=torch.int64)
    threshold_B1 = values_BV.topk(k).values[:, -1:]
    mask_BV = _leading(values_BV, torch.full_like(threshold_B1, k), threshold_B1)
    ids_BK = mask_BV.nonzero()[:, 1].view(-1, k)
    top_BK, order_BK = values_BV.gather(-1, ids_BK).sort(descending=True, stable=True)
    return top_BK, ids_BK.gather(-1, order_BK)


def _cut(scaled_BV: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The number of tokens that top-k and top-p keep of each row, and the value of the last one.

    Returns:
        int64 [B, 1] and float64 [B, 1].
    """
    vocab_size = scaled_BV.shape[-1]
    ks = [min(k or vocab_size, vocab_size) for k in top_k]
    depth = max((k for k in ks if k < vocab_size), default=1)
    if any(p < 1 and k == vocab_size for p, k in zip(top_p, ks, strict=True)):
        depth = min(max(depth, NUCLEUS_DEPTH), vocab_size)
    k_B1, p_B1 = _column(ks, scaled_BV), _column(top_p, scaled_BV)
    is_free_B1 = (k_B1 == vocab_size) & (p_B1 == 1)
    sum_B1 = scaled_BV.exp().sum(-1, keepdim=True)
    while True:
        top_BK = scaled_BV.topk(depth).values
        in_k_BK = torch.arange(depth, device=scaled_BV.device) < k_B1
        weight_BK = top_BK.exp() * in_k_BK
        total_B1 = torch.where(k_B1 <= depth, weight_BK.sum(-1, keepdim=True), sum_B1)
        mass_BK = weight_BK.cumsum(-1) / total_B1
        is_enough_B1 = (k_B1 <= depth) | (mass_BK[:, -1:] >= p_B1) | is_free_B1
        if depth == vocab_size or bool(is_enough_B1.all()):
            break
        depth = min(16 * depth, vocab_size)
    in_p_BK = (mass_BK - weight_BK / total_B1 < p_B1) | (p_B1 == 1)
    # A row of nan keeps nothing; it must not spoil the index.
    num_kept_B1 = (in_k_BK & in_p_BK).sum(-1, keepdim=True).clamp_(min=1)
    threshold_B1 = top_BK.gather(-1, num_kept_B1 - 1)
    return (
        num_kept_B1.masked_fill(is_free_B1, vocab_size),
        threshold_B1.masked_fill(is_free_B1, -inf),
    )


def _leading(values_BV: Tensor, num_B1: Tensor, threshold_B1: Tensor) -> Tensor:
    """Mask of the ``num`` largest values of each row, the smallest of which is ``threshold``."""
    mask_BV = values_BV >= threshold_B1
    if bool((mask_BV.sum(-1, keepdim=True) > num_B1).any()):
        above_BV = values_BV > threshold_B1
        tied_BV = mask_BV & ~above_BV
        room_B1 = num_B1 - above_BV.sum(-1, keepdim=True)
        mask_BV = above_BV | (tied_BV & (tied_BV.cumsum(-1) <= room_B1))
    return mask_BV


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value per row, [B, 1], float64."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
