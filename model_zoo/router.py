"""The choice of experts for a row, and their weights: every router is data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Router(NamedTuple):
    """The rule by which experts are chosen from the logits of a row.

    Equal choices go to the expert of the lower index, which ``torch.topk`` does not promise.
    """

    scores: str = "softmax"  # of logits: softmax over all or over the chosen, or sigmoid
    is_biased: bool = False  # whether logits have a bias
    is_corrected: bool = False  # whether something is added to the scores for the choice alone
    num_groups: int = 1  # of neighbouring experts
    kept_groups: int = 1  # of them, those whose two best scores sum to most, are chosen from
    normed: bool = False  # whether the weights of a row are divided by their sum
    eps: float = 0.0  # added to that sum
    factor: float = 1.0  # on the weights
    on_input: bool = False  # whether weights multiply what experts are given, not what they give


SOFTMAX = Router()


class Choice(NamedTuple):
    """The decision of a router, best expert first."""

    experts_TC: Tensor  # int64, C experts per row
    weights_TC: Tensor  # in the dtype of the logits
    margin: Tensor  # of the row that came closest to another choice, in what was compared


def choose(
    logits_TX: Tensor, router: Router, per_token: int, correction_X: Tensor | None = None
) -> Choice:
    """Choose the experts of each row.

    Args:
        logits_TX: float32 or wider, of X experts.
        router: how.
        per_token: experts of a row.
        correction_X: added to scores for the choice, where the router is corrected.
    """
    # In float64: torch rounds a number by its place in a tensor, a difference that is lost on
    # the way back to float32.
    scores_TX = logits_TX.double()
    if router.scores == "softmax":
        scores_TX = scores_TX.softmax(dim=-1)
    elif router.scores == "sigmoid":
        scores_TX = scores_TX.sigmoid()
    # Scores rise with logits, but may round to the same number where logits differ.
    wanted_TX = logits_TX
    if correction_X is not None:
        wanted_TX = scores_TX.to(logits_TX.dtype) + correction_X.to(logits_TX.dtype)
    if router.kept_groups < router.num_groups:
        wanted_TX = _of_kept_groups(wanted_TX, router)
    ranked_TX, order_TX = wanted_TX.sort(dim=-1, descending=True, stable=True)
    experts_TC = order_TX[:, :per_token]
    weights_TC = scores_TX.gather(1, experts_TC)
    if router.scores == "softmax of chosen":
        weights_TC = weights_TC.softmax(dim=-1)
    if router.normed:
        weights_TC = weights_TC / (weights_TC.sum(dim=-1, keepdim=True) + router.eps)
    weights_TC = (weights_TC * router.factor).to(logits_TX.dtype)
    return Choice(experts_TC, weights_TC, _margin(ranked_TX, per_token))


def _of_kept_groups(wanted_TX: Tensor, router: Router) -> Tensor:
    """The scores that count, -inf outside the best groups."""
    grouped_TGX = wanted_TX.unflatten(1, (router.num_groups, -1))
    best_TG = grouped_TGX.topk(2, dim=-1).values.sum(dim=-1)
    groups_TG = best_TG.sort(dim=-1, descending=True, stable=True).indices
    is_left_TG = torch.ones_like(best_TG, dtype=torch.bool)
    is_left_TG.scatter_(1, groups_TG[:, : router.kept_groups], False)
    return grouped_TGX.masked_fill(is_left_TG[:, :, None], float("-inf")).flatten(1)


def _margin(ranked_TX: Tensor, per_token: int) -> Tensor:
    """The smallest distance between the last chosen and the first that is not; inf without one."""
    none = torch.full((1,), float("inf"), dtype=ranked_TX.dtype, device=ranked_TX.device)
    if per_token == ranked_TX.shape[1]:
        return none[0]
    margin_T = ranked_TX[:, per_token - 1] - ranked_TX[:, per_token]
    # rows of padding are the same for all experts, and nothing reads their result
    is_padding_T = ranked_TX[:, 0] == ranked_TX[:, -1]
    return torch.cat((margin_T.masked_fill(is_padding_T, float("inf")), none)).min()
