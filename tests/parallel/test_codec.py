"""Decisions of rank 0 reach the other ranks as they were, in few bytes."""

from __future__ import annotations

import dataclasses
from collections import ChainMap, UserList
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mnemosyne.cache.table import Extent, PageTable
from mnemosyne.parallel.codec import (
    Interrupted,
    Outputs,
    Stop,
    decode,
    decode_result,
    encode,
    encode_result,
    pages_to_runs,
    runs_to_pages,
)
from mnemosyne.request import Logprobs, RequestMetrics, RequestOutput, Sampled, SamplingParams
from mnemosyne.schedule.plan import (
    Admission,
    Chunk,
    Fetch,
    PageCopy,
    Plan,
    Restore,
    Save,
    SaveFrom,
    StepResult,
)
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.intake import Intake
from mnemosyne.serve.tokenizer import Tokenizer
from tests.serve.made_tokenizers import words

DEFAULTS = GenerationDefaults(end_token_ids=(7,), temperature=0.5)

counts = st.integers(0, 2**40)
tokens = st.integers(0, 2**31 - 1)
finite = st.floats(allow_nan=False)
request_ids = st.integers(-(2**31), 2**40)  # those of the sweep at start-up are negative
id_arrays = npst.arrays(np.int64, st.integers(0, 30), elements=st.integers(-(2**40), 2**40))
page_arrays = npst.arrays(np.int64, st.integers(0, 12), elements=st.integers(0, 20))

params = st.builds(
    SamplingParams,
    temperature=st.none() | st.floats(0, 2),
    top_k=st.none() | st.integers(0, 100),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=2),
    stop_token_ids=st.lists(tokens, max_size=2),
    seed=st.none() | st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.integers(0, 5),
)
# what clients write: numbers and containers of any library, whatever their range
numbers = (
    st.integers(-3, 40)
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.booleans()
    | st.none()
    | st.builds(Fraction, st.integers(0, 9), st.integers(1, 9))
    | st.builds(np.int8, st.integers(-2, 100))
    | st.builds(np.uint64, st.integers(0, 2**64 - 1))
    | st.builds(np.float32, st.floats(0, 2, width=32))
    | st.builds(np.longdouble, st.floats(0, 2))
)
written_ids = st.lists(st.integers(0, 299) | numbers, max_size=3)
written = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "min_p", "n"), numbers),
        **dict.fromkeys(("seed", "priority", "logprobs", "deadline"), numbers),
        **dict.fromkeys(("repetition_penalty", "presence_penalty"), numbers),
        "stop": st.none() | st.text() | st.lists(st.text(), max_size=2).map(UserList),
        "stop_token_ids": written_ids | written_ids.map(set) | st.builds(range, st.integers(0, 9)),
        "logit_bias": st.dictionaries(st.integers(0, 299), numbers, max_size=2).map(ChainMap),
        "ignore_eos": st.booleans() | st.builds(np.bool_, st.booleans()),
    },
)
extents = st.builds(Extent, st.integers(0, 63), counts, page_arrays)
several_extents = st.lists(extents, max_size=3).map(tuple)
tables = st.builds(PageTable, several_extents, several_extents)
copies = st.builds(PageCopy, st.integers(0, 63), st.tuples(counts), st.tuples(counts))
admissions = st.builds(
    Admission,
    request_ids,
    id_arrays,
    params,
    st.integers(0, 2**63 - 1),
    st.lists(tokens, max_size=3).map(tuple),
    counts,
)
groups = st.none() | st.integers(0, 63)
chunks = st.builds(Chunk, request_ids, counts, counts, st.booleans(), st.none() | tokens, groups)
digests = st.binary(min_size=32, max_size=32)
sources = st.builds(SaveFrom, counts, counts, counts, st.lists(counts).map(tuple), counts)
saves = st.builds(
    Save, digests, digests, counts, st.binary(max_size=64), st.lists(sources, max_size=2).map(tuple)
)
parts = st.lists(st.lists(st.text(max_size=9), max_size=2).map(tuple), max_size=2).map(tuple)
leaves = st.lists(digests, max_size=2).map(tuple)
fetches = st.builds(Fetch, request_ids, counts, digests, leaves, parts)
restores = st.builds(Restore, request_ids, counts, counts, counts)
plans = st.builds(
    Plan,
    counts,
    st.lists(chunks, max_size=6).map(tuple),
    st.lists(admissions, max_size=2).map(tuple),
    st.lists(request_ids, max_size=3).map(tuple),
    st.lists(st.tuples(request_ids, tables), max_size=2).map(tuple),
    st.lists(copies, max_size=2).map(tuple),
    st.lists(saves, max_size=2).map(tuple),
    st.lists(fetches, max_size=2).map(tuple),
    st.lists(restores, max_size=2).map(tuple),
    finite,
)
logprobs = st.builds(
    Logprobs,
    tokens,
    finite,
    st.integers(1, 2**20),
    st.lists(st.tuples(tokens, finite), max_size=3).map(tuple),
)
results = st.builds(
    StepResult,
    counts,
    st.dictionaries(
        request_ids,
        st.builds(Sampled, tokens, st.none() | logprobs, st.none() | st.just("not finite")),
        max_size=4,
    ),
    st.dictionaries(st.tuples(request_ids, counts), st.lists(logprobs, max_size=3), max_size=2),
    restored=st.dictionaries(request_ids, counts, max_size=2),
)


@given(written)
def test_whatever_passes_the_door_can_be_sent(fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer(words())
    intake = Intake(
        vocab_size=300, max_positions=64, defaults=DEFAULTS, tokenizer=tokenizer, model="m"
    )
    try:
        requests = intake.requests([5, 6], SamplingParams(**fields), 0.0)
    except ValueError:
        return
    request = requests[-1]
    admission = Admission(
        request.request_id,
        request.prompt_ids,
        request.params,
        request.seed,
        request.end_token_ids,
    )
    plan = Plan(index=0, chunks=(), admitted=(admission,))

    assert plain(decode(encode(plan))) == plain(plan)


def plain(value: Any) -> Any:
    """Nested plain values that compare equal where the originals say the same."""
    if isinstance(value, np.ndarray):
        return (value.dtype, value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
        return (type(value), fields)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@given(plans)
def test_a_plan_arrives_as_it_was(plan: Plan) -> None:
    assert plain(decode(encode(plan))) == plain(plan)


@given(results)
def test_a_result_arrives_as_it_was(result: StepResult) -> None:
    assert decode_result(encode_result(result)) == result


@given(page_arrays)
def test_any_pages_are_runs_and_back(pages: np.ndarray) -> None:
    runs = pages_to_runs(pages)

    assert runs_to_pages(runs).tolist() == pages.tolist()
    assert runs_to_pages(runs).dtype == np.int64


@pytest.mark.parametrize("message", [Stop(), Interrupted("ValueError", "params must fit")])
def test_other_messages_arrive_as_they_were(message: Stop | Interrupted) -> None:
    assert decode(encode(message)) == message


def test_outputs_arrive_with_their_samples_and_arrays() -> None:
    metrics = RequestMetrics(arrival_s=1.5, ttft_s=0.25, tbt_s=[0.1], chunks=[3], finished_s=2.0)
    first, second = (
        RequestOutput(
            request_id=request_id,
            prompt_token_ids=np.array([5, 2**31]),
            token_ids=[7, 8],
            text="héllo",
            finish_reason="stop",
            stop_reason=stop_reason,
            logprobs=[Logprobs(7, -0.5, 1, ((7, -0.5), (9, -2.0)))],
            prompt_logprobs=[None, Logprobs(5, -1.0, 2)],
            metrics=metrics,
        )
        for request_id, stop_reason in ((0, 8), (1, "end"))
    )
    first.samples = [first, second]
    refused = RequestOutput(
        request_id=None,
        prompt_token_ids=np.empty(0, dtype=np.int64),
        finish_reason="error",
        error="prompt must not be empty",
        metrics=RequestMetrics(arrival_s=0.0),
    )

    message = decode(encode(Outputs([first, refused])))

    assert isinstance(message, Outputs)
    one, two = message.outputs
    assert one.samples[0] is one
    assert len(one.samples) == 2
    assert plain(one.samples[1]) == plain(second)
    assert plain(two) == plain(refused)
    one.samples, first.samples = [], []  # an output is among its own samples
    assert plain(one) == plain(first)


def test_decoded_arrays_may_be_written_to() -> None:
    admission = Admission(0, np.arange(4), SamplingParams(), 0, ())
    tables = ((0, PageTable.on(0, np.arange(8))),)

    decoded = decode(encode(Plan(0, (), (admission,), tables=tables)))

    assert isinstance(decoded, Plan)
    (admitted,) = decoded.admitted
    assert admitted.prompt_ids.flags.writeable
    ((_, table),) = decoded.tables
    assert table.pages_on(0).flags.writeable


@pytest.mark.parametrize("context", [1_000, 10_000_000])
def test_a_decode_takes_few_bytes_whatever_its_context(context: int) -> None:
    chunks = tuple(Chunk(100_000 + i, context + i, 1, True, 100_000 + i) for i in range(256))

    size = len(encode(Plan(10**6, chunks, predicted_s=0.1)))

    assert size <= 256 * 20


def test_a_long_prompt_takes_four_bytes_per_token_and_its_pages_nearly_none() -> None:
    num_tokens, page_size = 1_000_000, 128
    pages = np.arange(num_tokens // page_size)
    admission = Admission(
        request_id=0,
        prompt_ids=np.arange(num_tokens),
        params=SamplingParams(),
        seed=0,
        end_token_ids=(),
    )

    size = len(encode(Plan(0, (), (admission,), tables=((0, PageTable.on(0, pages)),))))

    assert size <= 4 * num_tokens + 1000
