"""Admitted requests as a rank knows them: tokens, where the cache lives, how each samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mnemosyne.cache.table import PageTable
from mnemosyne.runtime.sampler import SamplerState
from mnemosyne.schedule.plan import Admission

UNPLACED = PageTable(())  # of a sequence that has no pages yet


@dataclass(slots=True, eq=False)
class SequenceState:
    """One admitted request as a rank knows it."""

    tokens: np.ndarray  # int64 [prompt + max_tokens], filled up to num_tokens
    num_prompt_tokens: int
    num_tokens: int
    sampler: SamplerState
    prompt_logprobs: int | None  # how many per prompt position, if asked for
    table: PageTable = UNPLACED  # the last one that a plan brought
    # position from which on its keys and values may not be finite; None if they all are
    broken_from: int | None = None

    @classmethod
    def start(cls, admission: Admission) -> SequenceState:
        assert admission.params.max_tokens is not None, "the intake resolves it"
        num_tokens = len(admission.prompt_ids)
        num_prompt_tokens = num_tokens - admission.num_given
        tokens = np.empty(num_prompt_tokens + admission.params.max_tokens, dtype=np.int64)
        tokens[:num_tokens] = admission.prompt_ids
        prompt_ids, given = np.split(admission.prompt_ids, [num_prompt_tokens])
        sampler = SamplerState(
            admission.params, prompt_ids, admission.end_token_ids, admission.seed
        )
        for token in given.tolist():
            sampler.append(token)
        return cls(
            tokens=tokens,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=num_tokens,
            sampler=sampler,
            prompt_logprobs=admission.params.prompt_logprobs,
        )

    def note_broken(self, position: int) -> None:
        """Note that keys and values from a position on may not be finite.

        A slice that is handed over broken comes to be known behind those that it broke here.
        """
        self.broken_from = position if self.broken_from is None else min(self.broken_from, position)

    def append(self, token: int, position: int) -> None:
        """Take a token that a decode brings; it was sampled by whichever rank has the head."""
        assert position == self.num_tokens, "tokens come one after the other"
        self.tokens[position] = token
        self.num_tokens += 1
        self.sampler.append(token)
