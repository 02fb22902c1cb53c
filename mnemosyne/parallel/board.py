"""Small messages between the ranks of one host, through memory that all of them see.

A message through the network stack of an idle processor takes a millisecond or more until both ends
have woken up, and a step exchanges one in every layer. Ranks do not block here: each writes to
shared memory and polls until its peers have written.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

BOARD_BYTES = 1 << 18  # of a message, at most
LINE = 64  # bytes; counters that share a cache line slow each other down
NAME_BYTES = 512  # of a host and a file
LOOK_S = 0.05  # how long a rank looks without a pause
PAUSE_S = 1e-4


class Board:
    """Gathers of one axis, one after the other; every rank makes the same ones.

    A rank writes its messages to two places in turn. When it writes to one again, all ranks have
    begun the gather in between, and so are done with reading what stood there.

    Args:
        memory: the same on every rank, zeros at first.
        degree: of the axis.
        index: of this rank.
        axis: the name of the axis, for reports about a rank that waits here.
    """

    def __init__(self, memory: mmap.mmap, degree: int, index: int, *, axis: str) -> None:
        self.axis_name = axis
        self._counts = np.frombuffer(memory, np.int64, degree * LINE // 8)[:: LINE // 8]
        places = torch.frombuffer(memory, dtype=torch.uint8, offset=degree * LINE)
        self._places = places.view(2, degree, BOARD_BYTES)
        self._index = index
        self._count = 0  # messages that this rank wrote
        self._is_waited_for = True

    def post(self, x: Tensor) -> None:
        """Write this rank's message.

        Args:
            x: of at most ``BOARD_BYTES``, of the same shape and dtype on every rank.
        """
        assert self._is_waited_for, "one gather at a time"
        self._is_waited_for = False
        self._count += 1
        place = self._places[self._count % 2, self._index]
        place[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        self._counts[self._index] = self._count  # x86 makes writes visible in their order

    def wait(self, like: Tensor) -> Tensor:
        """The messages of all ranks, ``[degree, *like.shape]``, once all have written.

        Args:
            like: what this rank posted.
        """
        for peer in range(len(self._counts)):
            self._look_at(peer)
        self._is_waited_for = True
        found = self._places[self._count % 2, :, : like.nbytes].contiguous()
        return found.view(-1).view(like.dtype).view(-1, *like.shape)

    def _look_at(self, peer: int) -> None:
        counts, count = self._counts, self._count
        started_s = time.perf_counter()
        while counts[peer] < count:
            # only an unbalanced step makes a rank this late; the watchdog notices dead ones
            if time.perf_counter() - started_s > LOOK_S:
                time.sleep(PAUSE_S)


def open_board(group: ProcessGroup, *, axis: str, ranks_on_host: int) -> Board | None:
    """Memory that the ranks of a group share; all of them call it at once.

    None where they are not all on this host, where the ranks of a host outnumber its cores, so that
    one that looks would keep another from working, or where the processor is no x86-64.

    Args:
        group: of gloo.
        axis: the name of the axis.
        ranks_on_host: how many ranks there are on this host, in all groups.
    """
    degree, index = dist.get_world_size(group), dist.get_rank(group)
    has_cores = ranks_on_host <= len(os.sched_getaffinity(0)) if _is_able() else False
    made = _create(degree) if index == 0 and has_cores else None
    words = [_host() if has_cores else f"none {index}", "" if made is None else _describe(made)]
    names = _gather_names("\n".join(words), group)
    memory = _map(names[0][1]) if len({host for host, _ in names}) == 1 and names[0][1] else None
    is_open = _gather_names(f"{memory is not None}\n", group)
    if made is not None:
        os.close(made)  # the memory lives on while it is mapped
    if memory is None or not all(word == "True" for word, _ in is_open):
        return None
    return Board(memory, degree, index, axis=axis)


def _is_able() -> bool:
    return platform.machine() == "x86_64" and hasattr(os, "sched_getaffinity")


def _host() -> str:
    """This host, and which part of it: a launcher that was started twice means two hosts."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{platform.node()} {boot} {os.environ.get('GROUP_RANK', '')}"


def _create(degree: int) -> int | None:
    """Memory without a name, which no rank that is killed can leave behind: its descriptor."""
    descriptor = None
    try:
        descriptor = os.memfd_create("mnemosyne-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(descriptor, 0o600)
        os.posix_fallocate(descriptor, 0, degree * (LINE + 2 * BOARD_BYTES))
        # memory that shrinks under a mapping kills its readers
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:  # no room: messages take the default way
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _describe(descriptor: int) -> str:
    """Where other processes of this user open the memory, and how they know it again."""
    inode = os.fstat(descriptor).st_ino
    return f"{os.getpid()} {descriptor} {inode}"


def _map(words: str) -> mmap.mmap | None:
    """The memory that ``_describe`` names; None if it is not there, not ours or another's."""
    process, descriptor, inode = (int(word) for word in words.split())
    try:
        with open(f"/proc/{process}/fd/{descriptor}", "r+b") as file:
            found = os.fstat(file.fileno())
            # in another process-id namespace this is another process's file
            if (found.st_ino, found.st_uid) != (inode, os.geteuid()):
                return None
            return mmap.mmap(file.fileno(), 0)
    except OSError:
        return None


def _gather_names(words: str, group: ProcessGroup) -> list[tuple[str, str]]:
    """Two lines of every rank."""
    mine = torch.zeros(NAME_BYTES, dtype=torch.uint8)
    text = words.encode()
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    found = []
    for row in every:
        first, _, second = bytes(row.tolist()).rstrip(b"\0").decode().partition("\n")
        found.append((first, second))
    return found
