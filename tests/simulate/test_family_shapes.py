"""Shapes of published models of experts and windows have the sizes that their makers state."""

from __future__ import annotations

import pytest

from mnemosyne.cli.shapes import find_shape, shape_names
from mnemosyne.shape import ModelShape


def num_params(shape: ModelShape) -> float:
    """Weights of the whole model, in billions."""
    vocabulary = shape.vocabulary_params() * (1 if shape.tied else 2)
    return (shape.num_layers * shape.layer_params() + vocabulary) / 1e9


def num_used(shape: ModelShape) -> float:
    """Weights that one token is multiplied by, in billions."""
    unused = shape.num_experts - shape.experts_per_token
    idle = shape.num_layers * shape.expert_share * unused * shape.expert_params()
    return num_params(shape) - idle / 1e9


@pytest.mark.parametrize(
    ("name", "total", "used"),
    [
        ("seed_oss_36b", 36, 36),
        ("smollm3_3b", 3.1, 3.1),
        ("olmo3_7b", 7.3, 7.3),
        ("gemma3_27b", 27, 27),
        ("ministral3_8b", 8.4, 8.4),
        ("mistral_small_24b", 23.6, 23.6),
        ("qwen3_30b_a3b", 30.5, 3.3),
        ("mixtral_8x7b", 46.7, 12.9),
        ("gpt_oss_20b", 21, 4.2),
        ("gpt_oss_120b", 117, 5.7),
        ("glm_4_5_air", 106, 13),
        ("minimax_m2", 229, 10.5),
        ("llama4_scout", 108, 17),
        ("llama4_maverick", 400, 17),
    ],
)
def test_sizes_are_those_that_makers_state(name: str, total: float, used: float) -> None:
    shape = find_shape(name)

    assert num_params(shape) == pytest.approx(total, rel=0.05)
    assert num_used(shape) == pytest.approx(used, rel=0.12)


def test_windows_of_a_file_go_over_all_layers() -> None:
    gemma, scout = find_shape("gemma3_27b"), find_shape("llama4_scout")

    assert gemma.windows[:7] == (1024,) * 5 + (None, 1024)
    assert len(gemma.windows) == 62
    assert sum(window is None for window in scout.windows) == 12


def test_every_shape_can_be_read() -> None:
    for name in shape_names():
        assert find_shape(name).num_layers > 0
