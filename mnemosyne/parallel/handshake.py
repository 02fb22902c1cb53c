"""A handshake over a fresh connection: both ranks prove that they have the key of the mesh.

Both bring a number that was never used, and answer that of the other with a code that only the key
makes. Codes of the words that follow come from both numbers and count up, so that nothing of an
earlier connection, or of this one, can be said again. Words are not encrypted.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from hashlib import blake2b
from hmac import compare_digest
from multiprocessing.connection import Connection

from mnemosyne.parallel.keys import MeshKey

NUMBER_BYTES = 32
CODE_BYTES = 32
WORD_CODE_BYTES = 16
LABEL_BYTES = 64
RANK = struct.Struct("<I")
COUNT = struct.Struct("<Q")


class HandshakeError(RuntimeError):
    """The other end does not have the key."""


class Sealed:
    """Words over a connection, each with a code that proves its sender and its place in the order.

    Args:
        connection: framed messages.
        sends: the key of codes of this end.
        receives: the key of codes of the other end.
    """

    def __init__(self, connection: Connection, sends: bytes, receives: bytes) -> None:
        self._connection = connection
        self._sends, self._receives = sends, receives
        self._num_sent = self._num_received = 0

    def fileno(self) -> int:
        """The descriptor to wait on for words."""
        return self._connection.fileno()

    def send_bytes(self, word: bytes) -> None:
        """Say a word.

        Raises:
            OSError: if the other end is gone.
        """
        self._connection.send_bytes(_word_code(self._sends, self._num_sent, word) + word)
        self._num_sent += 1

    def recv_bytes(self, max_bytes: int) -> bytes:
        """The next word.

        Raises:
            OSError: if the other end is gone, or it is too long.
            HandshakeError: if it is not the next one, or not from the other end.
        """
        sealed = self._connection.recv_bytes(max_bytes + WORD_CODE_BYTES)
        code, word = sealed[:WORD_CODE_BYTES], sealed[WORD_CODE_BYTES:]
        if not compare_digest(code, _word_code(self._receives, self._num_received, word)):
            raise HandshakeError("a word on the connection of a rank is not from that rank")
        self._num_received += 1
        return word

    def close(self) -> None:
        self._connection.close()


def introduce(opened: socket.socket, key: MeshKey, rank: int, label: str, until_s: float) -> Sealed:
    """The end of a rank other than 0.

    Args:
        opened: connected to rank 0; the connection is its owner afterwards.
        key: of the mesh.
        rank: this one.
        label: what it is called.
        until_s: by ``time.monotonic``, when to give up.

    Raises:
        OSError: if the other end is gone or slow.
        HandshakeError: if it does not have the key.
    """
    ours, who = secrets.token_bytes(NUMBER_BYTES), RANK.pack(rank)
    opened.settimeout(_left(until_s))
    opened.sendall(ours + who)
    answer = _receive(opened, NUMBER_BYTES + CODE_BYTES, until_s)
    theirs, code = answer[:NUMBER_BYTES], answer[NUMBER_BYTES:]
    if not compare_digest(code, _code(key, "rank 0", ours, theirs, who)):
        raise HandshakeError("what listens at the address of rank 0 does not have the mesh's key")
    name = label.encode()[:LABEL_BYTES].ljust(LABEL_BYTES, b"\0")
    opened.sendall(name + _code(key, "rank", ours, theirs, who, name))
    return _seal(opened, key, ours, theirs, is_driver=False)


def greet(opened: socket.socket, key: MeshKey, until_s: float) -> tuple[int, str, Sealed]:
    """The end of rank 0: the rank at the other end, and its label.

    Raises:
        OSError: if the other end is gone or slow.
        HandshakeError: if it does not have the key.
    """
    hello = _receive(opened, NUMBER_BYTES + RANK.size, until_s)
    theirs, who = hello[:NUMBER_BYTES], hello[NUMBER_BYTES:]
    ours = secrets.token_bytes(NUMBER_BYTES)
    opened.sendall(ours + _code(key, "rank 0", theirs, ours, who))
    proof = _receive(opened, LABEL_BYTES + CODE_BYTES, until_s)
    name, code = proof[:LABEL_BYTES], proof[LABEL_BYTES:]
    if not compare_digest(code, _code(key, "rank", theirs, ours, who, name)):
        raise HandshakeError("a stranger")
    label = name.rstrip(b"\0").decode(errors="replace")
    return RANK.unpack(who)[0], label, _seal(opened, key, theirs, ours, is_driver=True)


def _seal(
    opened: socket.socket, key: MeshKey, number: bytes, number_0: bytes, *, is_driver: bool
) -> Sealed:
    opened.settimeout(None)
    keys = [_code(key, f"words of {end}", number, number_0) for end in ("rank 0", "rank")]
    sends, receives = keys if is_driver else reversed(keys)
    return Sealed(Connection(opened.detach()), sends, receives)


def _code(key: MeshKey, purpose: str, *parts: bytes) -> bytes:
    """Every part has a length of its own, so that no two lists of parts read the same."""
    return blake2b(b"".join(parts), key=key.derive(purpose), digest_size=CODE_BYTES).digest()


def _word_code(key: bytes, count: int, word: bytes) -> bytes:
    return blake2b(COUNT.pack(count) + word, key=key, digest_size=WORD_CODE_BYTES).digest()


def _receive(opened: socket.socket, num_bytes: int, until_s: float) -> bytes:
    """Exactly this many bytes, however they trickle in."""
    received = bytearray()
    while len(received) < num_bytes:
        opened.settimeout(_left(until_s))
        part = opened.recv(num_bytes - len(received))
        if not part:
            raise ConnectionResetError("the other end closed the connection")
        received += part
    return bytes(received)


def _left(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the other end is too slow")
    return left_s
