"""Tapes repeat the bits of doing it anew, at the same addresses, in little memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.cpu import linear, rows
from mnemosyne.kernels.cpu.processor import AVX512
from mnemosyne.kernels.cpu.tape import Memory, Tape

pytestmark = pytest.mark.skipif(AVX512.why_not() is not None, reason=str(AVX512.why_not()))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


WEIGHT = randn(64, 64, seed=1)
NORM = randn(64, seed=2)


def kernels(x_TE: Tensor) -> Tensor:
    """Several kernels, and between them memory that is freed and used again."""
    for _ in range(6):
        (y_TE,) = linear.linear(rows.rms_norm(x_TE, NORM, 1e-5, AVX512), [(WEIGHT, None)], AVX512)
        x_TE = rows.add(x_TE, y_TE, AVX512)
    return linear.gated(x_TE, (WEIGHT, None), (WEIGHT, NORM), AVX512)


def mixed(x_TE: Tensor) -> Tensor:
    """Kernels, views, constants, operators of torch in place and not, and several results."""
    turn = torch.arange(32) ** 2 * 0.01
    head_T1D = rows.rotate(
        x_TE.unsqueeze(1), *(f(turn).expand(3, 32).clone() for f in (cos, sin)), AVX512
    )
    top, place = x_TE.max(-1, keepdim=True)
    y_TE = head_T1D.flatten(1) - top + place
    y_TE = rows.add(y_TE.bfloat16(), x_TE, AVX512)
    y_TE[1:].mul_(2)
    return rows.rms_norm(y_TE, NORM, 1e-5, AVX512)


def cos(x: Tensor) -> Tensor:
    return x.cos()


def sin(x: Tensor) -> Tensor:
    return x.sin()


@pytest.mark.parametrize("num_bytes", [1 << 16, 64], ids=["enough", "no room"])
@pytest.mark.parametrize("function", [kernels, mixed])
@torch.inference_mode()
def test_a_replay_has_the_bits_of_doing_it_anew(function, num_bytes: int) -> None:  # type: ignore[no-untyped-def]
    x_TE, tape = randn(3, 64), Tape(Memory(num_bytes))
    y = tape.capture(lambda: function(x_TE))
    assert torch.equal(y, function(x_TE))
    gc.collect()

    for seed in (5, 6):
        x_TE.copy_(randn(3, 64, seed=seed))
        tape.replay()

        assert torch.equal(y, function(x_TE))


@torch.inference_mode()
def test_kernels_that_follow_one_another_are_one_call() -> None:
    x_TE, tape = randn(3, 64), Tape(Memory(1 << 16))

    tape.capture(lambda: kernels(x_TE))

    assert len(tape) == 1


@torch.inference_mode()
def test_two_tapes_share_memory_that_each_uses_again() -> None:
    x_TE, memory = randn(3, 64), Memory(6 << 10)  # less than the 19 results of one
    tapes = [Tape(memory), Tape(memory)]
    results = [tape.capture(lambda: kernels(x_TE)) for tape in tapes]
    assert len({y.untyped_storage().data_ptr() // 8192 for y in results}) <= 2
    x_TE.copy_(randn(3, 64, seed=5))

    for tape, y in zip(tapes, results, strict=True):
        tape.replay()

        assert torch.equal(y, kernels(x_TE))
    assert all(tape._kept and not any(map(torch.is_tensor, tape._kept)) for tape in tapes)


def test_memory_is_given_again_once_its_tensor_and_all_views_are_gone() -> None:
    memory = Memory(4096)
    first, second = (memory.empty((4, 8), torch.float32) for _ in range(2))
    assert first is not None
    assert second is not None
    assert abs(first.data_ptr() - second.data_ptr()) >= first.nbytes
    address, view = first.data_ptr(), first[1:]

    del first
    while_viewed = memory.empty((32,), torch.float32)
    del view
    after = memory.empty((2, 16), torch.float32)

    assert while_viewed is not None
    assert after is not None
    assert while_viewed.data_ptr() != address
    assert after.data_ptr() == address
    assert memory.empty((4096,), torch.float32) is None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x * x[0].item(), "depends on the value"),
        (lambda x: x[x > 0], "depends on the value"),
        (lambda x: torch.zeros(64).add_(x), "writes to a constant"),
    ],
)
@torch.inference_mode()
def test_what_a_replay_would_get_wrong_is_refused(function, words: str) -> None:  # type: ignore[no-untyped-def]
    x, tape = randn(64), Tape(Memory(4096))

    with pytest.raises(RuntimeError, match=words):
        tape.capture(lambda: function(x))


@torch.inference_mode()
def test_nothing_is_recorded_once_a_capture_is_over() -> None:
    tape = Tape(Memory(4096))
    with pytest.raises(ZeroDivisionError):
        tape.capture(lambda: randn(1, 64) * (1 // 0))

    kernels(randn(1, 64))

    assert not tape._calls
