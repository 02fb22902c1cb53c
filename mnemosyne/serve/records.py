"""What a step was, for those who watch."""

from __future__ import annotations

from mnemosyne.metrics import StepRecord
from mnemosyne.schedule.plan import Plan
from mnemosyne.schedule.scheduler import Scheduler


def step_record(
    plan: Plan, scheduler: Scheduler, *, time_s: float, actual_s: float, num_missed: int
) -> StepRecord:
    """The record of a step that is back.

    Args:
        plan: of the step.
        scheduler: that made it, as it is now.
        time_s: when it was planned, seconds from the engine's start.
        actual_s: seconds that it took.
        num_missed: first tokens of the step that came after their deadlines.
    """
    num_decodes = plan.num_decodes
    decodes, prefills = plan.chunks[:num_decodes], plan.chunks[num_decodes:]
    return StepRecord(
        index=plan.index,
        time_s=time_s,
        num_decodes=num_decodes,
        chunks=tuple((c.request_id, c.start, c.num_tokens) for c in prefills),
        predicted_s=plan.predicted_s,
        actual_s=actual_s,
        pages_used=scheduler.ledger.num_used,
        num_pages=scheduler.ledger.num_pages,
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_sampled=num_decodes + sum(chunk.samples for chunk in prefills),
        decode_keys=num_decodes + sum(chunk.start for chunk in decodes),
        slack_s=plan.slack_s,
        num_missed=num_missed,
    )
