"""The state of one request in planning, from its arrival to the release of its pages."""

from __future__ import annotations

from dataclasses import dataclass

from mnemosyne.cache.chain import Chain
from mnemosyne.cache.table import PageTable
from mnemosyne.request import Request
from mnemosyne.schedule.plan import Hit
from mnemosyne.schedule.policy import Urgency

UNPLACED = PageTable(())  # of a request that waits


@dataclass(slots=True, eq=False)
class RequestState(Urgency[float]):
    """The progress of a request, as planning needs it: counts and times, never token values."""

    request: Request
    deadline_s: float  # of the first token, after arrival
    table: PageTable = UNPLACED  # where its keys lie, once it is admitted
    num_planned: int = 0  # prompt tokens in this and earlier plans, or cached
    num_reserved: int = 0  # tokens that it asks pages for when it is admitted
    num_set_back: int = 0  # how often it gave its pages up
    # tokens sampled, if pages are shared or its end is not known
    outputs: list[int] | None = None
    num_in_flight: int = 0  # steps that hold a chunk of its prompt
    is_released: bool = False
    # where prefixes are shared
    chain: Chain | None = None  # its tokens
    num_cached: int = 0  # prompt tokens that the cache holds; an estimate while it waits
    num_chained: int = 0  # of its outputs, those that the chain has
    num_computed: int = 0  # positions whose keys and values are there, and finite
    is_broken: bool = False  # its pages from now on are not shared
    hit: Hit | None = None  # once it is admitted
    leads: bytes = b""  # digest of the page that it computes next, while others may wait for it
    leader: RequestState | None = None  # while it waits: the request whose pages it waits for
    num_common: int = 0  # tokens of those pages
    leader_planned: int = -1  # tokens that that one had planned
    waits_until_s: float = 0.0  # when it goes ahead, unless that one has more planned by then
    num_needed: int = 0  # tokens of free pages that it needs, as far as that is known
    leaves: Chain | None = None  # its tokens by leaves, where there is a disk
    num_noted: int = 0  # of those, the first ones, that were looked at for the disk
    num_restored: int = 0  # prompt tokens that came from the disk
    ticket: int = 0  # drawn from the queue that it is in: how many came there before it

    @property
    def is_prefilling(self) -> bool:
        return self.num_planned < self.request.num_prompt_tokens

    @property
    def next_group(self) -> int:
        """The group that stores the next chunk."""
        return self.table.storing(self.num_planned).group
