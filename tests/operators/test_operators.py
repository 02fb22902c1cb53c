"""Every set of operators keeps the contract: composed as said, and no worse than torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from mnemosyne.operators import TORCH, NativeOperators, Operators
from tests.attention.cases import assert_no_worse_than_eager

SETS: list[Operators] = [
    NativeOperators(each) for each in INSTRUCTION_SETS if each.why_not() is None
]
WIDTH, HEAD_DIM, NUM_SLOTS = 96, 32, 12


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tensors(num_rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of every operator, rounded to bfloat16 first."""
    cut = {
        "x": randn(num_rows, WIDTH),
        "delta": 3 * randn(WIDTH, num_rows).T.contiguous(),
        "weight": randn(WIDTH),
        "gate": randn(64, WIDTH),
        "up": randn(64, WIDTH).flip(0),
        "bias": randn(64),
        "q": randn(num_rows, 3, HEAD_DIM),
        "k": randn(num_rows, 2, HEAD_DIM),
        "v": randn(num_rows, 2, HEAD_DIM).flip(0),
    }
    return {name: value.bfloat16().to(dtype) for name, value in cut.items()}


def everything(operators: Operators, num_rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Run every operator of a set on the same input."""
    t = tensors(num_rows, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    positions_T, radians_D = 1000 + torch.arange(num_rows), torch.arange(HEAD_DIM // 2).double()
    slots_T = torch.arange(num_rows) % NUM_SLOTS
    rotary = operators.angles(positions_T, radians_D / 100, gain=1.1, dtype=wide)
    pools = [torch.zeros(2, NUM_SLOTS, HEAD_DIM, dtype=dtype) for _ in range(4)]
    gate, up = (t["gate"], t["bias"]), (t["up"], None)
    total, normed = operators.add_rms_norm(t["x"], t["delta"], t["weight"], 1e-5)
    operators.write(t["k"], t["v"], slots_T, *pools[:2])
    return {
        "embed": operators.embed(positions_T % 64, t["gate"]),
        "rms_norm": operators.rms_norm(t["x"], t["weight"], 1e-5),
        "norm of heads": operators.rms_norm(t["q"], t["weight"][:HEAD_DIM], 1e-5),
        "add": operators.add(t["x"], t["delta"]),
        "total": total,
        "normed": normed,
        **dict(zip(("one", "other"), operators.linear(t["x"], (gate, up)), strict=True)),
        "gated": operators.gated(t["x"], gate, up),
        "cos": rotary[0],
        "sin": rotary[1],
        "rotate": operators.rotate(t["q"], *rotary),
        "written keys": pools[0],
        "written values": pools[1],
        "rotated": operators.rotate_and_write(t["q"], t["k"], t["v"], rotary, slots_T, *pools[2:]),
        "rotated keys": pools[2],
        "values": pools[3],
        "logits": operators.logits(t["x"], t["gate"]),
    }


@pytest.mark.parametrize("num_rows", [1, 5, 9])
@pytest.mark.parametrize("operators", SETS, ids=lambda operators: operators.name)
def test_a_native_set_is_no_worse_than_torch(operators: Operators, num_rows: int) -> None:
    actual = everything(operators, num_rows, torch.bfloat16)
    eager = everything(TORCH, num_rows, torch.bfloat16)
    exact = everything(TORCH, num_rows, torch.float64)

    for name, value in actual.items():
        assert value.dtype == eager[name].dtype, name
        assert value.shape == eager[name].shape, name
        assert_no_worse_than_eager(value, eager[name], exact[name])


@pytest.mark.parametrize("operators", [TORCH, *SETS], ids=lambda operators: operators.name)
def test_fused_operators_have_the_bits_of_the_simple_ones(operators: Operators) -> None:
    found = everything(operators, 5, torch.bfloat16)

    assert torch.equal(found["total"], found["add"])
    weight = tensors(5, torch.bfloat16)["weight"]
    assert torch.equal(found["normed"], operators.rms_norm(found["total"], weight, 1e-5))
    assert torch.equal(found["rotated"], found["rotate"])
    assert torch.equal(found["values"], found["written values"])


def apart(x: Tensor) -> Tensor:
    """The same rows, whose elements lie apart."""
    return x.T.contiguous().T


@pytest.mark.parametrize("operators", SETS, ids=lambda operators: operators.name)
@pytest.mark.parametrize(
    "call",
    [
        lambda o, x: o.rms_norm(apart(x), x[0], 1e-5),
        lambda o, x: o.add(apart(x), x),
        lambda o, x: o.add(x[:, :48].contiguous(), x[:, :48].contiguous()),
        lambda o, x: o.rms_norm(x[:, :48], x[0, :48], 1e-5),
        lambda o, x: o.linear(x[:, :48], [(x[:, :48].contiguous(), None)])[0],
        lambda o, x: o.gated(x[:, :48], (x[:, :48].contiguous(), None), (x[:, 48:], None)),
        lambda o, x: o.rotate(x.view(9, 2, 48), x[:, :24].float(), x[:, 24:48].float()),
    ],
)
def test_what_the_kernels_cannot_take_is_computed_by_torch(
    operators: Operators, call: Callable[[Operators, Tensor], Tensor]
) -> None:
    x = randn(9, WIDTH).bfloat16()

    assert torch.equal(call(operators, x), call(TORCH, x))


def test_more_rows_than_a_set_is_fast_for_are_multiplied_by_torch() -> None:
    for operators, instructions in zip(
        SETS, (each for each in INSTRUCTION_SETS if each.why_not() is None), strict=True
    ):
        most_rows = instructions.most_rows
        if most_rows is None:
            continue
        x, weights = randn(most_rows + 1, WIDTH).bfloat16(), [(randn(33, WIDTH).bfloat16(), None)]
        (y,), (of_torch,) = operators.linear(x, weights), TORCH.linear(x, weights)
        assert torch.equal(y, of_torch)


def test_rows_land_in_their_slots_and_nowhere_else() -> None:
    slots_T = torch.tensor([9, 0, 11])
    k_TKD, v_TKD = randn(3, 3, 5), randn(3, 3, 5) + 1
    k_KSD, v_KSD = torch.zeros(3, 16, 5), torch.zeros(3, 16, 5)

    TORCH.write(k_TKD, v_TKD, slots_T, k_KSD, v_KSD)

    for pool, rows in ((k_KSD, k_TKD), (v_KSD, v_TKD)):
        assert torch.equal(pool[:, slots_T].transpose(0, 1), rows)
        assert not pool[:, [slot for slot in range(16) if slot not in (9, 0, 11)]].any()
