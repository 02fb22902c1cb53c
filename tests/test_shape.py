"""A shape counts bytes without torch, and refuses sizes that no decoder has."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from mnemosyne.config import MeshConfig
from mnemosyne.shape import ModelShape

LLAMA_3_8B = ModelShape(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    vocab_size=128256,
)


def test_keys_and_values_take_what_llama_3_8b_is_known_to_take() -> None:
    assert LLAMA_3_8B.kv_bytes_per_token() == 131_072
    assert LLAMA_3_8B.kv_bytes_per_token(4) == 16_384
    assert replace(LLAMA_3_8B, cache_dtype="float32").kv_bytes_per_token() == 262_144


def test_a_rank_holds_its_share_of_heads_words_and_mlp() -> None:
    assert [LLAMA_3_8B.local(MeshConfig(tp=tp)).num_kv_heads for tp in (1, 2, 8, 16)] == [
        8,
        4,
        1,
        1,
    ]
    assert LLAMA_3_8B.local(MeshConfig(tp=16)).num_heads == 2
    assert LLAMA_3_8B.local(MeshConfig(kvp=2, tp=4)).mlp_width == 3584
    assert LLAMA_3_8B.local(MeshConfig(kvp=2, tp=4, ffn="wide")).mlp_width == 1792
    assert replace(LLAMA_3_8B, vocab_size=5).local(MeshConfig(tp=2)).vocab_size == 3


def test_a_row_leaves_experts_unread_unless_it_asks_for_all_of_them() -> None:
    sparse = replace(LLAMA_3_8B, num_experts=8, experts_per_token=2)

    assert sparse.unread_share() == 0.75
    assert replace(sparse, experts_per_token=8).unread_share() == 1
    assert LLAMA_3_8B.unread_share() == 1


def test_layers_without_windows_see_everything() -> None:
    assert LLAMA_3_8B.windows == (None,) * 32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 0}, "num_layers must be a positive number, got 0"),
        ({"num_layers": "4"}, "num_layers must be int, got '4'"),
        ({"num_heads": 33}, "num_heads must be a multiple of num_kv_heads 8, got 33"),
        ({"experts_per_token": 2}, "experts_per_token must be at most num_experts 1, got 2"),
        ({"windows": (None,)}, "windows must hold one entry for each of 32 layers"),
        ({"dtype": "int8"}, "dtype must be one of float64, float32, bfloat16, float16, got 'int8'"),
        ({"cache_dtype": "fp8"}, "cache_dtype must be null or one of float64"),
    ],
)
def test_a_size_outside_its_rule_is_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match="must") as refusal:
        replace(LLAMA_3_8B, **changes)

    assert str(refusal.value).startswith(said)


def test_a_shape_needs_no_torch() -> None:
    program = "import sys, mnemosyne.shape; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
