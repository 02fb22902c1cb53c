"""Every backend gives the attention of the reference, and the reference that of plain torch."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mnemosyne.attention import (
    AttentionBackend,
    ReferenceBackend,
    choose_backend,
    merge_partials,
)
from mnemosyne.cache.layout import slots_of
from tests.attention.cases import (
    LAYOUTS,
    WINDOWS,
    Case,
    Rows,
    assert_exact,
    assert_no_worse_than_eager,
    make_case,
)

HEADS = ((2, 1, 16), (2, 2, 64), (1, 4, 128), (1, 8, 64))  # K, G, D
NAMES = ("cpu", "flex")  # in float64, flex is eager
CPU = torch.device("cpu")
REFERENCE = ReferenceBackend()


@functools.cache
def backend_of(name: str, heads: tuple[int, int, int]) -> AttentionBackend:
    """One per kind of heads, as a process has: FlexAttention is traced once for each."""
    return choose_backend(name, device=CPU, dtype=torch.float64, head_dim=64)


@pytest.mark.parametrize("window", WINDOWS)
def test_reference_is_dense_attention(window: int | None) -> None:
    case = make_case()

    out, lse = case.attend(REFERENCE, window, return_lse=True)

    expected_out, expected_lse = case.dense(window)
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


@pytest.mark.parametrize("name", ["reference", *NAMES])
def test_lse_is_the_natural_logarithm_of_the_sum_of_exponents(name: str) -> None:
    case = make_case([Rows(1, 20)])
    backend = backend_of(name, (2, 2, 16))

    _, lse = case.attend(backend, return_lse=True)

    (segment,) = case.batch.segments
    first_slot = int(segment.pages[0]) * 16
    slots = [*range(first_slot, first_slot + 16)]
    slots += range(int(segment.pages[1]) * 16, int(segment.pages[1]) * 16 + 5)
    score_HS = torch.einsum("hd,hsd->hs", case.q_THD[0], case.k_KSD[[0, 0, 1, 1]][:, slots])
    assert lse is not None
    torch.testing.assert_close(lse[0], torch.log(torch.exp(score_HS * case.scale).sum(1)))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_is_exact(
    name: str, heads: tuple[int, int, int], layout: str, window: int | None
) -> None:
    case = make_case(heads=heads, layout=layout)

    out, lse = case.attend(backend_of(name, heads), window, return_lse=True)

    expected_out, expected_lse = case.attend(REFERENCE, window, return_lse=True)
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_mixed_batch_is_exact_in_the_interpreter_of_triton(window: int | None) -> None:
    case = make_case(heads=(1, 3, 24))

    backend = backend_of("triton", (1, 3, 24))
    unseen = replace(
        case, k_KSD=seen_only(case, case.k_KSD, window), v_KSD=seen_only(case, case.v_KSD, window)
    )

    out, lse = unseen.attend(backend, window, return_lse=True)

    expected_out, expected_lse = case.attend(REFERENCE, window, return_lse=True)
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


@pytest.mark.parametrize("page_size", [1, 3, 256])
@pytest.mark.parametrize("name", [*NAMES, "triton"])
def test_any_page_size_is_exact(name: str, page_size: int) -> None:
    case = make_case(page_size=page_size, num_pages=30 + 4096 // page_size)

    out, _ = case.attend(backend_of(name, (2, 2, 16)), reach=40)

    assert_exact(out, case.attend(REFERENCE, reach=40)[0])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["reference", *NAMES])
def test_slots_that_no_row_may_see_do_not_matter(name: str, window: int | None) -> None:
    case = make_case()
    unseen = replace(
        case, k_KSD=seen_only(case, case.k_KSD, window), v_KSD=seen_only(case, case.v_KSD, window)
    )

    out, lse = unseen.attend(backend_of(name, (2, 2, 16)), window, return_lse=True)

    expected_out, expected_lse = case.attend(backend_of(name, (2, 2, 16)), window, return_lse=True)
    assert torch.equal(out, expected_out)
    assert lse is not None
    assert expected_lse is not None
    assert torch.equal(lse, expected_lse)


def seen_only(case: Case, pool: torch.Tensor, window: int | None) -> torch.Tensor:
    """The pool with nan wherever no row of any segment looks."""
    result = torch.full_like(pool, torch.nan)
    size = case.batch.page_size
    for segment in case.batch.segments:
        last = segment.first_position + segment.num_rows - 1
        for key in range(segment.num_keys):
            position = segment.first_key + key
            oldest = 0 if window is None else segment.first_position - window + 1
            if oldest <= position <= last:
                slot = int(segment.pages[key // size]) * size + key % size
                result[:, slot] = pool[:, slot]
    return result


@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("name", ["reference", *NAMES, "triton"])
def test_shards_merge_to_the_whole(name: str, window: int | None) -> None:
    whole = make_case([Rows(1, 80), Rows(33, 60), Rows(5, 0)])
    backend = backend_of(name, (2, 2, 16))
    cuts = [0, 20, 21, 21, 70, 200]  # one token; none; from within a chunk; after some queries

    shards = [shard_of(whole, *cut) for cut in pairwise(cuts)]
    partials = [shard.attend(backend, window, return_lse=True) for shard in shards]
    outs, lses = zip(*partials, strict=True)
    merged_out, merged_lse = merge_partials(torch.stack(outs), torch.stack(lses))

    expected_out, expected_lse = whole.attend(REFERENCE, window, return_lse=True)
    assert_exact(merged_out, expected_out)
    assert_exact(merged_lse, expected_lse)


def shard_of(case: Case, start: int, stop: int) -> Case:
    """The case with only the keys at positions from start to stop, in pages of their own."""
    size = case.batch.page_size
    pools = torch.zeros_like(case.k_KSD), torch.zeros_like(case.v_KSD)
    segments, first_page = [], 0
    for segment in case.batch.segments:
        num_keys = max(0, min(stop, segment.num_keys) - start)
        pages = np.arange(first_page, first_page + -(-num_keys // size), dtype=np.int64)
        first_page += len(pages)
        old = slots_of(segment.pages, start, num_keys, size)
        for pool, whole in zip(pools, (case.k_KSD, case.v_KSD), strict=True):
            pool[:, slots_of(pages, 0, num_keys, size)] = whole[:, old]
        segments.append(segment._replace(first_key=start, num_keys=num_keys, pages=pages))
    batch = replace(case.batch, segments=tuple(segments))
    return replace(case, batch=batch, k_KSD=pools[0], v_KSD=pools[1])


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["reference", *NAMES, "triton"])
def test_low_precision_is_no_worse_than_eager_torch(
    name: str, dtype: torch.dtype, window: int | None
) -> None:
    case = make_case(heads=(2, 4, 64)).to(dtype)
    backend = choose_backend(name, device=CPU, dtype=dtype, head_dim=64)

    out, lse = case.attend(backend, window, return_lse=True)

    exact_out, exact_lse = case.to(torch.float64).attend(REFERENCE, window, return_lse=True)
    assert exact_lse is not None
    assert lse is not None
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    eager_out, eager_lse = case.dense(window)
    assert_no_worse_than_eager(out, eager_out, exact_out)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    seen = ~lse.isneginf()
    assert_no_worse_than_eager(lse[seen], eager_lse[seen], exact_lse[seen])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", ["flex", "triton"])
def test_a_gpu_is_exact_in_float64_and_no_worse_than_eager_below(
    name: str, dtype: torch.dtype, layout: str, window: int | None
) -> None:
    exact = make_case(heads=(2, 4, 64), layout=layout).to(dtype).to(torch.float64)
    case = exact.to(dtype, "cuda")
    backend = choose_backend(name, device=torch.device("cuda"), dtype=dtype, head_dim=64)

    out, lse = case.attend(backend, window, return_lse=True)
    out_alone, _ = case.attend(backend, window)

    expected_out, expected_lse = exact.attend(REFERENCE, window, return_lse=True)
    assert lse is not None
    assert expected_lse is not None
    assert torch.equal(lse.isneginf().cpu(), expected_lse.isneginf())
    if dtype == torch.float64:
        assert_exact(out.cpu(), expected_out)
        assert_exact(out_alone.cpu(), expected_out)
        assert_exact(lse.cpu(), expected_lse)
        return
    eager_out, eager_lse = (x.cpu() for x in case.dense(window))
    assert_no_worse_than_eager(out.cpu(), eager_out, expected_out)
    assert_no_worse_than_eager(out_alone.cpu(), eager_out, expected_out)
    seen = ~expected_lse.isneginf()
    assert_no_worse_than_eager(lse.cpu()[seen], eager_lse[seen], expected_lse[seen])
