"""Tensors in huge pages are ordinary zeros, aligned; what is freed is not fetched again."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from mnemosyne.kernels.cpu.memory import HUGE, huge_zeros


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1024, 1025), (2, 1024, 1536)])
def test_they_are_zeros_that_may_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = huge_zeros(shape, dtype)
    y = huge_zeros(shape, dtype)

    y.fill_(1)

    assert torch.equal(x, torch.zeros(shape, dtype=dtype))
    assert torch.equal(y, torch.ones(shape, dtype=dtype))


def test_a_large_one_is_aligned_to_huge_pages() -> None:
    assert huge_zeros((1 << 21,), torch.bfloat16).data_ptr() % HUGE == 0


FAULTS = """
import resource, sys, threading, torch
from mnemosyne.kernels.cpu.memory import keep_freed

def work():
    a, b, c = (torch.ones(n << 20, dtype=torch.uint8) for n in (4, 11, 32))
    del b, c  # a keeps its place below what comes and goes

def measure():
    for _ in range(10):  # small things find their places
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        work()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    keep_freed()
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_what_a_thread_frees_serves_its_next_tensors() -> None:
    def faults(mode: str) -> int:
        program = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)

    pages = 10 * (47 << 20) // 4096

    assert faults("leave") > pages / 4
    assert faults("keep") < pages / 100
