"""Where rank 0 listens for the others; they learn it from the store of torch.distributed.

The store is open to strangers, so nothing is secret in it, and what it says is proved elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Protocol

LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"  # torch's own variable: the interface of the mesh
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
MAX_HOST = 255  # characters


class Store(Protocol):
    """The methods of ``torch.distributed.Store`` that are used here."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value, waiting until it is there."""

    def add(self, key: str, amount: int) -> int:
        """Count up and return the sum."""


@dataclass(frozen=True, slots=True)
class Address:
    """A port that rank 0 listens on, and where ranks of its host get the key of the mesh."""

    host: str
    port: int
    desk: str = ""  # an abstract Unix socket; "": the key is in a file

    def __post_init__(self) -> None:
        is_host = isinstance(self.host, str) and 0 < len(self.host) <= MAX_HOST
        is_port = type(self.port) is int and 0 < self.port < 2**16
        if not (is_host and is_port and isinstance(self.desk, str) and len(self.desk) < 100):
            raise ValueError("an address must have a host, a port and the name of a desk")


def is_on_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether all ranks share this host, by what their launcher set.

    Args:
        environment: as torchrun, or whoever started the ranks, has set it.
    """
    world_size = environment.get("WORLD_SIZE", "1")
    master = environment.get("MASTER_ADDR", "localhost")
    is_local = environment.get("LOCAL_WORLD_SIZE") == world_size
    return is_local or master == "localhost" or is_loopback(master)


def listening_host(environment: Mapping[str, str] = os.environ) -> str:
    """The address of this host on which all other ranks, and as few others as can be, reach it.

    Loopback if every rank is on this host, else that of the interface that
    ``GLOO_SOCKET_IFNAME`` names, else of the one that leads to MASTER_ADDR.

    Args:
        environment: as torchrun, or whoever started the ranks, has set it.

    Raises:
        ValueError: if other hosts cannot reach this one there.
    """
    if is_on_one_host(environment):
        return LOOPBACK
    name = environment.get(INTERFACE, "").partition(",")[0]
    own = _address_of(name) if name else _own_address(environment["MASTER_ADDR"])
    if is_loopback(own):
        raise ValueError(
            f"the address of rank 0 must be one that other hosts reach, got {own}, to which this "
            f"host resolves its own name; set {INTERFACE} to its interface, such as eth0"
        )
    return own


def is_loopback(host: str) -> bool:
    """Return whether a numeric address never leaves the host; names are not resolved."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def default_store() -> Store:
    """The store that torch.distributed was initialised with."""
    from torch.distributed.distributed_c10d import _get_default_store  # no public way to it

    return _get_default_store()


def announce(store: Store, service: str, address: Address) -> None:
    """Tell all ranks where rank 0 listens; ``find`` on each of them gives the same address.

    Args:
        store: shared by all ranks.
        service: what listens there; a rank may open it again and again.
        address: as the other ranks see it.
    """
    store.set(_key(store, service, 0), json.dumps(asdict(address)))


def find(store: Store, service: str, rank: int) -> Address:
    """Where rank 0 listens; waits, at most as long as the store does, until it says so.

    Raises:
        RuntimeError: if the store holds something other than an address.
    """
    try:
        return Address(**json.loads(store.get(_key(store, service, rank))))
    except (ValueError, TypeError, RecursionError) as error:
        raise RuntimeError(f"the address of rank 0 in the store is damaged: {error}") from error


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


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface.

    Raises:
        ValueError: if there is no such interface, or it has none.
    """
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
        except OSError as error:
            raise ValueError(
                f"{INTERFACE} must be an interface of this host with an IPv4 address, got "
                f"{interface!r} ({error.strerror}); see ip address"
            ) from error
    return socket.inet_ntoa(answer[20:24])
