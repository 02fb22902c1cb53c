"""The channel between rank 0, which plans, and the ranks that follow: plans out, results back.

It is apart from the collectives, so neither waits for the other. Both ends prove with CURVE that
they have the key of the mesh, before a word of the other is read; what they say is encrypted.
"""

from __future__ import annotations

import time

import zmq
from zmq.utils import z85

from mnemosyne.parallel.address import Address, Store, announce, find, listening_host
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
from mnemosyne.parallel.keys import MeshKey, offered_key, take_key
from mnemosyne.request import RequestOutput
from mnemosyne.schedule.plan import Plan, StepResult

__all__ = ["DriverChannel", "FollowerChannel", "Interrupted", "Message", "Outputs", "Stop"]

SERVICE = "control"
CONNECT_S = 300.0  # other ranks may still be importing torch
LINGER_S = 2.0  # for the last message to leave when a channel is closed
HANDSHAKE_MS = 5000  # a stranger that says nothing keeps a connection no longer
MAX_QUEUED = 1024  # messages for or from a rank; a sender of one more waits for room
MAX_RESULT_BYTES = 1 << 28  # rank 0 reads no more at once, from any sender
AUTHENTICATION = "inproc://zeromq.zap.01"  # the endpoint that ZeroMQ asks about peers, RFC 27


class DriverChannel:
    """Rank 0's end. Its port takes no new peer once all ranks are connected.

    Args:
        store: shared by all ranks, as torch.distributed has it.
        world_size: all ranks, this one included.
        key: of the mesh, from a file; None: a new one, for ranks of one host.
        timeout_s: how long the others may take to connect.

    Raises:
        ValueError: if ranks on several hosts have no key, or ZeroMQ cannot encrypt.
        RuntimeError: naming the ranks that did not connect.
    """

    def __init__(
        self,
        store: Store,
        world_size: int,
        *,
        key: MeshKey | None = None,
        timeout_s: float = CONNECT_S,
    ) -> None:
        host = listening_host()
        self._followers = [_identity(rank) for rank in range(1, world_size)]
        self._context = zmq.Context()
        try:
            with offered_key(key, host) as (shared, desk):
                self._socket, port = _listen(self._context, host, shared)
                announce(store, SERVICE, Address(host, port, desk))
                allowed = {_curve_keys(shared, rank)[0] for rank in range(1, world_size)}
                self._await_followers(allowed, timeout_s)
        except BaseException:
            self.close()
            raise

    def send_plan(self, plan: Plan) -> None:
        """Hand a step to every other rank.

        This returns at once, as all of these do, unless ``MAX_QUEUED`` messages wait for a rank:
        then it waits for that rank, as a collective would, and the watchdog ends a wait that is
        too long.

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

    def _await_followers(self, allowed: set[bytes], timeout_s: float) -> None:
        """A message to a rank that is not connected yet would be lost, so they all say hello.

        ZeroMQ binds an identity to a connection only after this has let its key in, so a stranger
        cannot take a rank's place. Once nobody answers for keys, no key is let in.
        """
        missing = set(self._followers)
        deadline_s = time.monotonic() + timeout_s
        with self._context.socket(zmq.REP) as asked:
            asked.bind(AUTHENTICATION)
            poller = zmq.Poller()
            poller.register(asked, zmq.POLLIN)
            poller.register(self._socket, zmq.POLLIN)
            while missing:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    ranks = ", ".join(sorted(identity.decode() for identity in missing))
                    raise RuntimeError(f"ranks {ranks} did not connect within {timeout_s:.0f} s")
                ready = dict(poller.poll(int(left_s * 1000) + 1))
                if asked in ready:
                    asked.send_multipart(_verdict(asked.recv_multipart(), allowed))
                if self._socket in ready:
                    missing.discard(self._socket.recv_multipart()[0])


class FollowerChannel:
    """The end of every rank but 0.

    Args:
        store: shared by all ranks.
        rank: this one.
        key: of the mesh, from a file; None: that of rank 0, which is on this host.
        timeout_s: how long rank 0 may take to give the key.

    Raises:
        ValueError: if rank 0 has a key from a file and this one has none.
        RuntimeError: if rank 0 is not a process of this user.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        *,
        key: MeshKey | None = None,
        timeout_s: float = CONNECT_S,
    ) -> None:
        address = find(store, SERVICE, rank)
        shared = take_key(key, address.desk, timeout_s)
        self._context = zmq.Context()
        self._socket = _open(self._context, zmq.DEALER, shared, rank)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, _curve_keys(shared, 0)[0])
        self._socket.setsockopt(zmq.IDENTITY, _identity(rank))
        self._socket.connect(f"{_endpoint(address.host)}:{address.port}")
        self._socket.send(b"hello")

    def recv(self) -> Message:
        """The next message of rank 0; waits for it."""
        return decode(self._socket.recv())

    def has_message(self) -> bool:
        """Return whether ``recv`` would not wait."""
        return bool(self._socket.poll(0))

    def send_result(self, result: StepResult) -> None:
        """Send what this rank's group made of a step to rank 0.

        Returns at once unless ``MAX_QUEUED`` results wait for rank 0.
        """
        data = encode_result(result)
        assert len(data) <= MAX_RESULT_BYTES, f"a result of {len(data)} bytes"
        self._socket.send(data)

    def close(self) -> None:
        """Let the last message leave."""
        self._context.destroy(linger=int(LINGER_S * 1000))


def _listen(
    context: zmq.Context[zmq.Socket[bytes]], host: str, key: MeshKey
) -> tuple[zmq.Socket[bytes], int]:
    """Rank 0's socket and its port, which the system chooses."""
    socket = _open(context, zmq.ROUTER, key, rank=0)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.ZAP_DOMAIN, b"mnemosyne")
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no keys, no peers
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_RESULT_BYTES)
    # Without it a message to a rank that is gone would be dropped without a word.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind(f"{_endpoint(host)}:*")
    return socket, int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def _open(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, key: MeshKey, rank: int
) -> zmq.Socket[bytes]:
    if not zmq.has("curve"):
        raise ValueError(
            f"pyzmq must be built with CURVE, got {zmq.__version__} over ZeroMQ "
            f"{zmq.zmq_version()} without it; install the wheel of pyzmq"
        )
    socket = context.socket(kind)
    public, secret = _curve_keys(key, rank)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.SNDHWM, MAX_QUEUED)
    socket.setsockopt(zmq.RCVHWM, MAX_QUEUED)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.IPV6, 1)
    return socket


def _curve_keys(key: MeshKey, rank: int) -> tuple[bytes, bytes]:
    """Public and secret CURVE key of a rank, as every rank can work them out."""
    secret = z85.encode(key.derive(f"curve {rank}"))
    return zmq.curve_public(secret), secret


def _verdict(request: list[bytes], allowed: set[bytes]) -> list[bytes]:
    """Return whether a peer is let in, by the public key that it proved to be its own; RFC 27."""
    version, number, _, _, _, mechanism, *credentials = request
    is_ours = mechanism == b"CURVE" and z85.encode(credentials[0]) in allowed
    status = (b"200", b"OK") if is_ours else (b"400", b"not a rank of this mesh")
    return [version, number, *status, b"", b""]


def _identity(rank: int) -> bytes:
    return str(rank).encode()


def _endpoint(host: str) -> str:
    return f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
