"""Experts of a row follow from that row alone, and ties go to the expert of the lower index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.model_zoo.router import SOFTMAX, Router, choose
from mnemosyne.operators import TORCH

ROUTERS = {
    "softmax": SOFTMAX,
    "normed": Router(normed=True),
    "of chosen": Router(scores="softmax of chosen"),
    "sigmoid": Router(scores="sigmoid", on_input=True),
    "corrected": Router(scores="sigmoid", is_corrected=True, normed=True, eps=1e-20, factor=2.5),
    "groups": Router(scores="sigmoid", is_corrected=True, normed=True, num_groups=4, kept_groups=2),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=list(ROUTERS))
def test_equal_scores_go_to_the_lower_index(router: Router) -> None:
    correction = torch.zeros(8) if router.is_corrected else None

    choice = choose(torch.zeros(3, 8), router, 3, correction)

    assert choice.experts_TC.tolist() == [[0, 1, 2]] * 3


def test_weights_are_as_defined() -> None:
    logits_TX = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
    shares = logits_TX[0].softmax(0)

    assert choose(logits_TX, SOFTMAX, 2).weights_TC[0].tolist() == [shares[1], shares[2]]
    normed = choose(logits_TX, ROUTERS["normed"], 2).weights_TC[0]
    of_chosen = choose(logits_TX, ROUTERS["of chosen"], 2).weights_TC[0]
    torch.testing.assert_close(normed, of_chosen, rtol=1e-15, atol=0)
    sigmoid = choose(logits_TX, ROUTERS["sigmoid"], 1)
    assert sigmoid.weights_TC.item() == logits_TX[0, 1].sigmoid()


def test_a_correction_changes_the_choice_and_not_the_weights() -> None:
    logits_TX = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
    correction_X = torch.tensor([0.0, 0.0, 0.0, 9.0], dtype=torch.float64)

    choice = choose(logits_TX, Router(scores="sigmoid", is_corrected=True), 2, correction_X)

    assert choice.experts_TC.tolist() == [[3, 1]]
    assert choice.weights_TC[0].tolist() == logits_TX[0, [3, 1]].sigmoid().tolist()


def test_experts_outside_the_best_groups_are_not_chosen() -> None:
    # the best expert is alone in its group; the two of the second group together weigh more
    logits_TX = torch.tensor([[4.0, -9.0, 1.0, 1.5, 0.0, 0.5]], dtype=torch.float64)
    router = Router(scores="sigmoid", is_corrected=True, num_groups=3, kept_groups=1)

    choice = choose(logits_TX, router, 2, torch.zeros(6, dtype=torch.float64))

    assert choice.experts_TC.tolist() == [[3, 2]]


def test_the_margin_is_that_of_the_closest_row() -> None:
    logits_TX = torch.tensor([[5.0, 1.0, 0.0], [2.0, 1.75, 0.0]])

    assert float(choose(logits_TX, SOFTMAX, 1).margin) == 0.25
    assert float(choose(torch.tensor([[2.0, 1.0, 1.0]]), SOFTMAX, 2).margin) == 0.0
    assert float(choose(torch.zeros(4, 3), SOFTMAX, 1).margin) == float("inf")  # padding
    assert float(choose(logits_TX, SOFTMAX, 3).margin) == float("inf")
    assert float(choose(logits_TX[:0], SOFTMAX, 1).margin) == float("inf")


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(ROUTERS)),
)
def test_no_company_changes_the_experts_of_a_row(
    seed: int, num_rows: int, dtype: torch.dtype, name: str
) -> None:
    router, generator = ROUTERS[name], torch.Generator().manual_seed(seed)
    x_TE = torch.randn(num_rows, 96, generator=generator).to(dtype)
    weight_XE = torch.randn(16, 96, generator=generator).to(dtype)
    correction = torch.randn(16, generator=generator) if router.is_corrected else None

    together = choose(TORCH.route(x_TE, weight_XE, None), router, 4, correction)

    for row in range(0, num_rows, 7):
        alone = choose(TORCH.route(x_TE[row : row + 1], weight_XE, None), router, 4, correction)
        assert torch.equal(alone.experts_TC[0], together.experts_TC[row])
        if dtype != torch.float64:
            assert torch.equal(alone.weights_TC[0], together.weights_TC[row])
