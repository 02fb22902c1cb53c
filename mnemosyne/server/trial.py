"""Judging by deaths which request ends engines: it was there twice, and nobody else could be it."""

from __future__ import annotations

from collections.abc import Sequence

from mnemosyne.server.task import Task

MOST_DEATHS = 2  # of engines, at which a request that got no further in between was running


def judge(given: Sequence[Task]) -> bool:
    """Note a death for the requests that an engine had.

    Suspects, who were there at a death before, come to an engine one at a time. If they were the
    only ones there that have not proved themselves, they are what ended it. If others were as new
    to it, it may have been one of those: then it does not count for the suspect.

    Returns:
        Whether nobody can tell; suspects are to be tried before anything new is let in then.
    """
    unproved = [task for task in given if not task.further.is_set()]
    suspects = [task for task in unproved if task.num_deaths]
    is_open = 0 < len(suspects) < len(unproved)
    for task in given:
        task.note_death(counts=not (is_open and task in suspects))
    return is_open
