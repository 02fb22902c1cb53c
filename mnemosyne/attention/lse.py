"""The log-sum-exp merge: partial attention over parts of the keys becomes attention over all.

>>> import torch
>>> q, k, v = torch.randn(1, 2, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
>>> def attend(k, v):
...     score = torch.einsum("thd,shd->ths", q, k)
...     return torch.einsum("ths,shd->thd", score.softmax(-1), v), score.logsumexp(-1)
>>> (left, left_lse), (right, right_lse) = attend(k[:4], v[:4]), attend(k[4:], v[4:])
>>> out, lse = merge_partials(torch.stack((left, right)), torch.stack((left_lse, right_lse)))
>>> torch.testing.assert_close((out, lse), attend(k, v))
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_partials(out_RTHD: Tensor, lse_RTH: Tensor) -> tuple[Tensor, Tensor]:
    """Combine R partial results into attention over the union of their keys.

    Args:
        out_RTHD: partial outputs, each normalised over its own keys only; 0 where it saw none.
        lse_RTH: natural-log LSE of each partial, float32 or wider; -inf marks a row
            that saw no key (a causal shard that starts after the query).

    Returns:
        ``out_THD`` in the dtype of ``out_RTHD`` and ``lse_TH`` in the dtype of ``lse_RTH``.
        A row that no partial saw comes back as (0, -inf).

    Raises:
        ValueError: if ``lse_RTH`` is narrower than float32, or the shapes do not belong together.

    Source: online-softmax rescaling, Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    if lse_RTH.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse_RTH must be float32 or float64, got {lse_RTH.dtype}; cast it first")
    if out_RTHD.shape[:-1] != lse_RTH.shape:
        raise ValueError(
            f"lse_RTH must have the shape of out_RTHD without its last dim, "
            f"{tuple(out_RTHD.shape[:-1])}, got {tuple(lse_RTH.shape)}; "
            "stack both over the same partials"
        )
    lse_TH = torch.logsumexp(lse_RTH, dim=0)
    # Not exp(lse_R - lse): these sum to 1 even where float32 leaves a large LSE few digits. The
    # softmax of -inf alone is nan, the weight of a row that no partial saw 0.
    weight_RTH = torch.softmax(lse_RTH, dim=0).masked_fill(lse_TH.isneginf(), 0.0)
    # A product and a sum, not a matrix product: on a GPU that one may round to TF32.
    out_THD = (weight_RTH.unsqueeze(-1) * out_RTHD).sum(dim=0)
    return out_THD.to(out_RTHD.dtype), lse_TH


def with_sink(out_THD: Tensor, lse_TH: Tensor, sink_H: Tensor) -> Tensor:
    """Attention among whose keys is one per head that takes a share and gives nothing.

    Its logit s turns the denominator e^lse into e^lse + e^s, and so the result into
    out * e^lse / (e^lse + e^s).

    Args:
        out_THD: attention over all other keys; once partials are merged.
        lse_TH: their natural-log LSE, float32 or wider.
        sink_H: logits, any floating dtype.

    Returns:
        ``[T, H, D]`` in the dtype of ``out_THD``.

    Source: Xiao et al. 2023, arXiv:2309.17453, with a learned logit in place of a token.
    """
    share_TH1 = torch.sigmoid(lse_TH - sink_H.to(lse_TH.dtype)).unsqueeze(-1)
    return (out_THD * share_TH1).to(out_THD.dtype)


def merge_into(out_THD: Tensor, lse_TH: Tensor, more_THD: Tensor, more_lse_TH: Tensor) -> None:
    """Fold one more partial into a running result, in place.

    For partials that come one after the other: memory stays that of one of them. The running
    result starts as (0, -inf) or as the first partial.

    Args:
        out_THD: running output, float32 or wider; overwritten. May be a view of any strides.
        lse_TH: its natural-log LSE in the same dtype; overwritten.
        more_THD: the partial to add, any floating dtype; 0 where it saw no key.
        more_lse_TH: its natural-log LSE in the dtype of ``lse_TH``, -inf where it saw no key.
    """
    assert out_THD.dtype == lse_TH.dtype == more_lse_TH.dtype, "statistics share one wide dtype"
    # The new part has weight e^b / (e^a + e^b) = sigmoid(b - a). Where both are -inf that is nan,
    # and any weight will do, since both outputs are 0.
    weight_TH = torch.sigmoid(more_lse_TH - lse_TH).nan_to_num_(nan=0.0)
    out_THD.lerp_(more_THD.to(out_THD.dtype), weight_TH.unsqueeze(-1))
    torch.logaddexp(lse_TH, more_lse_TH, out=lse_TH)
