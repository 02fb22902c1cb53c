"""Joins a scheduler and the ledger of pages that are all free."""

from __future__ import annotations

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.ledger import Ledger
from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.saves import Disk
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import WorkModel


def build_scheduler(
    config: ScheduleConfig,
    slo: SloConfig,
    *,
    num_groups: int,
    num_pages: int,
    page_size: int,
    max_tokens_per_group: int,
    predictor: Predictor,
    work_model: WorkModel,
    depth: int = 1,
    fingerprint: bytes | None = None,
    disk: Disk | None = None,
    kinds: PageKinds | None = None,
) -> Scheduler:
    """A scheduler over empty caches.

    Args:
        config: as for ``Scheduler``, like all that is not named here.
        slo: when a first token is due.
        num_groups: degree of the kvp axis.
        num_pages: of each group.
        page_size: tokens per page.
        max_tokens_per_group: of one request.
        predictor: step time.
        work_model: counts the work of a chunk.
        depth: steps that may be in flight.
        fingerprint: of a model whose requests share prefixes; None: they share nothing.
        disk: where prefixes outlive the process, if anywhere.
        kinds: of its layers; None: each keeps every key.
    """
    ledger = Ledger(
        [num_pages] * num_groups,
        page_size=page_size,
        max_tokens_per_group=max_tokens_per_group,
        shares=fingerprint is not None,
        kinds=kinds,
    )
    return Scheduler(
        config,
        slo,
        ledger=ledger,
        fingerprint=fingerprint or b"",
        predictor=predictor,
        work_model=work_model,
        depth=depth,
        disk=disk,
    )
