"""Properties of the scheduler that hold for every workload, policy and chunk rule."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemosyne.config import POLICIES
from mnemosyne.request import Request
from mnemosyne.schedule.scheduler import Scheduler
from tests.schedule.clocked import Rates, Run, make_request, make_scheduler, serve

TARGET_S = 0.05
MIN_CHUNK = 8
MACHINE = Rates(1e-3, pair_s=1e-6, key_s=1e-6, step_s=2e-3)
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

requests = st.lists(
    st.fixed_dictionaries(
        {
            "num_prompt_tokens": st.one_of(st.integers(1, 60), st.integers(200, 900)),
            "max_tokens": st.integers(1, 8),
            "arrival_s": st.floats(0, 3),
            "deadline_s": st.none() | st.floats(0.01, 20) | st.sampled_from([1e-300, 1e300, 1e308]),
            "priority": st.integers(0, 2),
        }
    ),
    min_size=1,
    max_size=25,
)
groups = st.sampled_from(
    [([240], None), ([120, 120], 480), ([80, 80, 80], 320), ([260, 240, 230], None)]
)


def _workload(fields: list[dict]) -> list[Request]:
    return [make_request(request_id, **each) for request_id, each in enumerate(fields)]


def _serve(fields: list[dict], policy: str, layout, **config) -> tuple[Run, Scheduler]:
    num_pages, max_tokens_per_group = layout
    scheduler = make_scheduler(
        MACHINE,
        num_pages=num_pages,
        max_tokens_per_group=max_tokens_per_group,
        policy=policy,
        **{
            "target_tbt": TARGET_S,
            "min_chunk": MIN_CHUNK,
            "max_sequences": 6,
            "long_tokens": 250,
            **config,
        },
    )
    return serve(scheduler, _workload(fields)), scheduler


@pytest.mark.parametrize("policy", POLICIES)
@SETTINGS
@given(fields=requests, layout=groups, chunk=st.sampled_from(["adaptive", 16, 300]))
def test_everyone_is_served_and_every_page_comes_back(policy, fields, layout, chunk):
    run, scheduler = _serve(fields, policy, layout, chunk=chunk)

    assert sorted(run.finished_s) == list(range(len(fields)))
    for request_id, each in enumerate(fields):
        assert run.sampled[request_id] == each["max_tokens"]
        num_tokens = each["num_prompt_tokens"] + each["max_tokens"] - 1
        assert run.computed[request_id] == num_tokens
    assert scheduler.ledger.num_used == 0


@pytest.mark.parametrize("policy", POLICIES)
@SETTINGS
@given(fields=requests, layout=groups)
def test_decodes_never_wait_for_a_prefill_beyond_the_budget(policy, fields, layout):
    """Beyond it goes the smallest chunk of one prompt at most, with a tail too small to cut."""
    run, _ = _serve(fields, policy, layout)

    for plan in run.plans:
        prefills = [chunk for chunk in plan.chunks if not chunk.is_decode]
        if plan.predicted_s <= TARGET_S or len(prefills) == len(plan.chunks):
            continue
        assert min((chunk.num_tokens for chunk in prefills), default=0) < 2 * MIN_CHUNK


@pytest.mark.parametrize("policy", POLICIES)
@SETTINGS
@given(fields=requests)
def test_at_most_one_long_prompt_takes_part_in_a_step(policy, fields):
    run, _ = _serve(fields, policy, ([240], None))

    for plan in run.plans:
        long = [c for c in plan.chunks if fields[c.request_id]["num_prompt_tokens"] > 250]
        assert sum(not chunk.is_decode for chunk in long) <= 1


@pytest.mark.parametrize("policy", POLICIES)
@SETTINGS
@given(fields=requests)
def test_within_a_class_no_prompt_is_in_a_step_that_a_higher_class_is_kept_out_of(policy, fields):
    """With a fixed chunk and room for all, a lower class takes only what others leave."""
    run, _ = _serve(fields, policy, ([6000], None), chunk=16, max_sequences=64)
    left = {i: each["num_prompt_tokens"] for i, each in enumerate(fields)}
    admitted: set[int] = set()

    for plan in run.plans:
        admitted |= {admission.request_id for admission in plan.admitted}
        prefills = [chunk for chunk in plan.chunks if not chunk.is_decode]
        for chunk in prefills:
            left[chunk.request_id] -= chunk.num_tokens
        lowest = max((fields[c.request_id]["priority"] for c in prefills), default=0)
        assert not any(left[i] and fields[i]["priority"] < lowest for i in admitted)


@pytest.mark.parametrize("policy", POLICIES)
@SETTINGS
@given(fields=requests, chunk=st.sampled_from(["adaptive", 16, 300]))
def test_no_chunk_crosses_into_another_group(policy, fields, chunk):
    run, _ = _serve(fields, policy, ([80, 80, 80], 320), chunk=chunk)

    for plan in run.plans:
        for part in plan.chunks:
            assert part.start // 320 == (part.stop - 1) // 320
