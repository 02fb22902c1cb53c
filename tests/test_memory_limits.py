"""Free memory is what control groups leave of it, in both of their versions."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnemosyne.cache.pages import free_memory as free_on_device
from mnemosyne.memory_limits import free_memory

MIB = 1 << 20
AVAILABLE = 4096 * MIB
ENDLESS = 9223372036854771712  # what the first version says for no limit


class System:
    """A proc file system and a mounted hierarchy of control groups."""

    def __init__(self, folder: Path, version: int) -> None:
        self.proc, self.mount = folder / "proc", folder / "mount"
        self.is_v1 = version == 1
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()
        kb = AVAILABLE // 1024
        (self.proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {kb} kB\n")
        self.enter("/")

    def enter(self, own: str, mounted: str = "/") -> None:
        """Be in a control group."""
        line = f"4:cpu,memory:{own}\n0::/\n" if self.is_v1 else f"0::{own}\n"
        (self.proc / "self" / "cgroup").write_text(f"9:name=systemd:/\n{line}")
        kind = "cgroup cgroup rw,cpu,memory" if self.is_v1 else "cgroup2 cgroup2 rw"
        (self.proc / "self" / "mountinfo").write_text(
            "23 0 8:1 / / rw - ext4 /dev/root rw\n"
            f"35 31 0:32 {mounted} {self.mount} rw shared:5 - {kind}\n"
        )

    def limit(self, path: str, limit: object, used: int, files: int = 0) -> None:
        """Set what a control group may take and takes, of which so much are pages of files."""
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("limit_in_bytes", "usage_in_bytes") if self.is_v1 else ("max", "current")
        prefix = "total_" if self.is_v1 else ""
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(
            f"anon 7\n{prefix}inactive_file {files}\n{prefix}active_file {2 * files}\n"
        )

    def free(self) -> int | None:
        return free_memory(self.proc)


@pytest.fixture(params=[1, 2])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> System:
    return System(tmp_path, request.param)


def test_without_limits_all_that_is_available_is_free(system: System) -> None:
    system.limit("", ENDLESS if system.is_v1 else "max", 100 * MIB)

    assert system.free() == AVAILABLE


def test_a_limit_leaves_what_is_not_used_and_what_can_be_reclaimed(system: System) -> None:
    system.enter("/job")
    system.limit("job", 1024 * MIB, used=500 * MIB, files=100 * MIB)

    assert system.free() == (1024 - 500 + 300) * MIB


@pytest.mark.parametrize("least", ["", "a", "a/b", "a/b/c"])
def test_the_least_room_between_here_and_the_root_counts(system: System, least: str) -> None:
    system.enter("/a/b/c")
    for path in ("", "a", "a/b", "a/b/c"):
        limit = 300 if path == least else 2000
        system.limit(path, limit * MIB, used=100 * MIB)

    assert system.free() == 200 * MIB


def test_a_limit_of_another_group_does_not_count(system: System) -> None:
    system.enter("/a")
    system.limit("a", 2000 * MIB, used=0)
    system.limit("b", 100 * MIB, used=0)
    system.limit("a/b", 100 * MIB, used=0)

    assert system.free() == 2000 * MIB


@pytest.mark.parametrize(
    ("own", "mounted"), [("/docker/x", "/docker/x"), ("/docker/x", "/"), ("/../y", "/")]
)
def test_a_container_sees_its_own_group_at_the_root_of_the_mount(
    system: System, own: str, mounted: str
) -> None:
    system.enter(own, mounted)
    system.limit("", 500 * MIB, used=100 * MIB)

    assert system.free() == 400 * MIB


def test_a_group_that_is_over_its_limit_has_nothing_left(system: System) -> None:
    system.limit("", 100 * MIB, used=120 * MIB)

    assert system.free() == 0


def test_a_limit_that_only_slows_down_counts_as_well(tmp_path: Path) -> None:
    system = System(tmp_path, 2)
    system.limit("", "max", used=100 * MIB)
    (system.mount / "memory.high").write_text(f"{600 * MIB}\n")

    assert system.free() == 500 * MIB


def test_a_system_that_does_not_tell_is_asked_for_the_size_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_memory(tmp_path) is None
    monkeypatch.setattr("mnemosyne.memory_limits.free_memory", lambda: None)

    with pytest.raises(ValueError, match=r"cache.max_tokens must be set on this system"):
        free_on_device(torch.device("cpu"))


def test_the_address_space_that_is_left_counts() -> None:
    code = "from mnemosyne.memory_limits import free_memory; print(free_memory())"
    limit = 3 << 30

    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=True,
    )

    assert 0 < int(done.stdout) < limit


def test_a_real_limit_is_seen(tmp_path: Path) -> None:
    v1 = Path("/sys/fs/cgroup/memory")
    place, entry = (v1, "limit_in_bytes") if v1.is_dir() else (v1.parent, "max")
    group = place / f"mnemosyne-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / f"memory.{entry}").write_text(str(256 * MIB))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    code = (
        f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from mnemosyne.memory_limits import free_memory; print(free_memory())"
    )
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        group.rmdir()

    assert 0 < int(done.stdout) <= 256 * MIB
