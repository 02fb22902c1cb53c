"""What planning knows of one request, from its arrival to the release of its pages."""

from __future__ import annotations

from dataclasses import dataclass

from mnemosyne.cache.table import PageTable
from mnemosyne.request import Request
from mnemosyne.schedule.policy import Urgency

UNPLACED = PageTable(())  # of a request that waits


@dataclass(slots=True, eq=False)
class RequestState(Urgency[float]):
    """How far a request is, as planning needs it: counts and times, never token values."""

    request: Request
    deadline_s: float  # of the first token, after arrival
    table: PageTable = UNPLACED  # where its keys lie, once it is admitted
    num_planned: int = 0  # prompt tokens in this and earlier plans
    num_in_flight: int = 0  # steps that hold a chunk of its prompt
    is_released: bool = False
    ticket: int = 0  # drawn from the queue that it is in: how many came there before it

    @property
    def is_prefilling(self) -> bool:
        return self.num_planned < self.request.num_prompt_tokens

    @property
    def next_group(self) -> int:
        """The group that stores the next chunk."""
        return self.table.storing(self.num_planned).group
