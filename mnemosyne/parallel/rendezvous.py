"""Rendezvous of the processes of a run: torch's store, on loopback under our launcher."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore

from mnemosyne.parallel.address import INTERFACE, is_on_one_host


def join_processes(backend: str) -> None:
    """Initialise torch.distributed from the environment, as torchrun or our launcher has set it.

    Args:
        backend: gloo, or gloo and nccl by device.
    """
    if is_on_one_host() and "lo" in (name for _, name in socket.if_nameindex()):
        # gloo authenticates nobody, so it listens where no other host comes
        os.environ.setdefault(INTERFACE, "lo")
    listener = _inherited_listener()
    if listener is None:
        _join_as_told(backend)
        return
    # torch binds the store of rank 0 to all interfaces unless it is given a socket.
    world_size, port = int(os.environ["WORLD_SIZE"]), listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        port,
        world_size,
        is_master=True,
        timeout=default_pg_timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    # with the prefix that the other ranks get from torch
    prefixed = PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=prefixed, rank=0, world_size=world_size)


def _join_as_told(backend: str) -> None:
    """Initialise from the environment; apart from the ranks that torchrun started here before.

    Its store outlives them, and holds the addresses where they listened.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_agents or restarts == "0" or not is_on_one_host():
        dist.init_process_group(backend)
        return
    world_size, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], port, world_size, is_master=False, timeout=default_pg_timeout
    )
    prefixed = PrefixStore(f"restart_{restarts}/default_pg", store)
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size)


def _inherited_listener() -> socket.socket | None:
    """On rank 0 of our launcher: the socket at MASTER_PORT, which was bound before it started."""
    place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if os.environ.get("RANK") != "0" or not os.path.isdir("/proc/self/fd"):
        return None
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the folder itself is closed by now
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            found = socket.socket(fileno=int(name))
            with suppress(OSError):
                is_listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                # the names of other families have another form
                if found.family == socket.AF_INET and is_listening:
                    host, port = found.getsockname()
                    if (host, str(port)) == place:
                        return found
            found.detach()  # it belongs to others
    return None
