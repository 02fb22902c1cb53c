"""Experts give their definition, and the kernels the same bits whatever rows come along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS, InstructionSet
from mnemosyne.operators import TORCH, ExpertWeights, NativeOperators, Operators, activate

NUM_EXPERTS, WIDTH, MLP_WIDTH, PER_TOKEN = 5, 64, 96, 2
ACTIVATIONS = ("silu", "gelu_tanh", "clamped")


def drawn(num_rows: int, dtype: torch.dtype, *, biased: bool = False) -> tuple[Any, ...]:
    """Rows, their experts and weights, and the weights of the experts."""
    generator = torch.Generator().manual_seed(num_rows)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    shapes = ((MLP_WIDTH, WIDTH), (MLP_WIDTH, WIDTH), (WIDTH, MLP_WIDTH))
    weights = ExpertWeights(
        *(randn(NUM_EXPERTS, *shape) for shape in shapes),
        *(randn(NUM_EXPERTS, shape[0]) if biased else None for shape in shapes),
    )
    wanted_TX = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    shares_TC, experts_TC = wanted_TX.to(wide).topk(PER_TOKEN, dim=-1)
    return randn(num_rows, WIDTH), experts_TC, shares_TC, weights


def by_definition(
    x_TE: Tensor,
    experts_TC: Tensor,
    weights_TC: Tensor,
    weights: ExpertWeights,
    *,
    activation: str,
    weighs_input: bool,
) -> Tensor:
    """Row by row, expert by expert."""
    rows = []
    for x_E, experts, shares in zip(x_TE, experts_TC.tolist(), weights_TC, strict=True):
        total_E = torch.zeros_like(x_E)
        for expert, share in zip(experts, shares, strict=True):
            gate, up, down = weights.of(expert)
            given = (x_E * share if weighs_input else x_E)[None]
            (opened,), (raised,) = (TORCH.linear(given, (layer,)) for layer in (gate, up))
            (y_1E,) = TORCH.linear(activate(opened, raised, activation), (down,))
            total_E = total_E + (y_1E[0] if weighs_input else share * y_1E[0])
        rows.append(total_E)
    return torch.stack(rows) if rows else x_TE


@pytest.mark.parametrize("weighs_input", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 37])
def test_experts_give_their_definition(num_rows: int, activation: str, weighs_input: bool) -> None:
    given = drawn(num_rows, torch.float64, biased=True)

    y_TE = TORCH.experts(*given, activation=activation, weighs_input=weighs_input)

    expected = by_definition(*given, activation=activation, weighs_input=weighs_input)
    torch.testing.assert_close(y_TE, expected, rtol=0, atol=1e-14)


@pytest.fixture(params=INSTRUCTION_SETS, ids=lambda each: each.name)
def native(request: pytest.FixtureRequest) -> Operators:
    instructions: InstructionSet = request.param
    if (why_not := instructions.why_not()) is not None:
        pytest.skip(why_not)
    return NativeOperators(instructions)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_company_changes_the_bits_of_a_row(native: Operators, activation: str) -> None:
    x_TE, experts_TC, shares_TC, weights = drawn(37, torch.bfloat16)

    def run(rows: slice) -> Tensor:
        return native.experts(
            *(x_TE[rows], experts_TC[rows], shares_TC[rows], weights),
            activation=activation,
            weighs_input=False,
        )

    together = run(slice(None))
    for start, stop in ((0, 1), (5, 6), (7, 20), (36, 37)):
        assert torch.equal(run(slice(start, stop)), together[start:stop])


def test_kernels_are_no_worse_than_torch(native: Operators) -> None:
    x_TE, experts_TC, shares_TC, weights = drawn(64, torch.bfloat16)
    exact_weights = ExpertWeights(*(None if w is None else w.double() for w in weights))
    how = {"activation": "silu", "weighs_input": False}

    ours = native.experts(x_TE, experts_TC, shares_TC, weights, **how)
    theirs = TORCH.experts(x_TE, experts_TC, shares_TC, weights, **how)

    exact = TORCH.experts(x_TE.double(), experts_TC, shares_TC.double(), exact_weights, **how)
    budget = 2 * (theirs - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= budget
