"""Memory that this process may still take: what the system has, within its control groups."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
PAGE_BYTES = resource.getpagesize()
# Of each version of control groups: entries of a limit, of usage, and what reclaim gives back.
V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
V2 = (("memory.max", "memory.high"), "memory.current", "")


def free_memory(proc: Path = PROC) -> int | None:
    """Bytes that this process can still allocate without being swapped out or killed.

    The least of what the system has available, of what each memory cgroup from this process's own
    to the root has left (file pages, which it can reclaim, count as left), and of what ``ulimit
    -v`` leaves.

    Args:
        proc: where the proc file system is mounted.

    Returns:
        None on a system that does not report its free memory.
    """
    try:
        text = (proc / "meminfo").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min((available, *_room_in_cgroups(proc), *_room_in_address_space(proc))))


def _room_in_cgroups(proc: Path) -> Iterator[int]:
    """Bytes left by each limit between this process's own cgroups and their roots."""
    for folder, root, version in _memory_cgroups(proc):
        limits, usage, prefix = version
        while True:
            limit = min((_number(folder / name) for name in limits), default=None, key=_or_endless)
            used = _number(folder / usage)
            if limit is not None and used is not None:
                yield limit - used + _reclaimable(folder / "memory.stat", prefix)
            if folder == root:
                break
            folder = folder.parent


def _memory_cgroups(proc: Path) -> Iterator[tuple[Path, Path, tuple[tuple[str, ...], str, str]]]:
    """Folder of this process's cgroup, root of its hierarchy, and the names of its entries."""
    own = {}
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    v1 = next((path for names, path in own.items() if "memory" in names.split(",")), None)
    for line in _lines(proc / "self" / "mountinfo"):
        before, _, after = line.partition(" - ")
        _, _, _, mounted, mount_point, *_ = before.split()
        kind, _, options = (*after.split(maxsplit=2), "", "")[:3]
        if kind == "cgroup2" and "" in own:
            yield *_folders(own[""], mounted, mount_point), V2
        elif kind == "cgroup" and v1 is not None and "memory" in options.split(","):
            yield *_folders(v1, mounted, mount_point), V1


def _folders(own: str, mounted: str, mount_point: str) -> tuple[Path, Path]:
    """The cgroup's folder and that of the mount; the same where the cgroup lies outside of it."""
    root = Path(mount_point)
    path, top = PurePosixPath(own), PurePosixPath(mounted)
    inside = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
    folder = root / inside
    return (root if ".." in inside.parts or not folder.is_dir() else folder), root


def _room_in_address_space(proc: Path) -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = [line.split()[0] for line in _lines(proc / "self" / "statm")]
    if limit != resource.RLIM_INFINITY and pages:
        yield limit - int(pages[0]) * PAGE_BYTES


def _reclaimable(path: Path, prefix: str) -> int:
    """Bytes of files in memory, which give way to other needs of their cgroup."""
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    fields = (line.split() for line in _lines(path))
    return sum(int(field[1]) for field in fields if len(field) == 2 and field[0] in names)


def _number(path: Path) -> int | None:
    """The number in an entry; None for ``max`` and where there is no such entry."""
    words = [line.strip() for line in _lines(path)]
    return int(words[0]) if words and words[0].isdigit() else None


def _or_endless(limit: int | None) -> float:
    return float("inf") if limit is None else limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
