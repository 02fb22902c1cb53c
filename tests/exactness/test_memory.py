"""Memory of a prefill is bounded by its chunks, whatever the context."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.haystack import haystack
from mnemosyne.model_zoo.needle import write_needle
from tests.engines import add, greedy

ROOT = Path(__file__).parents[2]
NUM_HEADS = 16  # of the yardstick model
LIMIT_BYTES = 600e6


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that any operator makes, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_storage(part) for part in tree_leaves((args, kwargs)) if _is_tensor(part)}
        for part in tree_leaves(made):
            if _is_tensor(part) and _storage(part) not in given:
                self.largest = max(self.largest, part.untyped_storage().nbytes())
        return made


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_no_tensor_of_a_step_grows_with_the_context(tmp_path: Path) -> None:
    num_tokens, chunk = 8192, 256
    largest = []
    with LLM(
        str(write_needle(tmp_path / "needle")),
        dtype="float32",
        device="cpu",
        schedule={"chunk": chunk},
        cache={"max_tokens": num_tokens + 8},
    ) as llm:
        output = add(llm.engine, haystack(num_tokens).prompt_ids, greedy(8))
        while not output.token_ids:
            with Allocations() as allocations:
                llm.engine.step()
            largest.append(allocations.largest)

    assert output.metrics.chunks == [chunk] * (num_tokens // chunk)
    # the first chunk has no past; the last one samples, which is a row more
    assert set(largest[1:-1]) == {largest[1]}
    assert largest[1] < chunk * num_tokens, "not even a byte per row and key"


def prefill_peak(num_tokens: int, chunk: int | str) -> dict[str, Any]:
    """Run ``prefill_peak`` in a process of its own, and read what it prints."""
    program = [sys.executable, "-m", "tests.exactness.prefill_peak", str(num_tokens), str(chunk)]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def allocated(found: Mapping[str, int]) -> int:
    """The peak beside the cache and what a process with the model in memory holds."""
    return found["peak"] - found["pool"] - found["loaded"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
def test_a_prefill_needs_less_than_half_the_scores_of_its_last_chunk() -> None:
    num_tokens, chunk = 8192, 2048

    found = prefill_peak(num_tokens, chunk)

    score_bytes = NUM_HEADS * chunk * num_tokens * torch.bfloat16.itemsize
    assert np.sum(found["chunks"]) == num_tokens
    assert allocated(found) < score_bytes / 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
@pytest.mark.parametrize("chunk", ["adaptive", 8192])
def test_a_prefill_of_64k_tokens_needs_less_than_600_mb(chunk: int | str) -> None:
    found = prefill_peak(2**16, chunk)

    assert np.sum(found["chunks"]) == 2**16
    assert allocated(found) < LIMIT_BYTES
