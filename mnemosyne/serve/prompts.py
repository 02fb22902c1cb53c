"""Prompts of a client to token ids of our own; any thread may do it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np

from mnemosyne.plain import NOT_LISTS, Refusal, plain_flag, plain_list, refusal, shown
from mnemosyne.serve.chat import Message
from mnemosyne.serve.tokenizer import Tokenizer

MAX_PROMPTS = 2**20  # of one call
# the keys a mapping may hold the prompt under, and those that may stand beside it
PROMPT_KEYS: dict[str, set[str]] = {
    "prompt_token_ids": {"prompt"},
    "prompt": {"add_special_tokens"},
    "input_ids": {"attention_mask", "token_type_ids"},
}


@dataclass(frozen=True, slots=True, eq=False)
class PromptIds:
    """A prompt that was read: ids that the model has, in an array that nothing else holds."""

    ids: np.ndarray  # int64 [num_prompt_tokens]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A prompt that the model's chat template writes."""

    messages: Sequence[Message]  # dicts with role and content, oldest first
    add_generation_prompt: bool = True  # end with the header of an assistant's message
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions
    variables: Mapping[str, Any] | None = None  # further names that the template reads


Prompt = str | Sequence[int] | np.ndarray | Mapping[str, object] | PromptIds | Conversation


@dataclass(kw_only=True, slots=True)
class PromptReader:
    """Turns prompts into ids of a model.

    Args:
        vocab_size: ids must be below it.
        max_positions: positions the model was made for.
        tokenizer: None if the checkpoint has none; prompts must then be ids.
        model: what the checkpoint is called in errors.
    """

    vocab_size: int
    max_positions: int
    tokenizer: Tokenizer | None
    model: str

    def read(self, prompt: Prompt) -> PromptIds:
        """Encode a text, or check ids and copy them.

        Args:
            prompt: text; token ids (a list, or an integer array or tensor); or a mapping that
                holds one of them: ``{"prompt": text}``, ``{"prompt_token_ids": ids}``, or what a
                tokenizer of transformers returns, with ``input_ids`` of one prompt; or a
                conversation. ``{"prompt": text, "add_special_tokens": False}`` says that the
                special tokens are in the text.

        Raises:
            ValueError: if the prompt is empty, holds an id the model does not have, or is longer
                than the model allows; if it is text and there is no tokenizer.
        """
        if isinstance(prompt, PromptIds):
            return prompt
        if isinstance(prompt, Conversation):
            prompt = {"prompt": self._render(prompt), "add_special_tokens": False}
        given, is_plain = _unwrap(prompt) if isinstance(prompt, Mapping) else (prompt, True)
        ids = self._encode(given, is_plain) if isinstance(given, str) else self._copy(given)
        if len(ids) == 0:
            raise ValueError("prompt must hold at least one token, got none; write something")
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if len(wrong):
            raise ValueError(
                f"prompt ids must lie in [0, {self.vocab_size}), got {ids[wrong[0]]} at index "
                f"{wrong[0]}; encode with the tokenizer of {self.model}"
            )
        return PromptIds(ids.astype(np.int64))

    def _render(self, prompt: Conversation) -> str:
        """The text of a conversation; its fields may hold foreign objects."""
        if self.tokenizer is None:
            raise ValueError(
                f"messages must go to a model with a tokenizer, got {self.model}, which has no "
                "tokenizer.json; add the file or pass ids"
            )
        return self.tokenizer.apply_chat_template(
            prompt.messages,
            add_generation_prompt=prompt.add_generation_prompt,
            tools=prompt.tools,
            variables=prompt.variables,
        )

    def _encode(self, text: str, add_special_tokens: bool) -> np.ndarray:
        if self.tokenizer is None:
            raise ValueError(
                f"prompt must be token ids for {self.model}, which has no tokenizer.json, "
                f"got text {shown(text)}; add the file or pass ids"
            )
        # a tokenizer may add a begin token to nothing, and the answer would come from nowhere
        if not text:
            return np.empty(0, dtype=np.int64)
        return self.tokenizer.encode(str.__str__(text), add_special_tokens=add_special_tokens)

    def _copy(self, prompt: object) -> np.ndarray:
        """Ids as an integer array of one dimension; they may come in a foreign object."""
        try:
            num_tokens = len(prompt)  # type: ignore[arg-type]  # what has none is caught
        except Exception as error:
            raise _no_ids(prompt) from error
        if num_tokens > self.max_positions:  # before it takes the memory of an array
            raise ValueError(
                f"prompt must fit the model's {self.max_positions} positions, got {num_tokens} "
                "tokens; shorten it"
            )
        ids = as_ids(prompt)
        if ids is None:
            raise _no_ids(prompt)
        return ids


def as_ids(prompt: object) -> np.ndarray | None:
    """A flat list, array or tensor of whole numbers as an array, None if it is anything else.

    The integers keep their width: those that no int64 holds are none of a vocabulary either.
    """
    try:
        ids = np.asarray(prompt if hasattr(prompt, "__array__") else _whole_items(prompt))
    except Exception:  # noqa: BLE001  # code of another library, or numbers too large
        return None
    if ids.shape == (0,):
        return ids.astype(np.int64)
    return ids if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) else None


def _whole_items(prompt: object) -> list[int]:
    """The items of a sequence, as many as it says it has; all are whole numbers.

    numpy would take true for 1, and follow whatever is nested however deep it goes.
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, NOT_LISTS):
        raise TypeError("not a sequence")
    items = list(islice(prompt, len(prompt)))
    kinds = set(map(type, items))
    if bool in kinds or not all(issubclass(kind, Integral) for kind in kinds):
        raise TypeError("not whole numbers")
    return items


def list_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """The prompts one by one; a text, or a flat list or array of ids, is a single one.

    A mapping must be in a list, since one of transformers may also hold a batch.

    Raises:
        ValueError: if it is neither a prompt nor several, or too many to hold.
    """
    if isinstance(prompts, Mapping):
        kind = type(prompts).__name__
        raise refusal("prompts", f"be in a list, not a {kind}", prompts, "write [mapping]")
    if isinstance(prompts, str | bytes | PromptIds | Conversation):
        return [prompts]  # bytes are refused when they are read
    try:
        return _listed(prompts)
    except Refusal:
        raise
    except Exception as error:  # no iterable, or code of the client's own
        raise refusal(
            "prompts", "be texts or lists of token ids", prompts, "write ['a text']"
        ) from error


def _listed(prompts: Any) -> list[Prompt]:
    """The prompts of an array or iterable, which may be foreign."""
    if hasattr(prompts, "ndim"):
        holds_prompts = prompts.ndim > 1 or getattr(prompts.dtype, "kind", "i") in "OUT"
        return _bounded(prompts) if prompts.ndim and holds_prompts else [prompts]
    if isinstance(prompts, Sequence):  # looked at twice, and kept whole if it is one prompt
        return [prompts] if _is_flat(islice(prompts, 8)) else _bounded(prompts)
    listed = _bounded(prompts)
    return [listed] if _is_flat(listed[:8]) else listed  # type: ignore[list-item]


def _bounded(prompts: Iterable[Prompt]) -> list[Prompt]:
    listed = list(islice(prompts, MAX_PROMPTS + 1))
    if len(listed) > MAX_PROMPTS:
        raise refusal("prompts", f"be at most {MAX_PROMPTS:,}", prompts, "make several calls")
    return listed


def _is_flat(items: Iterable[object]) -> bool:
    """Return whether the first items are token ids, not prompts."""
    head = list(items)
    return bool(head) and all(isinstance(item, Integral) for item in head)


def list_conversations(messages: object, **options: Any) -> list[Prompt]:
    """The conversations one by one; a list of dicts is a single one.

    Args:
        messages: one conversation, or several.
        options: fields of ``Conversation`` that all of them share.

    Raises:
        ValueError: if it is neither.
    """
    listed = plain_list("messages", messages, limit=MAX_PROMPTS, of="messages")
    if not listed:
        raise refusal("messages", "hold a message", messages, "write a dict of role and content")
    several = [listed] if isinstance(listed[0], Mapping) else listed
    return [Conversation(messages=each, **options) for each in several]


def _unwrap(prompt: Mapping[str, object]) -> tuple[object, bool]:
    """The text or ids that a mapping holds, and whether special tokens are to be added."""
    try:
        entries = {key: prompt[key] for key in islice(prompt, 16)}
    except Exception as error:  # code of the client's own
        raise refusal("prompt", "be a readable mapping", prompt, "pass text or ids") from error
    for name, beside in PROMPT_KEYS.items():
        if name in entries and entries.keys() <= {name, *beside}:
            given = _row(entries) if name == "input_ids" else entries[name]
            name = "add_special_tokens"
            return given, plain_flag(name, entries.get(name, True))
    raise ValueError(
        "prompt must hold prompt, prompt_token_ids or input_ids and nothing else, got a "
        f"{type(prompt).__name__} with {shown(list(entries))}; pass text or ids"
    )


def _row(entries: dict[str, object]) -> object:
    """The ids of a mapping of transformers: flat, or the only row of a batch; without padding."""
    ids, mask = entries["input_ids"], entries.get("attention_mask", [])
    try:
        if hasattr(ids, "ndim") and ids.ndim == 2 and len(ids) == 1:  # type: ignore[arg-type]
            ids, mask = ids[0], mask[0] if len(mask) else []  # type: ignore[index, arg-type]
        mask_of_ids = as_ids(mask)
        is_whole = mask_of_ids is not None and bool(np.all(mask_of_ids == 1))
    except Exception as error:  # code of another library
        raise _no_ids(ids) from error
    if not is_whole:
        raise ValueError(
            f"attention_mask must be all ones, got {shown(mask)}; encode without padding"
        )
    return ids


def _no_ids(prompt: object) -> Refusal:
    kind = f" of shape {prompt.shape}" if isinstance(prompt, np.ndarray) else ""
    return refusal(
        "prompt",
        "be text or a flat list of integer ids",
        prompt,
        f"flatten or decode this {type(prompt).__name__}{kind}",
    )
