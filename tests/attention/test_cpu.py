"""The CPU backend where it does more than call the operator once: many runs, tiles, threads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mnemosyne.attention import CpuBackend, ReferenceBackend, cpu, spans
from tests.attention.cases import LAYOUTS, WINDOWS, Rows, assert_exact, make_case

BACKEND, REFERENCE = CpuBackend(), ReferenceBackend()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_context_of_many_reads_is_exact(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MAX_KEYS", 300)
    monkeypatch.setattr(cpu, "MAX_GATHERED", 256)
    monkeypatch.setattr(cpu, "MIN_RUN", 33)
    case = make_case([Rows(1, 2000), Rows(90, 1500)], layout=layout, num_pages=512)

    out, lse = case.attend(BACKEND, return_lse=True)

    expected_out, expected_lse = case.attend(REFERENCE, return_lse=True)
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


def test_no_read_is_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MAX_KEYS", 300)
    monkeypatch.setattr(cpu, "MAX_GATHERED", 256)
    monkeypatch.setattr(cpu, "MIN_RUN", 33)
    case = make_case([Rows(1, 2000), Rows(90, 1500)], layout="shuffled", num_pages=512)

    tiles = BACKEND.prepare(case.batch, None, torch.device("cpu"))

    slots = [call.slots for tile in tiles for call in tile.calls]
    gathered = [len(each) for each in slots if isinstance(each, torch.Tensor)]
    assert len(gathered) > 10
    assert max(gathered) <= 256


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_of_several_tiles_are_exact(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "MAX_ROWS", 32)
    monkeypatch.setattr(spans, "WINDOW_ROWS", 16)
    case = make_case([Rows(100, 0), Rows(70, 50), Rows(40, 90, key_stop=101, first_key=9)])

    out, lse = case.attend(BACKEND, window, return_lse=True)

    expected_out, expected_lse = case.attend(REFERENCE, window, return_lse=True)
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_a_lone_row_is_exact_when_threads_share_its_keys(num_kv_heads: int) -> None:
    torch.set_num_threads(2)
    case = make_case(
        [Rows(1, 2 * cpu.MIN_SHARE + 2)],
        heads=(num_kv_heads, 2, 16),
        layout="contiguous",
    )

    out, lse = case.attend(BACKEND, return_lse=True)

    expected_out, expected_lse = case.attend(REFERENCE, return_lse=True)
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


@pytest.mark.parametrize(
    ("num_kv_heads", "num_threads", "expected"),
    [(1, 2, 2), (3, 2, 2), (2, 2, 1), (4, 2, 1), (8, 2, 1), (4, 16, 4), (8, 12, 3), (1, 1, 1)],
)
def test_heads_times_shares_fill_the_threads(
    num_kv_heads: int, num_threads: int, expected: int
) -> None:
    assert cpu._shares(num_kv_heads, num_threads) == expected


def test_inputs_are_left_as_they_were() -> None:
    case = make_case()
    before = [x.clone() for x in (case.q_THD, case.k_KSD, case.v_KSD)]

    case.attend(BACKEND, reach=40)

    assert all(map(torch.equal, before, (case.q_THD, case.k_KSD, case.v_KSD)))


def test_a_dtype_without_an_operator_is_refused() -> None:
    case = make_case([Rows(1, 3)])
    narrow = replace(case, q_THD=case.q_THD.to(torch.float8_e4m3fn))

    with pytest.raises(ValueError, match="q_THD must have a dtype of"):
        narrow.attend(BACKEND)


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be cpu, got cuda"):
        BACKEND.prepare(make_case().batch, None, torch.device("cuda"))


MEMORY_OF_A_CHUNK = """
import resource, sys
import numpy as np, torch
from mnemosyne.attention import AttentionBatch, CpuBackend, Segment

CHUNK, PAST, SIZE, D = 4096, 65536, 16, 64
layout, window = sys.argv[1], int(sys.argv[2]) or None
pages = np.arange((PAST + CHUNK) // SIZE)
if layout == "shuffled":
    pages = np.random.default_rng(0).permutation(pages)
pool = torch.randn(2, 1, PAST + CHUNK, D, dtype=torch.bfloat16)
q_THD = torch.randn(CHUNK, 2, D, dtype=torch.bfloat16)
backend = CpuBackend()

def attend(num_rows, first_position):
    segment = Segment(0, num_rows, first_position, first_position + num_rows, pages)
    batch = AttentionBatch((segment,), num_rows, SIZE)
    prepared = backend.prepare(batch, window, q_THD.device)
    backend.attend(q_THD[:num_rows], *pool, prepared, scale=0.125)

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

attend(300, 300)
before = peak_mib()
attend(CHUNK, PAST)
print(peak_mib() - before)
"""


@pytest.mark.parametrize(
    ("layout", "window"), [("contiguous", 0), ("shuffled", 0), ("contiguous", 16384)]
)
def test_a_chunk_over_a_long_context_needs_little_memory(layout: str, window: int) -> None:
    # Scores or a mask of chunk x context would take 256 MiB even at one byte each.
    command = [sys.executable, "-c", MEMORY_OF_A_CHUNK, layout, str(window)]

    run = subprocess.run(command, capture_output=True, text=True, check=True)

    assert float(run.stdout) < 64
