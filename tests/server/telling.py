"""Words about an engine in tests of the link: no more than the front needs."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.server.backend import About, Event, Job, Status


class TellingBackend:
    """A ``Backend`` that takes no job; the link has a way of its own to the engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine._engine

    async def about(self) -> About:
        """Of the engine."""
        intake, ledger = self._engine.intake, self._engine.scheduler.ledger
        return About(
            model=intake.model,
            version="0",
            vocab_size=intake.vocab_size,
            max_model_len=intake.max_positions,
            max_request_tokens=ledger.max_request_tokens(),
            num_pages=ledger.num_pages,
            page_size=ledger.page_size,
            keeps_prefixes=ledger.shares,
        )

    def status(self) -> Status:
        """Of the engine."""
        scheduler = self._engine.scheduler
        return Status(
            is_ready=True, num_running=scheduler.num_running, pages_used=scheduler.ledger.num_used
        )

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Refused."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> bool:
        """Refused."""
        raise NotImplementedError

    async def clear_cache(self) -> int:
        """Nothing is kept."""
        return 0
