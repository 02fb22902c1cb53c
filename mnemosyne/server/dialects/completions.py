"""``/v1/completions``: a prompt in, what follows it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mnemosyne.plain import refusal
from mnemosyne.request import Logprobs
from mnemosyne.server.answer import Answer, Part
from mnemosyne.server.dialects.envelope import envelope, extras
from mnemosyne.server.dialects.streaming import read_streaming
from mnemosyne.server.fields import Fields
from mnemosyne.server.inquiry import Inquiry
from mnemosyne.server.reading import Reader, Reading
from mnemosyne.server.sampling import read_max_tokens, read_sampling
from mnemosyne.server.token_names import TokenNames

PREFIX = "cmpl-"  # of ids
OBJECT = "text_completion"
MAX_LOGPROBS = 1000
DEFAULT_MAX_TOKENS = 16  # as OpenAI has it


def read(fields: Fields, reader: Reader, *, is_opening: bool = False) -> Reading:
    """A body as an inquiry.

    Args:
        fields: of it.
        reader: of this server.
        is_opening: whether the prompt is still to come; one token stands for it.

    Raises:
        ValueError: naming field, rule and value.
        ApiError: for an unknown model.
    """
    model, given = reader.model(fields), read_sampling(fields)
    names = ("max_tokens", "max_completion_tokens")
    max_tokens = read_max_tokens(fields, *names, default=DEFAULT_MAX_TOKENS)
    top, echo = fields.whole("logprobs", low=0, high=MAX_LOGPROBS), fields.flag("echo")
    streaming = read_streaming(fields)
    prompts, texts = _none_yet(fields) if is_opening else reader.prompts(fields)
    params = {**given, "max_tokens": max(max_tokens or 0, 1)}
    if top is not None:
        params["logprobs"] = top
        if echo:
            params["prompt_logprobs"] = top
    inquiry = Inquiry(
        model=model,
        num_tokens=[],
        params=params,
        logprobs=top is not None,
        echo=echo,
        is_silent=max_tokens == 0,
        ignored=fields.unknown(),
        **streaming,
    )
    if echo:
        pairs = zip(prompts, texts, strict=True)
        inquiry.echo_texts = [reader.echo_text(ids, text) for ids, text in pairs]
    return reader.check(inquiry, prompts)


def _none_yet(fields: Fields) -> tuple[list[np.ndarray], list[str | None]]:
    """In place of a prompt that comes in pieces."""
    for name in ("prompt", "echo"):
        if given := fields.get(name):
            raise refusal(name, "be left out where the prompt comes in lines", given, "drop it")
    return [np.zeros(1, dtype=np.int64)], [None]


def opening(answer: Answer) -> list[dict[str, Any]]:
    """Chunks that go out before anything is computed."""
    return [chunk(answer, [_choice(index, "") for index in range(answer.num_choices)])]


def delta(answer: Answer, part: Part, names: TokenNames) -> dict[str, Any]:
    """The chunk of an event."""
    return chunk(answer, [_said(answer, part, names)])


def chunk(answer: Answer, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A chunk of a stream; without choices it is a sign of life."""
    return envelope(answer, OBJECT, choices)


def whole(answer: Answer, parts: Sequence[Part], names: TokenNames) -> dict[str, Any]:
    """The answer in one piece."""
    choices = [_said(answer, part, names) for part in parts]
    return {**chunk(answer, choices), "usage": answer.usage()}


def _choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _said(answer: Answer, part: Part, names: TokenNames) -> dict[str, Any]:
    made = {
        **_choice(part.index, part.text, part.finish_reason),
        "logprobs": _logprobs(part, names) if answer.inquiry.logprobs else None,
        **extras(answer, part),
    }
    if part.prompt_ids is not None:  # the client asked for them
        made["prompt_token_ids"] = part.prompt_ids
    return made


def _logprobs(part: Part, names: TokenNames) -> dict[str, Any]:
    """Four lists, one entry per token; of the prompt too where it is echoed."""
    entries: list[tuple[int, Logprobs | None]] = []
    if part.prompt_logprobs is not None and part.echoed_ids:
        entries += zip(part.echoed_ids, part.prompt_logprobs, strict=True)
    entries += [(entry.token_id, entry) for entry in part.logprobs]
    texts = [names.text(token_id) for token_id, _ in entries]
    offsets, at = [], part.text_offset
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [entry and entry.logprob for _, entry in entries],
        "top_logprobs": [entry and _top(entry, names) for _, entry in entries],
        "text_offset": offsets,
    }


def _top(entry: Logprobs, names: TokenNames) -> dict[str, float]:
    """The most likely tokens by their texts, and the one that stands there."""
    top = {names.text(token_id): logprob for token_id, logprob in reversed(entry.top)}
    return {**top, names.text(entry.token_id): entry.logprob}
