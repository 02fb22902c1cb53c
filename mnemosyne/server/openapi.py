"""The page ``/openapi.json``: bodies and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": ["boolean", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
IDS: Schema = {"type": "array", "items": COUNT}


def maybe(schema: Schema) -> Schema:
    """The same, or null, which means that it is not set."""
    return {"anyOf": [schema, {"type": "null"}]}


def whole(low: int, high: int | None = None) -> Schema:
    return {"type": ["integer", "null"], "minimum": low} | ({"maximum": high} if high else {})


def real(low: float, high: float | None = None, **more: Any) -> Schema:
    made: Schema = {"type": ["number", "null"], "minimum": low, **more}
    return made | ({} if high is None else {"maximum": high})


def record(properties: Mapping[str, Schema], *required: str) -> Schema:
    made: Schema = {"type": "object", "properties": dict(properties)}
    return made | ({"required": list(required)} if required else {})


SAMPLING: dict[str, Schema] = {
    "temperature": real(0),
    "top_p": real(0, 1, exclusiveMinimum=0),
    "top_k": whole(-1),
    "min_p": real(0, 1),
    "seed": whole(0, 2**63 - 1),
    "n": whole(1, 128),
    "stop": maybe({"anyOf": [TEXT, {"type": "array", "items": TEXT}]}),
    "stop_token_ids": maybe(IDS),
    "ignore_eos": FLAG,
    "min_tokens": whole(0),
    "presence_penalty": {"type": ["number", "null"]},
    "frequency_penalty": {"type": ["number", "null"]},
    "repetition_penalty": real(1e-100, 1e100),
    "logit_bias": maybe({"type": "object", "additionalProperties": NUMBER}),
    "skip_special_tokens": FLAG,
    "priority": {"type": ["integer", "null"]},
    "deadline": maybe({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, TEXT]}),
    "prompt_logprobs": whole(0, 1000),
    "max_tokens": whole(0),
    "max_completion_tokens": whole(0),
    "stream": FLAG,
    "stream_options": maybe(record({"include_usage": FLAG, "continuous_usage_stats": FLAG})),
    "return_token_ids": FLAG,
    "return_progress": FLAG,
    "model": {"type": ["string", "null"]},
    "user": {"type": ["string", "null"]},
}
MESSAGE = record(
    {
        "role": {**TEXT, "minLength": 1},
        "content": {
            "anyOf": [
                TEXT,
                {
                    "type": "array",
                    "items": record({"type": {"const": "text"}, "text": TEXT}, "type", "text"),
                },
            ]
        },
    },
    "role",
    "content",
)
MESSAGES: Schema = {"type": "array", "items": MESSAGE, "minItems": 1}
CHAT = record(
    {
        **SAMPLING,
        "messages": MESSAGES,
        "logprobs": FLAG,
        "top_logprobs": whole(0, 20),
        "chat_template_kwargs": maybe(OBJECT),
        "add_generation_prompt": FLAG,
    },
    "messages",
)
COMPLETIONS = record(
    {
        **SAMPLING,
        "prompt": {
            "anyOf": [
                TEXT,
                IDS,
                {"type": "array", "items": TEXT},
                {"type": "array", "items": IDS},
            ]
        },
        "echo": FLAG,
        "logprobs": whole(0, 1000),
    },
    "prompt",
)
TOKENIZE = record(
    {
        "model": {"type": ["string", "null"]},
        "prompt": {"type": ["string", "null"]},
        "messages": maybe(MESSAGES),
        "add_special_tokens": FLAG,
        "add_generation_prompt": FLAG,
        "chat_template_kwargs": maybe(OBJECT),
    }
)
DETOKENIZE = record(
    {"model": {"type": ["string", "null"]}, "tokens": IDS, "skip_special_tokens": FLAG}, "tokens"
)

USAGE = record(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": record({"cached_tokens": COUNT}, "cached_tokens"),
    },
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
)


def answer(name: str, choice: Schema) -> Schema:
    """A whole answer of a dialect."""
    return record(
        {
            "id": TEXT,
            "object": {"const": name},
            "created": COUNT,
            "model": TEXT,
            "choices": {"type": "array", "items": choice},
            "usage": USAGE,
        },
        *("id", "object", "created", "model", "choices", "usage"),
    )


ENDED: dict[str, Schema] = {"index": COUNT, "finish_reason": {"enum": ["stop", "length"]}}
REPLY = record(
    {"role": {"const": "assistant"}, "content": TEXT, "refusal": {"type": "null"}},
    *("role", "content"),
)
LOGPROBS = {"type": ["object", "null"]}
MODEL = record(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": TEXT,
        "max_model_len": COUNT,
        "max_request_tokens": COUNT,
        "cache_tokens": COUNT,
    },
    *("id", "object", "created", "owned_by"),
)
SCHEMAS: dict[str, Schema] = {
    "Error": record(
        {
            "error": record(
                {
                    "message": TEXT,
                    "type": TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                *("message", "type", "param", "code"),
            )
        },
        "error",
    ),
    "ChatCompletion": answer(
        "chat.completion",
        record(
            {**ENDED, "message": REPLY, "logprobs": LOGPROBS}, "index", "finish_reason", "message"
        ),
    ),
    "Completion": answer(
        "text_completion",
        record({**ENDED, "text": TEXT, "logprobs": LOGPROBS}, "index", "finish_reason", "text"),
    ),
    "Model": MODEL,
    "Models": record(
        {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}}, "object", "data"
    ),
    "Tokens": record(
        {"count": COUNT, "max_model_len": COUNT, "tokens": IDS}, "count", "max_model_len", "tokens"
    ),
    "Text": record({"prompt": TEXT}, "prompt"),
    "State": record({"status": TEXT}, "status"),
    "Version": record({"version": TEXT}, "version"),
    "Drained": record({"drained": {"type": "boolean"}, "seconds": NUMBER}, "drained", "seconds"),
    "Cleared": record({"pages_freed": COUNT}, "pages_freed"),
}


def body(schema: Schema) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


BODIES = {
    "chat": body(CHAT),
    "completions": body(COMPLETIONS),
    "tokenize": body(TOKENIZE),
    "detokenize": body(DETOKENIZE),
}


def said(name: str, about: str, media: str = "application/json") -> Schema:
    reference = {"$ref": f"#/components/schemas/{name}"}
    return {"description": about, "content": {media: {"schema": reference}}}


ERRORS = {
    400: "A field breaks its rule",
    401: "No key that is known",
    403: "Not from here",
    404: "No such model",
    408: "The rest of the body did not come",
    413: "Too large a body",
    429: "Too many requests; see Retry-After",
    500: "The engine failed",
    503: "Loading or shutting down; see Retry-After",
}


def responses(name: str, *statuses: int, **media: Schema) -> dict[int | str, dict[str, Any]]:
    """Describe the answers of a route: 200 with a schema, and errors."""
    good = said(name, "As asked")
    good["content"].update({key: {"schema": schema} for key, schema in media.items()})
    return {200: good, **{status: said("Error", ERRORS[status]) for status in statuses}}


_ASKED = (400, 401, 404, 408, 413, 429, 500, 503)
EVENTS = {"text/event-stream": record({"data": TEXT}, "data")}  # one event
RESPONSES: dict[str, dict[int | str, dict[str, Any]]] = {
    "chat": responses("ChatCompletion", *_ASKED, **EVENTS),
    "completions": responses("Completion", *_ASKED, **EVENTS),
    "tokenize": responses("Tokens", *_ASKED),
    "detokenize": responses("Text", *_ASKED),
    "models": responses("Models", 401, 503),
    "model": responses("Model", 401, 404, 503),
    "health": responses("State") | {503: said("State", "The engine is stuck")},
    "ready": responses("State") | {503: said("State", "Not yet, or not any more")},
    "metrics": {
        200: {"description": "For Prometheus", "content": {"text/plain": {"schema": TEXT}}}
    },
    "version": responses("Version"),
    "drain": responses("Drained", 401, 403),
    "clear": responses("Cleared", 401, 403),
}


def document(app: FastAPI) -> Schema:
    """The whole page."""
    page = get_openapi(title=app.title, version=app.version, routes=app.routes)
    page.setdefault("components", {}).setdefault("schemas", {}).update(SCHEMAS)
    return page
