"""Words for how far the start of an engine is, as ``/ready`` and the log show them."""

from __future__ import annotations

LOADING, COMPILING = "loading weights", "compiling"
PREPARING = "preparing steps"  # pages are set aside, steps are recorded and their times measured


def stage_of(what: str, num_done: int, num_total: int) -> str:
    """Name the stage that a start is in; nothing is told of what follows a part that is done.

    Args:
        what: the part that tells, ``LOADING`` or ``COMPILING``.
        num_done: of it.
        num_total: in all.
    """
    if num_done >= num_total:
        return PREPARING
    return f"{what}: {100 * num_done // num_total}%"
