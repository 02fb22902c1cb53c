"""Prompts and parameters in, checked requests out. Nothing that is wrong passes this door."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from mnemosyne.request import (
    NUM_SEEDS,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray


@dataclass(kw_only=True, slots=True)
class Intake:
    """What is known of the model at the door.

    Args:
        vocab_size: ids must be below it.
        max_positions: positions the model was made for.
        defaults: end tokens and sampling defaults of the checkpoint.
        tokenizer: None if the checkpoint has none; prompts must then be ids.
        model: what the checkpoint is called in errors.
    """

    vocab_size: int
    max_positions: int
    defaults: GenerationDefaults
    tokenizer: Tokenizer | None
    model: str
    _next_id: int = 0

    def requests(self, prompt: Prompt, params: SamplingParams, arrival_s: float) -> list[Request]:
        """One request per sample that ``params.n`` asks for.

        Args:
            prompt: text, or token ids (a list or an integer array).
            params: as the client wrote them.
            arrival_s: seconds on the engine's clock.

        Raises:
            ValueError: if the prompt is empty, holds an id the model does not have, or is longer
                with its output than the model allows; if it is text and there is no tokenizer.
        """
        prompt_ids = self._ids(prompt)
        self._check_ids(prompt_ids, params)
        resolved = self.defaults.resolve(params)
        deadline_s = None if params.deadline is None else float(params.deadline)
        seed = params.seed if params.seed is not None else secrets.randbelow(NUM_SEEDS)
        requests = []
        for sample in range(params.n):
            request_id, self._next_id = self._next_id, self._next_id + 1
            requests.append(
                Request(
                    request_id=request_id,
                    prompt_ids=prompt_ids,
                    params=resolved,
                    seed=_sample_seed(seed, sample),
                    end_token_ids=self.defaults.end_token_ids,
                    arrival_s=arrival_s,
                    priority=params.priority,
                    deadline_s=deadline_s,
                )
            )
        return requests

    def _ids(self, prompt: Prompt) -> np.ndarray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"prompt must be token ids for {self.model}, which has no tokenizer.json, "
                    f"got text {prompt[:40]!r}; add the file or pass ids"
                )
            # a tokenizer may add a begin token to nothing, and the answer would come from nowhere
            return self.tokenizer.encode(prompt) if prompt else np.empty(0, dtype=np.int64)
        ids = _as_array(prompt)
        if ids.size and (ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(
                "prompt must be text or a flat list of integer ids, got "
                f"{ids.dtype} of shape {ids.shape}; flatten it or decode it first"
            )
        return ids.astype(np.int64)

    def _check_ids(self, ids: np.ndarray, params: SamplingParams) -> None:
        if len(ids) == 0:
            raise ValueError("prompt must hold at least one token, got none; write something")
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if len(wrong):
            raise ValueError(
                f"prompt ids must lie in [0, {self.vocab_size}), got {ids[wrong[0]]} at index "
                f"{wrong[0]}; encode with the tokenizer of {self.model}"
            )
        num_tokens = len(ids) + params.max_tokens
        if num_tokens > self.max_positions:
            raise ValueError(
                f"prompt and max_tokens must fit the model's {self.max_positions} positions, got "
                f"{len(ids)} + {params.max_tokens} = {num_tokens}; shorten one of them"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop must be empty for {self.model}, which has no tokenizer.json and makes no "
                f"text, got {list(params.stop)}; use stop_token_ids"
            )
        for name in ("logit_bias", "stop_token_ids"):
            beyond = [t for t in getattr(params, name) if not 0 <= t < self.vocab_size]
            if beyond:
                raise ValueError(
                    f"{name} must hold ids in [0, {self.vocab_size}), got {beyond[0]}; drop it"
                )


def list_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """The prompts one by one; a text, or a flat list or array of ids, is a single one.

    Raises:
        ValueError: if it is neither a prompt nor several.
    """
    if isinstance(prompts, str | bytes):
        return [prompts]
    if hasattr(prompts, "ndim"):
        array = _as_array(prompts)
        return [array] if array.ndim <= 1 else list(array)
    try:
        listed = list(prompts)
    except TypeError as error:
        raise ValueError(
            f"prompts must be texts or lists of token ids, got {prompts!r}; write ['a text']"
        ) from error
    is_flat = len(listed) > 0 and all(isinstance(item, Integral) for item in listed[:8])
    return [listed] if is_flat else listed  # type: ignore[list-item, return-value]


def refused_output(prompt: Prompt, reason: str) -> RequestOutput:
    """The output of a prompt that did not pass."""
    ids = np.empty(0) if isinstance(prompt, str) else _as_array(prompt)
    is_ids = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)
    return RequestOutput(
        request_id=None,
        prompt_token_ids=ids.astype(np.int64) if is_ids else np.empty(0, dtype=np.int64),
        finish_reason="error",
        error=reason,
        metrics=RequestMetrics(arrival_s=0.0),
    )


def _as_array(ids: object) -> np.ndarray:
    """Whatever was given as ids, as an array; of objects where it cannot be one of numbers."""
    try:
        return np.asarray(ids)
    except (TypeError, ValueError):
        return np.array(None)


def _sample_seed(seed: int, sample: int) -> int:
    """Seed of the n-th sample; the first one is the seed itself."""
    if sample == 0:
        return seed
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0] >> 1)
