"""Local ranks start with one call, share the cores, and none outlives its launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnemosyne.parallel.launch import (
    END_WITH_LAUNCHER,
    KILL_S,
    _ctrl_c_blocked,
    launch_local,
)
from tests.ranks import start_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
WORLD_SIZE = 3
GONE_S = 10.0

# What ranks of a test do; only the last one needs torch.
RANK = """
import json, os, signal, sys, time
from pathlib import Path

folder, act, *words = sys.argv[1:]
rank = int(os.environ["RANK"])
names = ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MASTER_ADDR")
said = {"pid": os.getpid(), "words": words, **{name: os.environ[name] for name in names}}
if act == "watch":
    from mnemosyne.parallel.address import default_store
    from mnemosyne.parallel.rendezvous import join_processes
    from mnemosyne.parallel.watchdog import Watchdog
    join_processes("gloo")
    watchdog = Watchdog(default_store(), rank=rank, world_size=3, label=f"tp{rank}")
if act == "interrupt" and rank > 0:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
partial = folder + f"/{rank}.partial"
Path(partial).write_text(json.dumps(said))
os.rename(partial, folder + f"/{rank}.json")
if act == "say":
    sys.exit(0)
if act == "start another":
    import subprocess
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(folder + f"/{rank}.other").write_text(str(other.pid))
    sys.exit(0)
if act == "stop" and rank == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
if act == "stop" and rank == 1:
    while not Path(folder, "2.json").exists():
        time.sleep(0.02)
    stopped = json.loads(Path(folder, "2.json").read_text())["pid"]
    while " T " not in Path("/proc", str(stopped), "stat").read_text():
        time.sleep(0.02)
    sys.exit(7)
if act == "exit" and rank == 1:
    sys.exit(7)
if act == "exit after rank 0":
    first = Path(folder, "0.json")
    while rank > 0 and not first.exists():
        time.sleep(0.02)
    other = Path("/proc", str(json.loads(first.read_text())["pid"]), "exe")
    while rank > 0 and other.exists():  # as long as it is no zombie
        time.sleep(0.02)
    if rank < 2:
        sys.exit(7 * rank)
if act == "kill" and rank == 0:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Path(folder, "ready").touch()
if act == "kill" and rank == 2:
    while not Path(folder, "ready").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while not (act == "interrupt" and Path(folder, "interrupted").exists()):
        time.sleep(0.02)
except KeyboardInterrupt:
    Path(folder, "interrupted").touch()
    sys.exit(130)
"""


def command(folder: Path, act: str, *words: str) -> list[str]:
    return [sys.executable, "-c", RANK, str(folder), act, *words]


def launch(folder: Path, act: str) -> int:
    os.environ["PYTHONPATH"] = str(ROOT)
    return launch_local(command(folder, act), WORLD_SIZE)


def said(folder: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def are_gone(folder: Path) -> bool:
    return not any(Path("/proc", str(rank["pid"]), "exe").exists() for rank in said(folder))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not happen within {seconds} s"
        time.sleep(0.02)


def test_ranks_get_their_place_their_words_and_their_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    words = ["prompt=${local_rank} $$ $HOME", "a b", "'"]

    status = launch_local(command(tmp_path, "say", *words), WORLD_SIZE)

    assert status == 0
    ranks = said(tmp_path)
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "2"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // WORLD_SIZE))
    for rank in ranks:
        assert rank["words"] == words
        assert (rank["WORLD_SIZE"], rank["OMP_NUM_THREADS"]) == ("3", threads)
    assert "OMP_NUM_THREADS" not in os.environ
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_number_of_threads_that_a_user_chose_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")

    launch_local(command(tmp_path, "say"), 1)

    assert said(tmp_path)[0]["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(("act", "status"), [("exit", 7), ("kill", 1), ("exit after rank 0", 7)])
def test_when_a_rank_fails_the_others_are_ended(
    act: str, status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert launch_local(command(tmp_path, act), WORLD_SIZE) == status

    assert are_gone(tmp_path)
    messages = [record.message for record in caplog.records if "ended by" in record.message]
    assert len(messages) == (act == "kill")
    assert all("rank 2" in message and "SIGKILL" in message for message in messages)


def test_ctrl_c_reaches_the_ranks_and_rank_0_decides(tmp_path: Path) -> None:
    with start_ranks(launch, 1, tmp_path, "interrupt") as ranks:
        wait_until(lambda: len(said(tmp_path)) == WORLD_SIZE, 60)
        os.kill(ranks.processes[0].pid or 0, signal.SIGINT)

        assert ranks.results(GONE_S) == [130]
    assert (tmp_path / "interrupted").exists()
    assert are_gone(tmp_path)


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with start_ranks(launch, 1, tmp_path, "watch") as ranks:
        wait_until(lambda: len(said(tmp_path)) == WORLD_SIZE, 120)
        os.kill(ranks.processes[0].pid or 0, signal.SIGKILL)

        wait_until(lambda: are_gone(tmp_path), GONE_S)


def test_the_launcher_needs_no_torch_so_it_hears_signals_at_once() -> None:
    program = "import sys, mnemosyne.parallel.launch; sys.exit('torch' in sys.modules)"

    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_store_and_gloo_listen_on_loopback_alone(tmp_path: Path) -> None:
    with start_ranks(launch, 1, tmp_path, "watch") as ranks:
        wait_until(lambda: len(said(tmp_path)) == WORLD_SIZE, 120)
        hosts = {host for rank in said(tmp_path) for host in listening_hosts(int(rank["pid"]))}
        os.kill(ranks.processes[0].pid or 0, signal.SIGKILL)
        wait_until(lambda: are_gone(tmp_path), GONE_S)

    assert hosts == {"0100007F"}  # 127.0.0.1, as the kernel writes it


def listening_hosts(pid: int) -> set[str]:
    """Addresses on which a process listens, of TCP."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    rows = []
    for name in ("tcp", "tcp6"):
        rows += [
            row.split() for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_a_rank_that_is_stopped_is_woken_up_to_end(tmp_path: Path) -> None:
    started_s = time.monotonic()

    assert launch_local(command(tmp_path, "stop"), WORLD_SIZE) == 7

    assert are_gone(tmp_path)
    assert time.monotonic() - started_s < KILL_S


def test_a_launcher_that_is_told_to_end_ends_its_ranks(tmp_path: Path) -> None:
    with start_ranks(launch, 1, tmp_path, "wait") as ranks:
        wait_until(lambda: len(said(tmp_path)) == WORLD_SIZE, 60)
        os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)

        assert ranks.results(GONE_S) == [128 + signal.SIGTERM]
    assert are_gone(tmp_path)


def test_what_a_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    assert launch_local(command(tmp_path, "start another"), WORLD_SIZE) == 0

    others = [int(path.read_text()) for path in tmp_path.glob("*.other")]
    assert len(others) == WORLD_SIZE
    wait_until(lambda: not any(Path("/proc", str(pid), "exe").exists() for pid in others), GONE_S)


def test_ctrl_c_while_a_rank_is_started_ends_it_without_a_word() -> None:
    rank = [sys.executable, "-I", "-S", "-c", END_WITH_LAUNCHER, str(os.getpid())]
    for delay_s in (0.0, 0.01, 0.03, 0.1):
        with _ctrl_c_blocked(is_blocked=True):
            process = subprocess.Popen([*rank, "/bin/sleep", "1000"], stderr=subprocess.PIPE)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=GONE_S)

        assert (process.returncode, said) == (-signal.SIGINT, b"")
