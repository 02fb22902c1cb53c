"""A conversation in the terminal: with a server, with a model, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mnemosyne.cli import chat as chat_module
from mnemosyne.cli.chat import Message, Said, converse
from mnemosyne.client.http import NoAnswerError
from mnemosyne.config_client import ChatConfig
from tests.server.conftest import open_needle
from tools.live_server import serving

ENGINE = {"model": "needle", "dtype": "float64", "device": "cpu", "temperature": 0.0}


def lines(*said: str) -> Callable[[str], str]:
    """A user who says these lines and leaves."""
    rest = iter(said)

    def ask(sign: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return ask


def test_turns_are_remembered_and_errors_are_not() -> None:
    seen: list[list[Message]] = []

    def answer(messages: list[Message]) -> Iterator[Said]:
        seen.append(list(messages))
        if messages[-1]["content"] == "bad":
            raise NoAnswerError("no")
        yield Said("", 5, 10)
        yield Said("a")
        yield Said("b")

    messages = converse(answer, "be brief", lines("one", "bad", "two"))

    system = {"role": "system", "content": "be brief"}
    said = {"role": "assistant", "content": "ab"}
    one, two = ({"role": "user", "content": text} for text in ("one", "two"))
    assert messages == [system, one, said, two, said]
    assert [turn[-1]["content"] for turn in seen] == ["one", "bad", "two"]


def test_ctrl_c_ends_an_answer_and_keeps_what_came() -> None:
    def answer(messages: list[Message]) -> Iterator[Said]:
        yield Said("half")
        raise KeyboardInterrupt

    assert converse(answer, None, lines("x", ""))[-1]["content"] == "half"


def test_a_server_and_a_model_of_ones_own_say_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lines("the door code is monday seven", "again"))
    assert chat_module.chat(ChatConfig(**ENGINE, max_tokens=6)) == 0
    alone = capsys.readouterr().out

    with open_needle() as llm, serving(llm.engine) as live:
        monkeypatch.setattr("builtins.input", lines("the door code is monday seven", "again"))
        assert chat_module.chat(ChatConfig(**ENGINE, max_tokens=6, url=live.url)) == 0

    assert capsys.readouterr().out == alone
    assert alone.strip()


def test_a_server_that_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lines("hello"))

    chat_module.chat(ChatConfig(url="http://127.0.0.1:9"))

    assert (
        "error: http://127.0.0.1:9/v1/chat/completions does not answer" in capsys.readouterr().err
    )
