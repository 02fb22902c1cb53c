"""Signals at random moments of a mesh: is nothing left behind, and is the right rank named?

    python tools/signals.py --mesh tp kvp pp --signals KILL STOP INT TERM --moments 30 --seed 0

Each run is a ``mnemosyne generate`` on two ranks. A signal goes to one rank, to the launcher or to
all processes, while the run starts, prefills or decodes; moments are counted in steps, not seconds,
so that a busy machine changes nothing. A line per run, a table at the end; status 1 if any is bad.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MARK = "MNEMOSYNE_SIGNALS_RUN"  # in the environment of every process of a run
STOP_S = 15.0
SHORT_STOP_S = 4.0  # below the least bound of a step, 10 s
LIMIT_S = 240.0  # for a run to end, on a busy machine
GONE_S = 45.0  # for what is left to end after the launcher: a rank may have to be killed
CHUNK, LONG_TOKENS, MAX_TOKENS = 100, 2500, 24
PREFILL_STEPS = LONG_TOKENS // CHUNK
START_S = 8.0  # of processor time, about: imports, loading, meeting
NUMBERS = {
    "KILL": signal.SIGKILL,
    "STOP": signal.SIGSTOP,
    "SHORT": signal.SIGSTOP,
    "INT": signal.SIGINT,
    "TERM": signal.SIGTERM,
}
LASTING = ("torchinductor_", "torchelastic_")  # torch's cache; and what a killed torchrun leaves


@dataclass(frozen=True, slots=True)
class Moment:
    """Signal to a run, and its moment."""

    mesh: str  # the axis of degree two
    launcher: str  # own or torchrun
    signal: str
    target: str  # rank 0, rank 1, launcher or all
    phase: str  # start, prefill or decode
    at: float  # seconds of a start, else the number of steps after which it comes


@dataclass(slots=True)
class Outcome:
    """Outcome of a run."""

    phase: str  # in which the signal arrived, or done
    status: int | None
    seconds: float  # from the signal to the end of all
    faults: list[str]
    said: str


def moments(mesh: str, launcher: str, name: str, count: int, seed: int) -> list[Moment]:
    """Phases and targets in turn, moments at random."""
    rng = random.Random(f"{seed} {mesh} {launcher} {name}")
    found = []
    for index in range(count):
        phase = ("start", "prefill", "decode")[index % 3]
        target = ("rank 0", "rank 1", "launcher", "all")[index // 3 % 4]
        at = {
            "start": rng.uniform(0.0, START_S),
            "prefill": rng.randrange(1, PREFILL_STEPS),
            "decode": rng.randrange(PREFILL_STEPS + 2, PREFILL_STEPS + MAX_TOKENS - 6),
        }[phase]
        found.append(Moment(mesh, launcher, name, target, phase, at))
    return found


def command_of(moment: Moment, folder: Path) -> list[str]:
    ids = [[5, 6, 7], [5 + index % 200 for index in range(LONG_TOKENS)]]
    (folder / "steps.jsonl").unlink(missing_ok=True)
    words = [
        *("generate", "model=needle", "dtype=float32", f"token_ids={ids}".replace(" ", "")),
        *(f"max_tokens={MAX_TOKENS}", "ignore_eos=true", f"mesh.{moment.mesh}=2"),
        *("cache.max_tokens=8K", f"schedule.chunk={CHUNK}", "attention=reference"),
        f"metrics.path={folder / 'steps.jsonl'}",
    ]
    if moment.launcher == "own":
        return [sys.executable, "-m", "mnemosyne", *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*torchrun, "-m", "mnemosyne", *words]


def processes_of(mark: str) -> dict[int, dict[str, str]]:
    """Environments of the processes of a run, by id; zombies have none."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in words:
            pairs = (word.decode(errors="replace").partition("=") for word in words)
            found[int(folder.name)] = {name: value for name, _, value in pairs}
    return found


def targets_of(moment: Moment, mark: str, launcher: int) -> list[int]:
    """Process ids; none if the rank has not been started yet."""
    processes = processes_of(mark)
    if moment.target == "launcher":
        return [launcher]
    if moment.target == "all":
        return sorted(processes)
    rank = moment.target.removeprefix("rank ")
    ranks = [p for p, environment in processes.items() if environment.get("RANK") == rank]
    return [min(ranks)] if ranks else []  # what a rank has started is younger


def num_steps(folder: Path) -> int:
    try:
        return (folder / "steps.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def phase_of(folder: Path, process: subprocess.Popen[bytes]) -> str:
    if process.poll() is not None:
        return "done"
    steps = num_steps(folder)
    return "start" if steps == 0 else "prefill" if steps <= PREFILL_STEPS else "decode"


def run(moment: Moment, folder: Path) -> Outcome:
    """Start, signal, wait for the end, look round."""
    mark = f"{os.getpid()}-{random.randrange(10**9)}"
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, MARK: mark, "TMPDIR": str(temporary), "OMP_WAIT_POLICY": "passive"}
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            command_of(moment, folder),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )
    try:
        return _signal_and_look(moment, folder, process, mark, temporary)
    finally:
        for pid in processes_of(mark):
            _send([pid], signal.SIGKILL)
        process.wait()


def _signal_and_look(
    moment: Moment, folder: Path, process: subprocess.Popen[bytes], mark: str, temporary: Path
) -> Outcome:
    started_s = time.monotonic()
    if moment.phase == "start":
        _wait(lambda: time.monotonic() - started_s > moment.at or process.poll() is not None)
        _wait(lambda: bool(targets_of(moment, mark, process.pid)) or process.poll() is not None)
    else:
        _wait(lambda: num_steps(folder) >= moment.at or process.poll() is not None)
    phase = phase_of(folder, process)
    targets = targets_of(moment, mark, process.pid) if phase != "done" else []
    _send(targets, NUMBERS[moment.signal])
    sent_s = time.monotonic()
    if NUMBERS[moment.signal] == signal.SIGSTOP:
        time.sleep(STOP_S if moment.signal == "STOP" else SHORT_STOP_S)
        _send(targets, signal.SIGCONT)
    faults = []
    if not _wait(lambda: process.poll() is not None):
        faults.append("does not end")
    if not _wait(lambda: not processes_of(mark), GONE_S):
        faults.append(f"processes left: {sorted(processes_of(mark))}")
    seconds = time.monotonic() - sent_s
    left = [str(path.relative_to(temporary)) for path in temporary.rglob("*")]
    left = [name for name in left if not name.startswith(LASTING)]
    if left:
        faults.append(f"files left: {left[:5]}")
    shared = [name for name in os.listdir("/dev/shm") if "mnemosyne" in name]
    if shared:
        faults.append(f"shared memory left: {shared}")
    err = (folder / "err").read_text(errors="replace")
    out = (folder / "out").read_text(errors="replace")
    status = process.poll()
    faults += judge(moment, phase, status, out, err)
    return Outcome(phase, status, seconds, faults, err)


def judge(moment: Moment, phase: str, status: int | None, out: str, err: str) -> list[str]:
    """Find what is wrong with a status, and with what was said; see docs/launch.md."""
    rank = moment.target.removeprefix("rank ") if moment.target.startswith("rank") else None
    allowed = _statuses(moment, phase)
    faults = [] if status in allowed else [f"status {status}, not {sorted(allowed)}"]
    if "Traceback" in err and moment.launcher == "own":
        faults.append("a traceback")
    if rank is not None and status not in (0, 130, None) and phase != "done":
        names = (f"rank {rank} ", f"rank {rank},", f"rank      : {rank} ")
        if not any(name in err for name in names):
            faults.append(f"rank {rank} is not named")
        other = 1 - int(rank)
        culprit = err.partition(f"rank {other} (")[2].partition("\n")[0]
        if any(word in culprit for word in ("was lost", "is stuck", "did not answer", "failed")):
            faults.append(f"rank {other} is named")
    finished = f"[2] {LONG_TOKENS} tokens" in out or "2 of 2 prompts finished" in err
    if status == 0 and phase != "done" and not finished:
        faults.append("status 0, but not all was printed")
    is_due = phase == "decode" and moment.signal in ("INT", "TERM") and status in (130, 143)
    if is_due and moment.launcher == "own" and " of 2 prompts finished" not in err:
        faults.append("what is finished is not printed")
    return faults


def _statuses(moment: Moment, phase: str) -> set[int]:
    number = NUMBERS[moment.signal]
    kills_launcher = moment.target in ("launcher", "all")
    if phase == "done":
        return {0}
    if moment.signal == "SHORT":
        return {0}
    if moment.signal == "STOP":
        return {0} if phase == "start" or kills_launcher else {0, 1}
    if moment.signal == "KILL":
        return {-number} if kills_launcher else {1}
    # 0: a signal that comes when the work is done does nothing
    if moment.launcher == "torchrun":
        return {0, 1, 128 + number, -number} if kills_launcher else {0, 1}
    if moment.signal == "INT" and moment.target == "rank 1":
        return {130} if phase == "start" else {0}
    early = {-number} if phase == "start" and kills_launcher else set()
    return {128 + number, 0} | early


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _wait(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
    until_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mesh", nargs="+", default=["tp", "kvp", "pp"])
    parser.add_argument("--signals", nargs="+", default=["KILL", "STOP", "INT", "TERM", "SHORT"])
    parser.add_argument("--launcher", nargs="+", default=["own"])
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of moments")
    arguments = parser.parse_args()
    # a shell ignores Ctrl-C for what it runs in the background, and children would as well
    signal.signal(signal.SIGINT, signal.default_int_handler)
    table: Counter[tuple[str, str, str, str]] = Counter()
    lists = [
        list(enumerate(moments(mesh, launcher, name, arguments.moments, arguments.seed)))
        for launcher in arguments.launcher
        for name in arguments.signals
        for mesh in arguments.mesh
    ]
    # every mesh and signal gets its first moments before any gets its last
    for number in range(arguments.moments):
        for listed in lists:
            if arguments.only and number not in arguments.only:
                continue
            _, moment = listed[number]
            with tempfile.TemporaryDirectory(prefix="signals-") as folder:
                outcome = run(moment, Path(folder))
            verdict = "; ".join(outcome.faults) or "ok"
            table[
                moment.mesh, moment.launcher, moment.signal, "ok" if verdict == "ok" else "BAD"
            ] += 1
            print(
                f"{number:3} {moment.mesh:4}{moment.launcher:9}{moment.signal:6}{moment.target:9}"
                f"{outcome.phase:8}{outcome.status!s:>5} {outcome.seconds:6.1f} s  {verdict}",
                flush=True,
            )
            if outcome.faults:
                print("    | " + outcome.said.strip().replace("\n", "\n    | "), flush=True)
    for (mesh, launcher, name, verdict), count in sorted(table.items()):
        print(f"{mesh:4} {launcher:9} {name:6} {verdict:4} {count}")
    return int(any(key[3] == "BAD" for key in table))


if __name__ == "__main__":
    sys.exit(main())
