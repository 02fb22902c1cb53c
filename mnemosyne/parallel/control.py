"""The channel between rank 0, which plans, and the ranks that follow: plans out, results back.

It is apart from the collectives, so neither waits for the other.
"""

from __future__ import annotations

import time

import zmq

from mnemosyne.parallel.address import Address, Store, announce, find, listening_interface
from mnemosyne.parallel.codec import (
    Interrupted,
    Message,
    Outputs,
    Stop,
    decode,
    decode_result,
    encode,
    encode_result,
)
from mnemosyne.request import RequestOutput
from mnemosyne.schedule.plan import Plan, StepResult

__all__ = ["DriverChannel", "FollowerChannel", "Interrupted", "Message", "Outputs", "Stop"]

SERVICE = "control"
CONNECT_S = 300.0  # other ranks may still be importing torch
LINGER_S = 2.0  # for the last message to leave when a channel is closed


class DriverChannel:
    """Rank 0's end.

    Args:
        store: shared by all ranks, as torch.distributed has it.
        world_size: all ranks, this one included.
        timeout_s: how long the others may take to connect.

    Raises:
        RuntimeError: naming the ranks that did not connect.
    """

    def __init__(self, store: Store, world_size: int, *, timeout_s: float = CONNECT_S) -> None:
        self._context = zmq.Context()
        self._socket = _open(self._context, zmq.ROUTER)
        # Without it a message to a rank that is gone would be dropped without a word.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        interface = listening_interface()
        self._socket.bind(f"{_endpoint(interface.bind)}:*")
        port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        address = announce(store, SERVICE, interface.public, port)
        self._followers = [_identity(rank) for rank in range(1, world_size)]
        try:
            self._await_followers(address, timeout_s)
        except BaseException:
            self.close()
            raise

    def send_plan(self, plan: Plan) -> None:
        """Hand a step to every other rank; returns at once, as all of these do.

        Raises:
            RuntimeError: naming a rank that is gone.
        """
        self._send(plan)

    def send_outputs(self, outputs: list[RequestOutput]) -> None:
        """End a call that every rank made: here is what it gives."""
        self._send(Outputs(outputs))

    def send_interrupted(self, error: BaseException) -> None:
        """End a call that every rank made with the error that ends it here."""
        self._send(Interrupted(type(error).__name__, str(error)))

    def send_stop(self) -> None:
        """Tell every other rank that no plan will follow."""
        self._send(Stop())

    def recv_result(self) -> StepResult:
        """The next result that any rank sent; waits for it."""
        while True:
            identity, *parts = self._socket.recv_multipart()
            if identity in self._followers:
                return decode_result(parts[0])

    def close(self) -> None:
        """Let the last message leave, then free the port."""
        self._context.destroy(linger=int(LINGER_S * 1000))

    def _send(self, message: Message) -> None:
        data = encode(message)
        for identity in self._followers:
            try:
                self._socket.send_multipart([identity, data], copy=False)
            except zmq.ZMQError as error:
                raise RuntimeError(f"rank {identity.decode()} is gone: {error}") from error

    def _await_followers(self, address: Address, timeout_s: float) -> None:
        """A message to a rank that is not connected yet would be lost, so they all say hello."""
        missing = set(self._followers)
        deadline_s = time.monotonic() + timeout_s
        while missing:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not self._socket.poll(int(left_s * 1000)):
                ranks = ", ".join(sorted(identity.decode() for identity in missing))
                raise RuntimeError(f"ranks {ranks} did not connect within {timeout_s:.0f} s")
            identity, *words = self._socket.recv_multipart()
            if words == [address.secret.encode()]:
                missing.discard(identity)


class FollowerChannel:
    """The end of every rank but 0.

    Args:
        store: shared by all ranks.
        rank: this one.
    """

    def __init__(self, store: Store, rank: int) -> None:
        address = find(store, SERVICE, rank)
        self._context = zmq.Context()
        self._socket = _open(self._context, zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, _identity(rank))
        self._socket.connect(f"{_endpoint(address.host)}:{address.port}")
        self._socket.send(address.secret.encode())

    def recv(self) -> Message:
        """The next message of rank 0; waits for it."""
        return decode(self._socket.recv())

    def has_message(self) -> bool:
        """Whether ``recv`` would not wait."""
        return bool(self._socket.poll(0))

    def send_result(self, result: StepResult) -> None:
        """Send what this rank's group made of a step to rank 0; returns at once."""
        self._socket.send(encode_result(result))

    def close(self) -> None:
        """Let the last message leave."""
        self._context.destroy(linger=int(LINGER_S * 1000))


def _open(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    # Queues without a limit: steps in flight are few, and nothing may be dropped or wait for room.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.IPV6, 1)
    return socket


def _identity(rank: int) -> bytes:
    return str(rank).encode()


def _endpoint(host: str) -> str:
    return f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
