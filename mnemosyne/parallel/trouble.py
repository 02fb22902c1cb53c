"""Troubles of ranks, and which of many complaints is the cause of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

from msgspec import Struct

from mnemosyne.parallel.whereabouts import Whereabouts


class Kind(IntEnum):
    """Causes first: where several are reported, the smallest is what happened."""

    FAILED = 0  # an exception of its own
    PAUSED = 1  # it did not run for so long that others may have given it up
    LOST = 2  # its connection ended without a word
    LEFT = 3  # it ended properly, but others still needed it
    STUCK = 4  # a task takes too long; perhaps because of another rank
    BROKEN = 5  # an exception in a collective: another rank may be why
    TOLD = 6  # a signal: its sender may have seen another rank end


CAUSES = (Kind.FAILED, Kind.PAUSED, Kind.LOST, Kind.LEFT)


class Trouble(Struct, array_like=True, frozen=True, tag="trouble"):
    """A report of one rank, about itself or another."""

    rank: int  # that is in trouble
    kind: Kind
    text: str = ""
    where: Whereabouts = Whereabouts()


def judge(
    troubles: Sequence[Trouble],
    answers: Mapping[int, Whereabouts | None],
    labels: Mapping[int, str],
) -> str:
    """One line that says what happened.

    Args:
        troubles: all that was reported, oldest first; at least one.
        answers: what every rank said when it was asked where it is; None if it did not answer.
        labels: of all ranks.
    """
    kind = min(trouble.kind for trouble in troubles)
    first = next(trouble for trouble in troubles if trouble.kind == kind)
    name = name_of([first.rank], labels)
    match kind:
        case Kind.FAILED | Kind.BROKEN:
            return f"{name} failed {first.where}: {first.text}"
        case Kind.PAUSED:
            return f"{name} did not run for {first.text}; was it stopped?"
        case Kind.LOST:
            lost = sorted({trouble.rank for trouble in troubles if trouble.kind == kind})
            verb = "was" if len(lost) == 1 else "were"
            return f"{name_of(lost, labels)} {verb} lost: {first.text}"
        case Kind.LEFT:
            because = f": {first.text}" if first.text else ""
            return f"{name} ended before the others{because}"
        case Kind.STUCK:
            return _stuck(first, answers, labels)
        case Kind.TOLD:
            return f"{name} was told to end: {first.text}"


def name_of(ranks: Sequence[int], labels: Mapping[int, str]) -> str:
    """Names of ranks in messages and logs."""
    each = ", ".join(f"{rank} ({labels[rank]})" for rank in ranks)
    return f"rank {each}" if len(ranks) == 1 else f"ranks {each}"


def _stuck(
    trouble: Trouble, answers: Mapping[int, Whereabouts | None], labels: Mapping[int, str]
) -> str:
    """The rank that holds the others up: it does not answer, did not run, or waits for nobody."""
    silent = sorted(rank for rank, answer in answers.items() if answer is None)
    if silent:
        return f"{name_of(silent, labels)} did not answer; {trouble.text}"
    paused = {r: answer.paused_s for r, answer in answers.items() if answer and answer.paused_s > 0}
    if paused:
        longest = max(paused, key=lambda rank: paused[rank])
        seconds = f"{paused[longest]:.1f} s"
        return f"{name_of([longest], labels)} did not run for {seconds}; {trouble.text}"
    busy = {
        rank: answer
        for rank, answer in sorted(answers.items())
        if answer is not None and answer.task is not None and answer.collective is None
    }
    culprits = busy or {trouble.rank: trouble.where}
    each = "; ".join(
        f"{name_of([rank], labels)} is stuck {where}, for {where.seconds:.1f} s"
        for rank, where in culprits.items()
    )
    return f"{each}; {trouble.text}"
