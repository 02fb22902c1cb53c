"""Claims about outputs that other requests have as their prompts."""

from __future__ import annotations

from tests.schedule.clocked import PAGE_SIZE
from tests.schedule.test_prefixes import make_request, make_scheduler, starts_of, step


def test_output_that_another_request_has_as_its_prompt_is_known_once():
    scheduler = make_scheduler()
    scheduler.add(make_request(0, [1], max_tokens=40))
    for _ in range(2 * PAGE_SIZE + 1):
        step(scheduler)  # two pages of the first one are known
    ahead = [1] + [7] * (3 * PAGE_SIZE)
    scheduler.add(make_request(1, ahead))

    plans = [step(scheduler) for _ in range(2 * PAGE_SIZE)]

    assert starts_of(plans[0])[1] == 2 * PAGE_SIZE
    assert all(0 in starts_of(plan) for plan in plans)
