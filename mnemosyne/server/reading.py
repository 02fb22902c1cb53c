"""Bodies to inquiries: what a worker process knows and does. No event loop is near."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from mnemosyne.plain import refusal, shown
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.intake import Intake
from mnemosyne.serve.prompts import Conversation, Prompt, PromptIds
from mnemosyne.serve.tokenizer import Tokenizer
from mnemosyne.server.errors import NOT_FOUND, ApiError
from mnemosyne.server.fields import Fields, decoded, flat_ids
from mnemosyne.server.inquiry import Inquiry
from mnemosyne.server.sampling import checked

ANY = "any"  # among the names: every model is this one


class Rules(msgspec.Struct, kw_only=True):
    """Facts that a worker must know of the engine and of the server's limits."""

    model: str
    names: list[str]  # by which clients may ask for it, the first one in answers
    vocab_size: int
    max_model_len: int
    max_request_tokens: int
    tokenizer_dir: str | None
    max_prompts: int
    max_tokens: int | None  # of answers where the client names no limit


@dataclass(slots=True)
class Reading:
    """Outcome of a body: something to send back as JSON, and ids beside it."""

    said: Any
    ids: list[np.ndarray] = field(default_factory=list)


class Reader:
    """Reads bodies for one model.

    Args:
        rules: of engine and server.
    """

    def __init__(self, rules: Rules) -> None:
        folder = rules.tokenizer_dir
        self.rules = rules
        self.tokenizer = None if folder is None else Tokenizer.from_dir(folder)
        self._intake = Intake(
            vocab_size=rules.vocab_size,
            max_positions=rules.max_model_len,
            defaults=GenerationDefaults(),
            tokenizer=self.tokenizer,
            model=rules.model,
        )

    def model(self, fields: Fields) -> str:
        """The name that the client used, or ours if it used none.

        Raises:
            ApiError: if no model here is called so.
        """
        names, asked = self.rules.names, fields.text("model")
        if asked is None:
            return names[0]
        if asked not in names and ANY not in names:
            raise unknown_model(asked, names)
        return asked

    def read(self, prompt: Prompt) -> np.ndarray:
        """The ids of one prompt.

        Raises:
            ValueError: as ``PromptReader.read`` does.
        """
        return self._intake.read(prompt).ids

    def conversation(self, fields: Fields, messages: list[dict[str, Any]]) -> np.ndarray:
        """The ids of messages, written by the model's chat template."""
        variables = fields.mapping("chat_template_kwargs")
        effort = fields.get("reasoning_effort")
        if effort is not None:
            variables = {"reasoning_effort": effort, **variables}
        return self.read(
            Conversation(
                messages=messages,
                add_generation_prompt=fields.flag("add_generation_prompt", True),
                tools=self._tools(fields),
                variables=variables or None,
            )
        )

    def _tools(self, fields: Fields) -> list[dict[str, Any]] | None:
        """Tools are shown to the model; its calls come back as text."""
        tools, choice = fields.get("tools") or [], fields.get("tool_choice") or "auto"
        is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        if not is_list:
            raise refusal("tools", "be a list of objects", tools, "write one per function")
        if choice not in ("auto", "none"):
            remedy = "this server forces no call yet"
            raise refusal("tool_choice", "be auto or none", choice, remedy)
        return tools if tools and choice == "auto" else None

    def prompts(self, fields: Fields) -> tuple[list[np.ndarray], list[str | None]]:
        """The prompts of ``prompt``, and their texts where they came as such.

        Raises:
            ValueError: if it is neither text nor ids, nor a list of one of them.
        """
        raw = fields.raw("prompt")
        if raw is None:
            raise ValueError("prompt must be given, got none; add text or token ids")
        kind, inner = _first(raw), _first(raw[1:])
        if kind != "[":
            given: list[Any] = [decoded("prompt", raw)]
        elif inner in '"[]':
            given = self._listed(raw)
        else:
            given = [flat_ids("prompt", raw, self.rules.max_model_len)]
        texts = [item if isinstance(item, str) else None for item in given]
        return [self.read(item) for item in given], texts

    def _listed(self, raw: memoryview) -> list[Any]:
        try:
            items = msgspec.json.decode(raw, type=list[msgspec.Raw])
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"prompt must be valid JSON, got {error}; correct it") from error
        if not 0 < len(items) <= self.rules.max_prompts:
            raise ValueError(
                f"prompt must hold 1 to {self.rules.max_prompts} prompts, got {len(items)}; "
                "send several requests"
            )
        views = [memoryview(item) for item in items]
        limit = self.rules.max_model_len
        return [
            flat_ids("prompt", view, limit) if _first(view) == "[" else decoded("prompt", view)
            for view in views
        ]

    def check(self, inquiry: Inquiry, prompts: list[np.ndarray]) -> Reading:
        """An inquiry that the engine would not refuse.

        Raises:
            ValueError: naming field, rule and value.
        """
        params, capacity = checked(inquiry.params), self.rules.max_request_tokens
        if params.n > 1 and len(prompts) * params.n > self.rules.max_prompts:
            raise ValueError(
                f"n must ask for at most {self.rules.max_prompts} samples in all, got {params.n} "
                f"of {len(prompts)} prompts; lower it"
            )
        for ids in prompts:
            request = self._intake.requests(PromptIds(ids), params, 0.0, capacity)[0]
            if request.max_tokens > capacity:
                asked = f"{len(ids)} + {request.max_tokens - len(ids)} = {request.max_tokens}"
                raise ValueError(
                    f"prompt and max_tokens must fit the cache of {capacity} tokens, got {asked}; "
                    "shorten one of them"
                )
        inquiry.num_tokens = [len(ids) for ids in prompts]
        # as they were understood: a penalty may have come as a whole number of any size
        inquiry.params = {name: getattr(params, name) for name in inquiry.params}
        return Reading(inquiry, prompts)

    def tokenize(self, fields: Fields) -> Reading:
        """``/tokenize``: the ids of a text, or of messages as chat sends them."""
        from mnemosyne.server.dialects.chat import read_messages

        self.model(fields)
        if fields.raw("messages") is not None:
            ids = self.conversation(fields, read_messages(fields))
        else:
            text = fields.text("prompt")
            if text is None:
                raise ValueError("prompt must be given, got none; add prompt or messages")
            add = fields.flag("add_special_tokens", True)
            ids = self.read({"prompt": text, "add_special_tokens": add})
        return Reading({"count": len(ids), "max_model_len": self.rules.max_model_len}, [ids])

    def detokenize(self, fields: Fields) -> Reading:
        """``/detokenize``: the text of ids."""
        self.model(fields)
        raw = fields.raw("tokens")
        if raw is None or _first(raw) != "[":
            raise ValueError("tokens must be a list of token ids, got none; add them")
        ids = flat_ids("tokens", raw, self.rules.max_model_len)
        if len(ids):
            ids = self.read(ids)
        tokenizer = self._with_text("tokens")
        skip = fields.flag("skip_special_tokens")
        return Reading({"prompt": tokenizer.decode(ids, skip_special_tokens=skip)})

    def names_of(self, fields: Fields) -> Reading:
        """The bytes of single tokens, for answers with log-probabilities."""
        ids: list[int] = fields.get("ids", [])
        if self.tokenizer is None:
            return Reading([b"" for _ in ids])
        return Reading([self.tokenizer.bytes_of(token_id) for token_id in ids])

    def echo_text(self, ids: np.ndarray, text: str | None) -> str:
        """Text of what the client sent."""
        if text is not None or self.tokenizer is None:
            return text or ""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _with_text(self, name: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{name} must go to a model with a tokenizer, got {self.rules.model}, which has "
                "no tokenizer.json; add the file"
            )
        return self.tokenizer


def unknown_model(asked: str, names: list[str]) -> ApiError:
    message = f"model must be one of {', '.join(names)}, got {shown(asked)}; ask for that"
    return ApiError(404, message, kind=NOT_FOUND, param="model", code="model_not_found")


def read_body(reader: Reader, kind: str, body: bytes | memoryview) -> Reading:
    """Read a body of some kind: the path's last word.

    Raises:
        ValueError: if it is refused.
        ApiError: the same, with a status of its own.
    """
    # a dialect is a file of its own; the table is all that is to be extended for one more
    from mnemosyne.server.dialects import chat, completions

    kinds: dict[str, Callable[[Fields], Reading]] = {
        "chat": lambda fields: chat.read(fields, reader),
        "completions": lambda fields: completions.read(fields, reader),
        "opening": lambda fields: completions.read(fields, reader, is_opening=True),
        "tokenize": reader.tokenize,
        "detokenize": reader.detokenize,
        "names": reader.names_of,
    }
    return kinds[kind](Fields(body))


def _first(view: memoryview) -> str:
    """The first character that is no space."""
    head = bytes(view[:64]).lstrip() or bytes(view).lstrip()
    return chr(head[0]) if head else ""
