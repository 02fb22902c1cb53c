"""``/v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

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

PREFIX = "chatcmpl-"  # of ids
WHOLE, CHUNK = "chat.completion", "chat.completion.chunk"  # objects
MAX_TOP = 20  # of top_logprobs, as OpenAI has it


def read(fields: Fields, reader: Reader) -> Reading:
    """A body as an inquiry.

    Raises:
        ValueError: naming field, rule and value.
        ApiError: for an unknown model.
    """
    model, given = reader.model(fields), read_sampling(fields)
    names = ("max_completion_tokens", "max_tokens")
    max_tokens = read_max_tokens(fields, *names, default=reader.rules.max_tokens)
    shows, top = fields.flag("logprobs"), fields.whole("top_logprobs", low=0, high=MAX_TOP)
    if top and not shows:
        raise refusal("top_logprobs", "be left out where logprobs is false", top, "set logprobs")
    if fields.flag("echo"):
        raise refusal("echo", "be left out of chat", True, "use /v1/completions")
    streaming = read_streaming(fields)
    ids = reader.conversation(fields, read_messages(fields))
    params = {**given, "max_tokens": max_tokens, **({"logprobs": top or 0} if shows else {})}
    inquiry = Inquiry(
        model=model,
        num_tokens=[],
        params=params,
        logprobs=shows,
        ignored=fields.unknown(),
        **streaming,
    )
    return reader.check(inquiry, [ids])


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages as templates expect them: contents as text, ``developer`` as ``system``."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refusal("messages", "be a list of one message or more", messages, "add one")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(name: str, message: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise refusal(name, "be an object", message, "write role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise refusal(f"{name}.role", "be a string", role, "write user, assistant or system")
    made = dict(message, role="system" if role == "developer" else role)
    made["content"] = _content(f"{name}.content", message.get("content"))
    if made["content"] is None and not message.get("tool_calls"):
        raise refusal(f"{name}.content", "be text", None, "write some, or an empty string")
    if "reasoning" in made:
        made.setdefault("reasoning_content", made["reasoning"])
    if made.get("tool_calls"):
        made["tool_calls"] = _calls(f"{name}.tool_calls", made["tool_calls"])
    return made


def _content(name: str, content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refusal(name, "be text or a list of parts", content, "write a string")
    return "\n".join(_part(f"{name}[{index}]", part) for index, part in enumerate(content))


def _part(name: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
        raise refusal(name, "be a part of type text", part, "this model reads text alone")
    return text


def _calls(name: str, calls: object) -> list[dict[str, Any]]:
    """Calls of tools; templates read their arguments as objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise refusal(name, "be a list of objects", calls, "write one per call")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        return call  # a model wrote it so, and is shown it so
    return {**call, "function": {**function, "arguments": arguments}}


def opening(answer: Answer) -> list[dict[str, Any]]:
    """Chunks that go out before anything is computed."""
    choices = [
        {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        for index in range(answer.num_choices)
    ]
    return [chunk(answer, choices)]


def delta(answer: Answer, part: Part, names: TokenNames) -> dict[str, Any]:
    """The chunk of an event."""
    choice = {
        "index": part.index,
        "delta": {"content": part.text} if part.text or not part.finish_reason else {},
        "logprobs": _logprobs(part.logprobs, names) if answer.inquiry.logprobs else None,
        "finish_reason": part.finish_reason,
        **extras(answer, part),
    }
    return {**chunk(answer, [choice]), **_prompt([part])}


def chunk(answer: Answer, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A chunk of a stream; without choices it is a sign of life."""
    return envelope(answer, CHUNK, choices)


def whole(answer: Answer, parts: Sequence[Part], names: TokenNames) -> dict[str, Any]:
    """The answer in one piece."""
    choices = [
        {
            "index": part.index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": _logprobs(part.logprobs, names) if answer.inquiry.logprobs else None,
            "finish_reason": part.finish_reason,
            **extras(answer, part),
        }
        for part in parts
    ]
    made = {**envelope(answer, WHOLE, choices), "usage": answer.usage()}
    return {**made, **_prompt(parts)}


def _prompt(parts: Sequence[Part]) -> dict[str, Any]:
    """The prompt's ids, where the client asked for them; a conversation is one prompt."""
    given = next((part.prompt_ids for part in parts if part.prompt_ids is not None), None)
    return {} if given is None else {"prompt_token_ids": given}


def _logprobs(logprobs: Sequence[Logprobs], names: TokenNames) -> dict[str, Any]:
    return {"content": [_entry(entry, names) for entry in logprobs], "refusal": None}


def _entry(entry: Logprobs, names: TokenNames) -> dict[str, Any]:
    top = [_named(token_id, logprob, names) for token_id, logprob in entry.top]
    return {**_named(entry.token_id, entry.logprob, names), "top_logprobs": top}


def _named(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {
        "token": names.text(token_id),
        "logprob": max(logprob, -9999.0),
        "bytes": list(names.bytes(token_id)),
    }
