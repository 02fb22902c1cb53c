"""The C++ kernels: no worse than eager torch, and the same bits however a row is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mnemosyne.attention import NativeBackend, ReferenceBackend
from mnemosyne.attention.native import FixedNative
from mnemosyne.kernels.cpu.library import load_library
from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from tests.attention.cases import (
    LAYOUTS,
    WINDOWS,
    Case,
    Rows,
    assert_no_worse_than_eager,
    listed_in,
    make_case,
)
from tests.attention.test_backends import seen_only
from tests.kernels import sets
from tests.kernels.emulated import Emulated
from tests.kernels.sets import Kernels

HEADS = (  # K, G, D
    *((2, 1, 32), (2, 2, 64), (1, 3, 96), (1, 4, 128), (1, 1, 160), (1, 2, 256), (1, 8, 64)),
    (1, 20, 64),
)
LONG = [Rows(1, 16500), Rows(70, 8150), Rows(3, 20000)]  # beyond two partial results
SHORTER = [Rows(1, 16500), Rows(12, 8185), Rows(3, 20000)]  # the same in an emulator's time
REFERENCE = ReferenceBackend()

Backend = partial[NativeBackend]  # without its head dim


@pytest.fixture(params=sets.INSTRUCTIONS, ids=lambda instructions: instructions.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Of each set, in bfloat16."""
    kernels = sets.runnable(Kernels(request.param, torch.bfloat16))
    return partial(NativeBackend, kernels.instructions, dtype=kernels.dtype)


OTHER_DTYPES = [kernels for kernels in sets.ALL if kernels.dtype != torch.bfloat16]


def make_long(backend: Backend, head_dim: int = 64) -> Case:
    rows = SHORTER if isinstance(backend.args[0], Emulated) else LONG
    heads = 1, 4, head_dim
    return make_case(rows, heads=heads, layout="shuffled", page_size=64, num_pages=800)


def assert_within_budget(backend: Backend, case: Case, window: int | None = None) -> None:
    """The error of a case is within that of eager torch in the same dtype."""
    out, lse = case.attend(backend(case.q_THD.shape[-1]), window, return_lse=True)

    exact_out, exact_lse = case.to(torch.float64).attend(REFERENCE, window, return_lse=True)
    eager_out, eager_lse = case.dense(window)
    assert lse is not None
    assert exact_lse is not None
    assert_no_worse_than_eager(out, eager_out, exact_out)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    seen = ~lse.isneginf()
    assert_no_worse_than_eager(lse[seen], eager_lse[seen], exact_lse[seen])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
def test_a_mixed_batch_is_no_worse_than_eager(
    backend: Backend, heads: tuple[int, int, int], layout: str, window: int | None
) -> None:
    if layout != "shuffled" or window not in (None, 40):
        sets.skip_if_emulated(backend.args[0])
    assert_within_budget(backend, make_case(heads=heads, layout=layout).to(torch.bfloat16), window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernels", OTHER_DTYPES, ids=str)
def test_other_dtypes_are_no_worse_than_eager(kernels: Kernels, window: int | None) -> None:
    instructions, dtype = sets.runnable(kernels)
    backend = partial(NativeBackend, instructions, dtype=dtype)

    assert_within_budget(backend, make_case(heads=(2, 2, 64)).to(dtype), window)
    if window is not None:
        sets.skip_if_emulated(instructions)
    assert_within_budget(backend, make_long(backend).to(dtype), window)


@pytest.mark.parametrize("page_size", [1, 3, 256])
def test_any_page_size_is_no_worse_than_eager(backend: Backend, page_size: int) -> None:
    case = make_case(heads=(2, 2, 64), page_size=page_size, num_pages=30 + 4096 // page_size)

    assert_within_budget(backend, case.to(torch.bfloat16), window=40)


@pytest.mark.parametrize("window", [None, 9000])
def test_long_contexts_are_no_worse_than_eager(backend: Backend, window: int | None) -> None:
    assert_within_budget(backend, make_long(backend).to(torch.bfloat16), window)


@pytest.mark.parametrize("window", WINDOWS)
def test_slots_that_no_row_may_see_do_not_matter(backend: Backend, window: int | None) -> None:
    case = make_case(heads=(2, 2, 64)).to(torch.bfloat16)
    k_KSD, v_KSD = (seen_only(case, pool, window) for pool in (case.k_KSD, case.v_KSD))
    unseen = Case(case.batch, case.q_THD, k_KSD, v_KSD, case.scale)

    out, lse = unseen.attend(backend(64), window, return_lse=True)

    expected_out, expected_lse = case.attend(backend(64), window, return_lse=True)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("rows", [Rows(1, 99), Rows(30, 0), Rows(1, 9000)], ids=str)
def test_a_nan_reaches_the_rows_that_see_it_and_no_others(backend: Backend, rows: Rows) -> None:
    case = make_case([rows], heads=(1, 2, 64), num_pages=600).to(torch.bfloat16)
    (segment,) = case.batch.segments
    in_query, in_key, in_value = (
        replace(case, q_THD=case.q_THD.clone(), k_KSD=case.k_KSD.clone(), v_KSD=case.v_KSD.clone())
        for _ in range(3)
    )
    in_query.q_THD[0, 1] = torch.nan
    in_key.k_KSD[0, 16 * segment.pages[0] + 5] = torch.nan
    in_value.v_KSD[0, 16 * segment.pages[0] + 5] = torch.nan

    for each in (in_query, in_key, in_value):
        out, lse = each.attend(backend(64), return_lse=True)
        exact_out, exact_lse = each.to(torch.float64).attend(REFERENCE, return_lse=True)
        assert lse is not None
        assert exact_lse is not None
        assert torch.equal(out.isnan(), exact_out.isnan())
        assert torch.equal(lse.isnan(), exact_lse.isnan())


@pytest.mark.parametrize(
    ("head_dim", "window"), [(64, None), (64, 9000), (32, None), (96, None), (128, 9000)]
)
def test_a_row_has_the_same_bits_in_any_chunk_company_and_number_of_threads(
    backend: Backend,
    head_dim: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if head_dim > 96:
        sets.skip_if_emulated(backend.args[0])
    case = make_long(backend, head_dim).to(torch.bfloat16)

    assert_same_bits_alone(backend, case, window, monkeypatch)


@pytest.mark.parametrize("kernels", OTHER_DTYPES, ids=str)
def test_a_row_of_another_dtype_has_the_same_bits_in_any_chunk(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    instructions, dtype = sets.runnable(kernels)
    backend = partial(NativeBackend, instructions, dtype=dtype)

    assert_same_bits_alone(backend, make_long(backend).to(dtype), None, monkeypatch)


def assert_same_bits_alone(
    backend: Backend, together: Case, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a case by themselves, with one thread, as in the case."""
    head_dim = together.q_THD.shape[-1]
    out, lse = together.attend(backend(head_dim), window, return_lse=True)
    assert lse is not None

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for segment in together.batch.segments:
        for row in (0, segment.num_rows // 2, segment.num_rows - 1):
            alone = type(segment)(
                first_row=0,
                num_rows=1,
                first_position=segment.first_position + row,
                num_keys=segment.num_keys,
                pages=segment.pages,
            )
            at = segment.first_row + row
            batch = type(together.batch)((alone,), 1, together.batch.page_size)
            q_THD = together.q_THD[at : at + 1]
            case = Case(batch, q_THD, together.k_KSD, together.v_KSD, together.scale)
            lone_out, lone_lse = case.attend(backend(head_dim), window, return_lse=True)
            assert lone_lse is not None
            assert torch.equal(lone_out[0], out[at])
            assert torch.equal(lone_lse[0], lse[at])


def test_pages_far_apart_in_a_large_pool_are_found(
    backend: Backend,
) -> None:
    """Element offsets pass 2^31: the pool is declared, and only a few pages of it are written."""
    num_slots, head_dim = (1 << 31) // 64 + 4096, 64
    k_KSD = torch.empty(1, num_slots, head_dim, dtype=torch.bfloat16)
    v_KSD = torch.empty(1, num_slots, head_dim, dtype=torch.bfloat16)
    pages = np.array([3, num_slots // 16 - 2, 1], dtype=np.int64)
    near = make_case([Rows(5, 40)], heads=(1, 2, 64), page_size=16).to(torch.bfloat16)
    (segment,) = near.batch.segments
    for old, new in zip(segment.pages[:3], pages, strict=True):
        for pool, small in ((k_KSD, near.k_KSD), (v_KSD, near.v_KSD)):
            pool[:, new * 16 : new * 16 + 16] = small[:, old * 16 : old * 16 + 16]
    moved = type(segment)(0, 5, 40, 45, pages)
    far = Case(
        type(near.batch)((moved,), near.batch.num_rows, 16), near.q_THD, k_KSD, v_KSD, near.scale
    )

    assert torch.equal(far.attend(backend(64))[0], near.attend(backend(64))[0])


def test_a_library_is_compiled_once_and_kept(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = next((each for each in INSTRUCTION_SETS if each.why_not() is None), None)
    if able is None:
        pytest.skip("; ".join(str(each.why_not()) for each in INSTRUCTION_SETS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()

    first = able.load(able.attention, torch.bfloat16, HEAD_DIM=32)
    load_library.cache_clear()
    monkeypatch.setattr("mnemosyne.kernels.cpu.library._compile", pytest.fail)
    second = able.load(able.attention, torch.bfloat16, HEAD_DIM=32)

    assert first._name == second._name
    assert first._name.startswith(str(tmp_path))


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds nan."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("window", [None, 50])
def test_tables_that_stay_in_place_serve_steps_of_any_lengths(
    backend: Backend, window: int | None
) -> None:
    ragged = (Rows(1, 1200), Rows(1, 0), Rows(1, 30, key_stop=0), Rows(1, 90, first_key=64))
    layouts = (ragged, ragged[::-1], ragged[1:2], [Rows(1, 9000)] * 5)
    steps = [
        make_case(rows, heads=(2, 3, 32), seed=seed, num_pages=3000)
        for seed, rows in enumerate(layouts)
    ]
    num_rows, page_size = 12, steps[0].batch.page_size
    page_ids = torch.zeros(3000, dtype=torch.int64)
    fixed = FixedNative(backend(32), num_rows=num_rows, page_size=page_size, page_ids=page_ids)
    tables = set()

    for step in steps:
        padding = step.q_THD[:1].expand(num_rows - len(step.q_THD), -1, -1)
        batch = listed_in(replace(step.batch, num_rows=num_rows), page_ids)
        case = replace(step, batch=batch, q_THD=torch.cat((step.q_THD, padding)))
        case = case.to(torch.bfloat16)
        out, lse = case.attend(fixed, window, return_lse=True)
        expected_out, expected_lse = case.attend(backend(32), window, return_lse=True)
        assert lse is not None
        assert expected_lse is not None
        assert torch.equal(out, expected_out)
        assert torch.equal(lse, expected_lse)
        prepared = fixed.prepare(batch, window, torch.device("cpu"))
        tables.add((prepared.segments.data_ptr(), prepared.pages.data_ptr()))

    assert len(tables) == 1
