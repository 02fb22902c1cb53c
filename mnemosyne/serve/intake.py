"""Prompts and parameters in, checked requests out. Nothing that is wrong passes this door.

What passes is plain, bounded and nobody else's: ids in an array of our own, parameters that a
client cannot change any more, all of which ``parallel.codec`` can send.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnemosyne.request import (
    NUM_SEEDS,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    own_params,
)
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.prompts import Prompt, PromptIds, PromptReader, as_ids
from mnemosyne.serve.tokenizer import Tokenizer

MAX_SHOWN = 2**24  # ids of a refused prompt that its output repeats
MAX_LOGPROBS = 2**22  # (token, log-probability) pairs that one request may bring: 0.5 GB

# tokens that each sample has already, None for one that is not wanted; (): none has any
Given = Sequence[Sequence[int] | None]


@dataclass(kw_only=True, slots=True)
class Intake:
    """Checks prompts and parameters against a model's vocabulary, lengths and defaults.

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

    def read(self, prompt: Prompt) -> PromptIds:
        """The ids of a prompt, which ``requests`` takes as they are; any thread may ask.

        Raises:
            ValueError: as ``PromptReader.read`` does.
        """
        reader = PromptReader(
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            tokenizer=self.tokenizer,
            model=self.model,
        )
        return reader.read(prompt)

    def end_token_ids(self) -> tuple[int, ...]:
        """The model's own end tokens: those that its configs name, and the tokenizer's."""
        named = self.defaults.end_token_ids
        if self.tokenizer is None or self.tokenizer.end_id is None:
            return named
        return tuple(dict.fromkeys((*named, self.tokenizer.end_id)))

    def requests(
        self,
        prompt: Prompt,
        params: SamplingParams,
        arrival_s: float,
        capacity: int | None = None,
        given: Given = (),
    ) -> list[Request]:
        """One request per sample that ``params.n`` asks for and ``given`` does not leave out.

        Args:
            prompt: text, or token ids (a list or an integer array), or what ``read`` gave.
            params: as the client wrote them.
            arrival_s: seconds on the engine's clock.
            capacity: tokens that an empty cache holds, for ``max_tokens=None``; unset: any number.
            given: tokens of the output that are known already.

        Raises:
            ValueError: if a parameter breaks its rule, or the prompt is empty, holds an id the
                model does not have, or is longer with its output than the model allows; if it is
                text and there is no tokenizer.
        """
        prompt_ids = self.read(prompt).ids
        params = own_params(params)
        is_open = params.max_tokens is None
        params = self._with_max_tokens(params, len(prompt_ids), capacity)
        self._check(prompt_ids, params)
        resolved = self.defaults.resolve(params)
        deadline_s = None if params.deadline is None else float(params.deadline)
        seed = params.seed if params.seed is not None else secrets.randbelow(NUM_SEEDS)
        requests = []
        for sample, known in enumerate(self._known(given, params)):
            if known is None:
                continue
            request_id, self._next_id = self._next_id, self._next_id + 1
            requests.append(
                Request(
                    request_id=request_id,
                    prompt_ids=np.concatenate((prompt_ids, known)) if len(known) else prompt_ids,
                    params=resolved,
                    seed=_sample_seed(seed, sample),
                    end_token_ids=self.end_token_ids(),
                    arrival_s=arrival_s,
                    priority=params.priority,
                    deadline_s=deadline_s,
                    sample=sample,
                    num_given=len(known),
                    is_open=is_open,
                )
            )
        return requests

    def _with_max_tokens(
        self, params: SamplingParams, num_prompt_tokens: int, capacity: int | None
    ) -> SamplingParams:
        """Parameters whose ``max_tokens`` is a number: unset, as many as model and cache hold."""
        if params.max_tokens is not None:
            return params
        room = min(self.max_positions, capacity or self.max_positions) - num_prompt_tokens
        return replace(params, max_tokens=max(1, room))

    def _known(self, given: Given, params: SamplingParams) -> list[np.ndarray | None]:
        """The known tokens of each sample, int64; None for one that is not wanted."""
        if not len(given):
            return [np.empty(0, dtype=np.int64)] * params.n
        if len(given) != params.n:
            raise ValueError(
                f"given must hold the tokens of each of n={params.n} samples, got {len(given)}; "
                "write () for a sample that has none"
            )
        assert params.max_tokens is not None, "it was resolved"
        known = [None if ids is None else np.array(ids, dtype=np.int64) for ids in given]
        for ids in known:
            if ids is None:
                continue
            if len(ids) > params.max_tokens:
                raise ValueError(
                    f"given must hold at most max_tokens={params.max_tokens} tokens of a sample, "
                    f"got {len(ids)}; raise max_tokens"
                )
            if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                raise ValueError(
                    f"given must hold ids in [0, {self.vocab_size}), got "
                    f"{ids.min() if ids.min() < 0 else ids.max()}; encode texts first"
                )
        return known

    def _check(self, ids: np.ndarray, params: SamplingParams) -> None:
        assert params.max_tokens is not None, "it was resolved"
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
        for name, num_rows in (("logprobs", params.max_tokens), ("prompt_logprobs", len(ids))):
            num_entries = num_rows * min(getattr(params, name) or 0, self.vocab_size)
            if num_entries > MAX_LOGPROBS:
                raise ValueError(
                    f"{name} must ask for at most {MAX_LOGPROBS:,} tokens in all, got "
                    f"{getattr(params, name)} at each of {num_rows:,} positions; lower it"
                )


def refused_output(prompt: object, reason: str) -> RequestOutput:
    """The output of a prompt that did not pass."""
    ids = prompt.ids if isinstance(prompt, PromptIds) else _small_ids(prompt)
    return RequestOutput(
        request_id=None,
        prompt_token_ids=ids,
        finish_reason="error",
        error=reason,
        metrics=RequestMetrics(arrival_s=0.0),
    )


def _small_ids(prompt: object) -> np.ndarray:
    """Ids of a refused prompt where it holds any that fit an int64, and not endlessly many."""
    if isinstance(prompt, list | tuple | np.ndarray):
        size = prompt.size if isinstance(prompt, np.ndarray) else len(prompt)
        ids = as_ids(prompt) if size <= MAX_SHOWN else None
        if ids is not None and np.can_cast(ids.dtype, np.int64):
            return ids.astype(np.int64)
    return np.empty(0, dtype=np.int64)


def _sample_seed(seed: int, sample: int) -> int:
    """Seed of the n-th sample; the first one is the seed itself."""
    if sample == 0:
        return seed
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0] >> 1)
