"""Two hosts serve as one mesh, and both end when the link between them is cut.

A host is a network namespace; a virtual link joins two of them. Making them takes Linux and root.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.exactness.serve_rank import serve
from tests.model_zoo.tiny import MAX_POSITIONS, tiny_checkpoint

ROOT = Path(__file__).parents[2]
PORT = 29500  # nobody else lives in a namespace that is new
LINK = "eth0"
START_S = 90.0
LIMIT_S = 10.0  # from the cut to the end of the last process
MAX_TOKENS = 26
ENDLESS = MAX_POSITIONS - 80  # seconds of steps
CACHE = {"max_tokens": 2048, "page_size": 16}
# The longer prompt and its tokens fill the pages of two groups.
GROUPS = {"mesh": {"kvp": 2}, "cache": {**CACHE, "max_tokens_per_group": 48}}
STAGES = {"mesh": {"pp": 2}, "cache": CACHE}


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace with one end of the link."""

    name: str
    address: str

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a command there, and write what it says to a file."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            # The name of this machine leads to loopback, which is not shared.
            "GLOO_SOCKET_IFNAME": LINK,
        }
        with log.open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def pids(self) -> list[int]:
        """Processes that live there."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def unplug(self) -> None:
        """Take down this end of the link; no connection is told."""
        _ip("-n", self.name, "link", "set", LINK, "down")

    def remove(self) -> None:
        """Kill all that runs there; the link goes with the first host that does."""
        try:
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        finally:
            _ip("netns", "del", self.name)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; they are gone after the test."""
    word = f"mnemosyne-{secrets.token_hex(4)}"
    pair = Host(f"{word}-0", "10.77.0.1"), Host(f"{word}-1", "10.77.0.2")
    with ExitStack() as stack:
        try:
            for host in pair:
                _ip("netns", "add", host.name)
                stack.callback(host.remove)
                _ip("netns", "exec", host.name, "true")
            _join(*pair)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            pytest.skip(f"hosts cannot be made of network namespaces here: {said}")
        yield pair


def _join(left: Host, right: Host) -> None:
    # fmt: off
    _ip("link", "add", LINK, "netns", left.name, "type", "veth",
        "peer", "name", LINK, "netns", right.name)
    # fmt: on
    for host in (left, right):
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", LINK)
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "link", "set", LINK, "up")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
    return done.stdout


@contextmanager
def _launch(
    hosts: tuple[Host, Host], model: Path, folder: Path, max_tokens: int, *options: dict[str, Any]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start one rank on each host with torchrun; what they say goes to files of the folder."""
    key = folder / "mesh.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(32))
    keyed = [each | {"mesh": {**each["mesh"], "key": str(key)}} for each in options]
    script = ["-m", "tests.exactness.serve_rank"]
    script += [str(model), str(folder), str(max_tokens), json.dumps(keyed)]
    launchers = []
    try:
        for index, host in enumerate(hosts):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--nproc-per-node", "1", "--node-rank", str(index)]
            command += ["--master-addr", hosts[0].address, "--master-port", str(PORT)]
            launchers.append(host.start([*command, *script], _log(folder, index)))
        yield launchers
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


def _log(folder: Path, index: int) -> Path:
    return folder / f"host{index}.log"


def _wait_until(condition: Callable[[], bool], seconds: float, folder: Path) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline_s:
            said = "\n".join(_log(folder, index).read_text() for index in range(2))
            raise AssertionError(f"it did not happen within {seconds} s; the hosts said:\n{said}")
        time.sleep(0.02)


def test_two_hosts_give_the_tokens_of_one_process(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_layers=2)
    alone = serve(model, MAX_TOKENS, {"cache": CACHE})

    with _launch(hosts, model, tmp_path, MAX_TOKENS, STAGES, GROUPS) as launchers:
        _wait_until(lambda: all(each.poll() is not None for each in launchers), START_S, tmp_path)

    said = [_log(tmp_path, index).read_text() for index in range(2)]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [alone, alone]


def test_when_the_link_is_cut_both_hosts_end_and_say_who_is_silent(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_layers=2)
    steps = tmp_path / "steps0.jsonl"

    with _launch(hosts, model, tmp_path, ENDLESS, STAGES) as launchers:
        _wait_until(lambda: steps.exists() and len(_lines(steps)) > 8, START_S, tmp_path)
        hosts[1].unplug()
        _wait_until(lambda: not any(host.pids() for host in hosts), LIMIT_S, tmp_path)
        statuses = [launcher.wait() for launcher in launchers]

    said = [_log(tmp_path, index).read_text() for index in range(2)]
    assert statuses == [1, 1], said
    silent = "was lost: its host does not answer"
    assert f"rank 1 (pp1/kvp0/tp0) {silent}; pp0/kvp0/tp0 was in step " in said[0]
    assert "request 0 failed with " in said[0]
    # It may have been between two steps.
    assert f"rank 0 (the driver) {silent}; pp1/kvp0/tp0 was " in said[1]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
