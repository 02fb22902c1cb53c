"""Pieces that wait for a reader: as they came, or joined."""

from __future__ import annotations

from mnemosyne.request import Logprobs, Piece
from mnemosyne.serve.unread import Unread

CERTAIN = Logprobs(5, 0.0, 1, ())


def test_a_reader_that_keeps_up_gets_each_piece_itself() -> None:
    unread: Unread[Piece] = Unread()
    first, other = Piece(1, (5,), "a"), Piece(2, (6,), "b")

    unread.add(1, first)
    unread.add(2, other)

    taken = unread.take()
    assert taken[0] is first
    assert taken[1] is other
    assert unread.take() == []


def test_a_reader_that_is_slow_gets_one_piece_per_stream_with_all_that_was_said() -> None:
    unread: Unread[Piece] = Unread()

    unread.add(1, Piece(1, (5,), "a", (CERTAIN,), prefilled=3, prompt_logprobs=(None, CERTAIN)))
    unread.add(2, Piece(2, (9,), "x"))
    unread.add(1, Piece(1, (6, 7), "b", (CERTAIN, CERTAIN), prefilled=4))
    unread.add(1, Piece(1, (8,), "c", (CERTAIN,), "stop", prefilled=5, stop_reason=8))

    joined = Piece(
        *(1, (5, 6, 7, 8), "abc", (CERTAIN,) * 4, "stop"),
        prefilled=5,
        stop_reason=8,
        prompt_logprobs=(None, CERTAIN),
    )
    assert unread.take() == [joined, Piece(2, (9,), "x")]
