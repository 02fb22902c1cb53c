"""The key of a mesh comes from a file of one user, or by a socket that knows its users."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from mnemosyne.parallel import keys
from mnemosyne.parallel.keys import MeshKey, mesh_key, offered_key, read_key, take_key

SEVERAL_HOSTS = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "192.0.2.1"}


def key_file(folder: Path, content: bytes = b"s" * 32, mode: int = 0o600) -> str:
    path = folder / "mesh.key"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_two_copies_of_a_file_give_one_key_and_another_gives_another(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first, copy, other = (
        read_key(key_file(folder, content))
        for folder, content in zip(folders, (b"a" * 32, b"a" * 32, b"b" * 32), strict=True)
    )

    assert first == copy
    assert first != other
    assert first.derive("one purpose") == copy.derive("one purpose") != first.derive("another")
    assert "secret" not in repr(first)


def make_fifo(folder: Path) -> str:
    os.mkfifo(folder / "fifo", 0o600)
    return str(folder / "fifo")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: str(folder / "none"), r"must be a readable file, got .*No such file"),
        (str, "must be a regular file"),
        (make_fifo, "must be a regular file"),
        (lambda folder: "\0", "must be a readable file"),
        (lambda folder: key_file(folder, mode=0o640), "nobody else can read, got .* mode 640"),
        (lambda folder: key_file(folder, mode=0o602), "nobody else can read, got .* mode 602"),
        (lambda folder: key_file(folder, b"short"), "32 to 4096 bytes, got .* of 5;"),
        (lambda folder: key_file(folder, b"x" * 10_000), "got .* of more than 4096"),
    ],
)
def test_a_file_that_is_no_secret_is_refused(
    make: Callable[[Path], str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"mesh\.key must be .*{reason.removeprefix('must be ')}"):
        read_key(make(tmp_path))


def test_several_hosts_need_a_file_and_one_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert mesh_key(None) is None
    for name, value in SEVERAL_HOSTS.items():
        monkeypatch.setenv(name, value)

    assert mesh_key(key_file(tmp_path)) is not None
    with pytest.raises(ValueError, match=r"mesh\.key must name a file .* got none; make one with"):
        mesh_key(None)
    with (
        pytest.raises(ValueError, match=r"mesh\.key must name a file"),
        offered_key(None, "192.0.2.7"),
    ):
        pass


def test_ranks_of_one_user_get_the_key_however_many_strangers_wait() -> None:
    with offered_key(None, "127.0.0.1") as (key, name), ExitStack() as stack:
        for _ in range(20):  # they ask for it, and say nothing
            asker = stack.enter_context(socket.socket(socket.AF_UNIX))
            asker.connect(f"\0{name}")

        assert take_key(None, name, timeout_s=10) == key
        assert key.secret.hex() not in name


def test_the_key_is_for_processes_of_this_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with offered_key(None, "127.0.0.1") as (_, name), socket.socket(socket.AF_UNIX) as asker:
        monkeypatch.setattr(keys, "user_of", lambda peer: os.geteuid() + 1)
        asker.connect(f"\0{name}")

        assert asker.recv(32) == b""
        with pytest.raises(RuntimeError, match="it is of another user"):
            take_key(None, name, timeout_s=10)


def test_after_the_start_nobody_gives_the_key() -> None:
    with offered_key(None, "127.0.0.1") as (_, name):
        pass

    with pytest.raises(RuntimeError, match="rank 0 cannot be asked for the mesh's key"):
        take_key(None, name, timeout_s=10)


def test_a_file_on_some_ranks_alone_is_refused() -> None:
    key = MeshKey(b"k" * 32)

    with offered_key(key, "127.0.0.1") as (same, name):
        assert (same, name) == (key, "")
    with pytest.raises(ValueError, match="got it on rank 0 alone"):
        take_key(None, "", timeout_s=1)
    with pytest.raises(ValueError, match="got it on this rank alone"):
        take_key(key, "somewhere", timeout_s=1)
