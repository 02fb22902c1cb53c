"""Records of steps, and of what the cache held, for those who watch."""

from __future__ import annotations

import logging

from mnemosyne.metrics import StepRecord
from mnemosyne.request import RequestOutput
from mnemosyne.schedule.plan import Hit, Plan
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.serve.tokenizer import Tokenizer

SHOWN_TOKENS = 24  # of a prompt, from where it differs from the nearest cached one

log = logging.getLogger(__name__)


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
        groups=tuple(chunk.group for chunk in prefills),
        num_handed=plan.num_handed,
        pages_lent=scheduler.ledger.num_lent,
        num_set_back=len(plan.set_back),
        leaves_saved=len(plan.saves),
        leaves_restored=sum(restore.stop - restore.first for restore in plan.restores),
        hits=tuple((hit.request_id, hit.num_tokens, hit.differs_at) for hit in plan.hits),
    )


def note_hit(
    hit: Hit, output: RequestOutput, tokenizer: Tokenizer | None, *, logs_text: bool
) -> None:
    """Enter in the metrics of a request what the cache held of its prompt, and log a miss.

    Args:
        hit: of the request, as it was admitted.
        output: of the request.
        tokenizer: turns ids into text; None: ids are shown.
        logs_text: whether what both prompts hold there may stand in the log.
    """
    metrics, num_tokens = output.metrics, len(output.prompt_token_ids)
    metrics.num_cached, metrics.differs_at = min(hit.num_tokens, num_tokens), hit.differs_at
    if hit.differs_at is None or hit.differs_at >= num_tokens:
        return
    ids = output.prompt_token_ids[hit.differs_at :][:SHOWN_TOKENS].tolist()
    here, cached = (_shown(part, tokenizer) for part in (ids, list(hit.cached_ids)))
    where = f"token {hit.differs_at:,} of {num_tokens:,}"
    metrics.cache_miss = f"differs at {where}: {here} where {cached} is cached"
    told = metrics.cache_miss if logs_text else f"differs at {where}"
    log.info("prompt of request %d %s", hit.request_id, told)


def _shown(ids: list[int], tokenizer: Tokenizer | None) -> str:
    return repr(ids if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False))
