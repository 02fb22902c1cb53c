"""``mnemosyne chat``: a conversation in the terminal, with a server or a model that is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mnemosyne.cli import OK
from mnemosyne.client.http import NoAnswerError, asked, checked
from mnemosyne.config_client import ChatConfig, read_key
from mnemosyne.process import say

Message = dict[str, str]
SHOWN_TOKENS = 256  # prompts below show no progress


class Said(NamedTuple):
    """Part of an answer: text, or the progress of the prompt."""

    text: str = ""
    prefilled: int = 0
    num_prompt_tokens: int = 0


Answer = Callable[[list[Message]], Iterator[Said]]


def chat(config: ChatConfig) -> int:
    """Talk until the input ends.

    Args:
        config: a server or an engine, and how answers are sampled.

    Returns:
        The exit status.

    Raises:
        ValueError: if something in the config cannot be used.
    """
    with _answering(config) as answer:
        converse(answer, config.system, input)
    return OK


def converse(answer: Answer, system: str | None, ask: Callable[[str], str]) -> list[Message]:
    """Take turns; an empty line or the end of the input ends it, Ctrl-C an answer.

    Args:
        answer: gives the next message of the assistant, piece by piece.
        system: what stands before the conversation.
        ask: reads a line of the user.

    Returns:
        The conversation.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    while line := _read(ask):
        messages.append({"role": "user", "content": line})
        try:
            text = show(answer(messages))
        except (NoAnswerError, ValueError) as error:
            say(f"error: {error}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})
    return messages


def _read(ask: Callable[[str], str]) -> str:
    try:
        return ask("> ").strip()
    except EOFError:
        print()
        return ""


def show(answer: Iterator[Said]) -> str:
    """Print an answer as it comes; return the part that came before Ctrl-C."""
    said, console = [], Console(stderr=True)
    with _bar(console) as progress:
        task: TaskID | None = None
        try:
            for piece in answer:
                if piece.text:
                    progress.stop()
                    print(piece.text, end="", flush=True)
                    said.append(piece.text)
                elif piece.num_prompt_tokens >= SHOWN_TOKENS and not said:
                    task = progress.add_task("", total=None) if task is None else task
                    progress.update(task, completed=piece.prefilled, total=piece.num_prompt_tokens)
        except KeyboardInterrupt:
            pass
    print()
    return "".join(said)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("reading the prompt"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _answering(config: ChatConfig) -> Iterator[Answer]:
    """Choose the answering side: a server, or a model of this process."""
    if config.url is not None:
        yield _of_server(config)
        return
    from mnemosyne.llm import LLM
    from mnemosyne.request import SamplingParams
    from mnemosyne.serve.progress import Bars
    from mnemosyne.serve.prompts import Conversation

    with Bars() as bars:
        llm = LLM.from_config(config, progress=bars.read_weights, compiling=bars.compile)
    params = SamplingParams(
        max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed
    )

    def answer(messages: list[Message]) -> Iterator[Said]:
        for _, piece in llm.stream([Conversation(messages=messages)], params):
            if piece.error is not None:
                raise NoAnswerError(piece.error)
            yield Said(piece.text, piece.prefilled, piece.num_prompt_tokens)

    with llm:
        yield answer


def _of_server(config: ChatConfig) -> Answer:
    assert config.url is not None, "it was given"
    url = config.url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    names = ("max_tokens", "temperature", "seed")
    asked_for = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    key = read_key(config.api_key)

    def answer(messages: list[Message]) -> Iterator[Said]:
        body = {"messages": messages, "stream": True, "return_progress": True, **asked_for}
        with asyncio.Runner() as runner:
            pieces = _events(url, body, key)
            while (piece := runner.run(_next(pieces))) is not None:
                yield piece

    return answer


async def _next(pieces: AsyncIterator[Said]) -> Said | None:
    return await anext(pieces, None)


async def _events(url: str, body: dict[str, Any], key: str | None) -> AsyncIterator[Said]:
    async with asked(url, body, key=key) as reply:
        async for event in (await checked(reply)).events():
            progress = event.get("prompt_progress")
            if progress is not None:
                yield Said("", progress["processed"], progress["total"])
            for choice in event.get("choices", []):
                yield Said(choice["delta"].get("content") or "")
