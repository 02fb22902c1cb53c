"""One request while it is answered: its choices, what each has said, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mnemosyne.request import Logprobs, SamplingParams
from mnemosyne.server.backend import Event, Job
from mnemosyne.server.inquiry import Inquiry


@dataclass(slots=True)
class Part:
    """Part of one choice that is sent at once, in whatever dialect."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text_offset: int = 0  # characters of the choice before it
    echoed_ids: list[int] = field(default_factory=list)  # of the prompt, where it begins with it
    prompt_logprobs: list[Logprobs | None] | None = None
    prompt_ids: list[int] | None = None  # where the client asked for them

    def split(self, most: int) -> Iterator[Part]:
        """Itself in parts with so many log-probabilities at most; its text is in the last one."""
        rest = self
        while len(rest.logprobs) > most:
            yield Part(
                self.index,
                token_ids=rest.token_ids[:most],
                logprobs=rest.logprobs[:most],
                text_offset=self.text_offset,
                prompt_ids=rest.prompt_ids,
            )
            ids, logprobs = rest.token_ids[most:], rest.logprobs[most:]
            rest = replace(rest, token_ids=ids, logprobs=logprobs, prompt_ids=None)
        yield rest

    def add(self, later: Part) -> None:
        """Append what the same choice said next."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.echoed_ids += later.echoed_ids
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        if later.prompt_ids is not None:
            self.prompt_ids = later.prompt_ids


@dataclass(slots=True)
class _Choice:
    num_tokens: int = 0
    num_characters: int = 0
    cached_tokens: int = 0
    has_begun: bool = False


class Answer:
    """The state of one request's answer.

    Args:
        answer_id: with the prefix of its dialect.
        inquiry: what was asked.
        prompts: int64 ids, one array per prompt.
    """

    def __init__(self, answer_id: str, inquiry: Inquiry, prompts: list[np.ndarray]) -> None:
        self.id, self.inquiry, self.prompts = answer_id, inquiry, prompts
        self.created_s = int(time.time())
        self.params: SamplingParams = inquiry.sampling()
        self._choices = [_Choice() for _ in range(self.num_choices)]
        self._prefilled = [0] * len(prompts)
        self._prompt_logprobs: dict[int, list[Logprobs | None]] = {}
        self.num_unfinished = self.num_choices

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.inquiry.num_tokens)

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the cache had; of several samples, of the one that found least."""
        size = self.params.n
        firsts = range(0, self.num_choices, size)
        return sum(min(c.cached_tokens for c in self._choices[i : i + size]) for i in firsts)

    @property
    def num_prefilled(self) -> int:
        return sum(self._prefilled)

    def jobs(self) -> list[Job]:
        """Jobs for the engine, one per prompt."""
        return [
            Job(job_id=f"{self.id}-{index}", prompt_ids=ids, params=self.params)
            for index, ids in enumerate(self.prompts)
        ]

    def enter(self, prompt: int, event: Event) -> Part | None:
        """Take an event of one prompt's job.

        Returns:
            What it lets a choice say; None if it only tells how far the prompt is computed.
        """
        index = prompt * self.params.n + event.sample
        choice = self._choices[index]
        choice.cached_tokens = event.cached_tokens
        self._prefilled[prompt] = max(self._prefilled[prompt], event.prefilled)
        if event.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = list(event.prompt_logprobs)
        self.num_unfinished -= event.finish_reason is not None
        if not event.token_ids and not event.text and event.finish_reason is None:
            return None
        part = Part(index, finish_reason=event.finish_reason, stop_reason=event.stop_reason)
        part.text_offset = choice.num_characters
        if not choice.has_begun:
            choice.has_begun = True
            self._begin(part, prompt)
        if not self.inquiry.is_silent:
            part.text += event.text
            part.token_ids += event.token_ids
            part.logprobs += event.logprobs
            choice.num_tokens += len(event.token_ids)
        choice.num_characters += len(part.text)
        return part

    def _begin(self, part: Part, prompt: int) -> None:
        ids = self.prompts[prompt]
        if self.inquiry.echo:
            part.text = self.inquiry.echo_texts[prompt]
            part.echoed_ids = ids.tolist()
            part.prompt_logprobs = self._prompt_logprobs.get(prompt)
        if self.inquiry.return_token_ids:
            part.prompt_ids = ids.tolist()

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        prompt, output = self.num_prompt_tokens, self.num_output_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
