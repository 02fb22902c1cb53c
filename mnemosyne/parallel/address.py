"""Where rank 0 listens for the others; they learn it from the store of torch.distributed."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Protocol

LOOPBACK = "127.0.0.1"


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value, waiting until it is there."""

    def add(self, key: str, amount: int) -> int:
        """Count up and return the sum."""


@dataclass(frozen=True, slots=True)
class Address:
    """A port that rank 0 listens on, and the word that tells ranks from strangers."""

    host: str
    port: int
    secret: str


@dataclass(frozen=True, slots=True)
class Interface:
    """Where to bind a socket, and what others call that place."""

    bind: str
    public: str


def listening_interface(environment: Mapping[str, str] = os.environ) -> Interface:
    """The interface of this host on which all other ranks reach it.

    Loopback if every rank is on this host, else the one that leads to MASTER_ADDR.

    Args:
        environment: as torchrun, or whoever started the ranks, has set it.
    """
    master = environment.get("MASTER_ADDR", "localhost")
    world_size = environment.get("WORLD_SIZE", "1")
    if environment.get("LOCAL_WORLD_SIZE") == world_size or master == "localhost":
        return Interface(LOOPBACK, LOOPBACK)
    if is_loopback(master):
        return Interface(LOOPBACK, LOOPBACK)
    own = _own_address(master)
    # Some hosts know their own name as a loopback address; others resolve it to the real one.
    return Interface("0.0.0.0", master) if is_loopback(own) else Interface(own, own)


def is_loopback(host: str) -> bool:
    """Whether a numeric address never leaves the host; names are not resolved."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def default_store() -> Store:
    """The store that torch.distributed was initialised with."""
    from torch.distributed.distributed_c10d import _get_default_store  # no public way to it

    return _get_default_store()


def announce(store: Store, service: str, host: str, port: int) -> Address:
    """Tell all ranks where rank 0 listens; ``find`` on each of them gives the same address.

    Args:
        store: shared by all ranks.
        service: what listens there; a rank may open it again and again.
        host: as the other ranks see it.
        port: the port, chosen by the system.
    """
    address = Address(host, port, secrets.token_hex(16))
    store.set(_key(store, service, 0), json.dumps(asdict(address)))
    return address


def find(store: Store, service: str, rank: int) -> Address:
    """Where rank 0 listens; waits, at most as long as the store does, until it says so."""
    return Address(**json.loads(store.get(_key(store, service, rank))))


def _key(store: Store, service: str, rank: int) -> str:
    """A key that is new each time a rank opens a service: the ranks open them in one order."""
    opened = store.add(f"mnemosyne/{service}/opened/{rank}", 1)
    return f"mnemosyne/{service}/{opened}"


def _own_address(peer: str) -> str:
    """The address of this host on the way to ``peer``; nothing is sent."""
    family, kind, *_, target = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
