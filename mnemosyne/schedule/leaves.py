"""The disk in planning: prompts begin after the part that it holds, and leave it their pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mnemosyne.cache.leaf_folder import LeafCounts
from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.table import PageTable
from mnemosyne.schedule.plan import Fetch, Plan, Restore, Save
from mnemosyne.schedule.prefixes import Prefixes
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.restores import Restores
from mnemosyne.schedule.saves import Disk, Saves


class Leaves:
    """Saves and restores of a scheduler; without a disk there are none.

    Args:
        disk: rank 0's way to it; None: there is none.
        ledger: the pages of the cache.
        prefixes: what requests share; None: nothing, and so there is no disk.
        advance: tells the router that less of a prompt is left.
        compute_s: predicted seconds of a prompt between two positions.
    """

    def __init__(
        self,
        disk: Disk | None,
        ledger: Ledger,
        prefixes: Prefixes | None,
        advance: Callable[[PageTable, int, int], None],
        compute_s: Callable[[int, int], float],
    ) -> None:
        self._disk = disk
        self._saves: Saves | None = None
        self._restores: Restores | None = None
        if disk is not None and prefixes is not None:
            self._saves = Saves(disk, ledger, prefixes.chain_by)
            self._restores = Restores(disk, self._saves, prefixes, advance, compute_s)
            prefixes.on_whole = self._saves.note

    def begin(self, state: RequestState) -> bool:
        """Have the beginning of an admitted prompt read; whether it is (see ``Restores.begin``)."""
        return self._restores is not None and self._restores.begin(state)

    def fetches(self) -> tuple[Fetch, ...]:
        """The leaves that are read from now on."""
        return () if self._restores is None else self._restores.fetches()

    def restores(self, *, has_others: bool) -> tuple[Restore, ...]:
        """The pieces that are restored in a step (see ``Restores.take``)."""
        if not self._restores:
            return ()
        return tuple(self._restores.take(has_others=has_others))

    def saves(self, step_s: float, *, delays_decodes: bool) -> tuple[Save, ...]:
        """The leaves that are copied in a step (see ``Saves.take``)."""
        if not self._saves:
            return ()
        return tuple(self._saves.take(step_s, delays_decodes=delays_decodes))

    def rest(self) -> tuple[Save, ...]:
        """The leaves that are left when no step follows, as many as there is room for."""
        if not self._saves or self._disk is None:
            return ()
        return tuple(self._saves.take_some(self._disk.num_room))

    def counters(self) -> dict[str, float]:
        """Counts of what rank 0 did with its folder, by name; any thread may ask."""
        counts = LeafCounts() if self._disk is None else self._disk.folder.counts
        return {
            "cache_restored_tokens": counts.tokens_restored,
            "cache_written_bytes": counts.bytes_written,
            "cache_read_bytes": counts.bytes_read,
            "cache_refused_files": counts.files_refused,
            "cache_skipped_leaves": counts.leaves_skipped,
        }

    def complete(
        self, plan: Plan, restored: Mapping[int, int], states: Mapping[int, RequestState]
    ) -> list[RequestState]:
        """Take note of the leaves that a step restored (see ``Restores.complete``)."""
        if self._restores is None or not plan.restores:
            return []
        return self._restores.complete(plan, restored, states)

    def discard(self, state: RequestState) -> bool:
        """Forget a prompt that waits for the disk; whether it did."""
        return self._restores is not None and self._restores.discard(state)

    def clear(self) -> None:
        """Forget the prompts that wait for the disk, and the leaves that wait to be copied."""
        if self._saves is not None and self._restores is not None:
            self._saves.clear()
            self._restores.clear()

    def remove_all(self) -> None:
        """Remove this model's files from the disk."""
        if self._saves is not None and self._disk is not None:
            self._saves.clear()
            self._disk.clear()
