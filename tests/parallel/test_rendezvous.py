"""Rank 0 finds the socket that its launcher has bound, among whatever else is open."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

import pytest

from mnemosyne.parallel import rendezvous
from mnemosyne.parallel.address import INTERFACE
from mnemosyne.parallel.rendezvous import _inherited_listener, join_processes


def as_rank_0(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)


def test_the_socket_is_found_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        others = [*socket.socketpair(), socket.socket(socket.AF_UNIX), socket.socket()]
        others.append(socket.create_server(("127.0.0.1", 0)))
        others.append(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for other in others:
            stack.enter_context(other)
        as_rank_0(monkeypatch, server.getsockname()[1])

        found = _inherited_listener()

        assert found is not None
        assert found.detach() == server.fileno()
        assert all(other.fileno() >= 0 for other in others)


def test_under_torchrun_there_is_none_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        for other in (*socket.socketpair(), socket.socket(socket.AF_UNIX)):
            stack.enter_context(other)
        as_rank_0(monkeypatch, 1)

        assert _inherited_listener() is None


@pytest.mark.parametrize(
    ("master", "interfaces", "told", "used"),
    [
        ("localhost", ["lo", "eth0"], None, "lo"),
        ("localhost", ["eth0"], None, None),
        ("node-0", ["lo", "eth0"], None, None),
        ("localhost", ["lo", "eth0"], "eth0", "eth0"),
    ],
    ids=["one host", "no loopback", "several hosts", "told"],
)
def test_ranks_of_one_host_listen_where_no_other_host_comes(
    master: str,
    interfaces: list[str],
    told: str | None,
    used: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined: list[str | None] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1" if master == "node-0" else "2")
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(INTERFACE, told or "")
    if told is None:
        monkeypatch.delenv(INTERFACE)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(interfaces)))
    monkeypatch.setattr(
        rendezvous.dist,
        "init_process_group",
        lambda *arguments, **named: joined.append(os.environ.get(INTERFACE)),
    )

    join_processes("gloo")

    assert joined == [used]
