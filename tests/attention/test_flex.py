"""Compiled FlexAttention on CPU. Kernels are few and shared by all tests: each takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mnemosyne.attention import FlexBackend, ReferenceBackend
from mnemosyne.attention.flex_compiled import CompiledFlex, alike
from mnemosyne.attention.flex_eager import EagerFlex
from tests.attention.cases import (
    LAYOUTS,
    MIXED,
    Case,
    Rows,
    assert_exact,
    assert_no_worse_than_eager,
    make_case,
)

# torch's own, from importing its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

REFERENCE = ReferenceBackend()
HEADS = (1, 4, 16)


@pytest.fixture(scope="module")
def backend() -> Iterator[FlexBackend]:
    """Compiled for decodes, chunks, and chunks under a window, in bfloat16."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each test: a compiled graph holds for one number
    backend = FlexBackend()
    case = bfloat16_case([Rows(1, 40), Rows(20, 30)])
    case.attend(backend)
    case.attend(backend, reach=10)
    yield backend
    torch.set_num_threads(num_threads)


@pytest.fixture
def no_compilation() -> Iterator[None]:
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def bfloat16_case(rows: list[Rows] | tuple[Rows, ...] = MIXED, layout: str = "shuffled") -> Case:
    return make_case(rows, heads=HEADS, layout=layout).to(torch.bfloat16)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("window", [None, 1, 5, 40, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_step_runs_without_compiling_again_no_worse_than_eager(
    backend: FlexBackend, layout: str, window: int | None
) -> None:
    case = bfloat16_case(layout=layout)

    out, lse = case.attend(backend, window)

    exact, _ = case.to(torch.float64).attend(REFERENCE, window)
    assert lse is None
    assert_no_worse_than_eager(out, case.dense(window)[0], exact)


@pytest.mark.usefixtures("no_compilation")
def test_other_sizes_of_step_and_pool_run_without_compiling_again(backend: FlexBackend) -> None:
    rows = [Rows(1, n * 17) for n in range(40)] + [Rows(300, 0), Rows(2, 700)]
    case = make_case(rows, heads=HEADS, num_pages=1500).to(torch.bfloat16)

    out, _ = case.attend(backend)

    exact, _ = case.to(torch.float64).attend(REFERENCE)
    assert_no_worse_than_eager(out, case.dense()[0], exact)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("window", [None, 10])
def test_pages_that_no_row_reads_may_hold_anything(
    backend: FlexBackend, window: int | None
) -> None:
    case = bfloat16_case([Rows(1, 90), Rows(20, 50), Rows(20, 90, key_stop=70)])
    dirty_k, dirty_v = case.k_KSD.clone(), case.v_KSD.clone()
    for pool in (dirty_k, dirty_v):
        pages = pool.unflatten(1, (-1, 16))
        is_unused = torch.ones(pages.shape[1], dtype=torch.bool)
        for segment in case.batch.segments:
            is_unused[segment.pages[: -(-segment.num_keys // 16)]] = False
        pages[:, is_unused] = torch.nan

    out, _ = replace(case, k_KSD=dirty_k, v_KSD=dirty_v).attend(backend, window)

    assert torch.equal(out, case.attend(backend, window)[0])


@pytest.mark.usefixtures("no_compilation")
def test_finite_leftovers_in_a_page_do_not_matter(backend: FlexBackend) -> None:
    clean = make_case(heads=HEADS).to(torch.bfloat16)
    dirty = make_case(heads=HEADS, unused=1e4).to(torch.bfloat16)

    out, _ = dirty.attend(backend, reach=40)

    assert torch.equal(out, clean.attend(backend, reach=40)[0])


@pytest.mark.parametrize("page_size", [8, 24])
def test_a_page_that_is_no_tile_is_refused(page_size: int) -> None:
    case = make_case(page_size=page_size).to(torch.float32)

    with pytest.raises(ValueError, match=f"page_size must be a power of two >= 16.*{page_size}"):
        case.attend(FlexBackend())


@pytest.mark.parametrize(
    ("dtype", "return_lse", "mode"),
    [
        (torch.float64, False, EagerFlex),
        (torch.float64, True, EagerFlex),
        (torch.float32, True, EagerFlex),
        (torch.bfloat16, True, EagerFlex),
        (torch.float32, False, CompiledFlex),
        (torch.bfloat16, False, CompiledFlex),
        (torch.float16, False, CompiledFlex),
    ],
)
def test_dtype_and_lse_decide_the_mode(
    dtype: torch.dtype, return_lse: bool, mode: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for candidate in (EagerFlex, CompiledFlex):

        def record(*args: object, kind: type = candidate, **options: object) -> list[None]:
            used.append(kind)
            return []

        monkeypatch.setattr(candidate, "partials", record)

    make_case().to(dtype).attend(FlexBackend(), return_lse=return_lse)

    assert used == [mode]


def test_eager_tiles_of_rows_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnemosyne.attention.flex_eager.MAX_SCORES", 1000)
    case = make_case()

    out, lse = case.attend(FlexBackend(), reach=40, return_lse=True)

    expected_out, expected_lse = case.attend(REFERENCE, reach=40, return_lse=True)
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(2, 1, 64), (2, 3, 128), (1, 8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_kernels_of_other_kinds_are_no_worse_than_eager(
    dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    case = make_case(heads=heads).to(dtype)
    backend = FlexBackend()

    for window in (None, 40):
        out, _ = case.attend(backend, window)

        exact, _ = case.to(torch.float64).attend(REFERENCE, window)
        assert_no_worse_than_eager(out, case.dense(window)[0], exact)


def test_tables_for_a_gpu_have_the_same_strides() -> None:
    partial = torch.arange(12, dtype=torch.int32).view(1, 1, 3, 4)
    shared = torch.arange(7, dtype=torch.int32).expand(1, 1, 3, 7)

    for few, many in ((partial, shared), (partial, shared[..., :2])):
        tables = alike(few, many)

        assert tables[0].shape == tables[1].shape
        assert tables[0].stride() == tables[1].stride()
        assert tables[0].is_contiguous()
        for table, given in zip(tables, (few, many), strict=True):
            assert torch.equal(table[..., : given.shape[3]], given)
