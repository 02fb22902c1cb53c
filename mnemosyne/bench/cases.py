"""The cases of a bench: requests served together, and the numbers derived from their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from mnemosyne.config_bench import BenchConfig

WARM_TOKENS = 4  # of each request, not measured
BESIDE_TOKENS = 1024  # that a decode beside a prefill may have: more than any prefill takes steps

Answers = list[dict[str, Any]]
Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts that are served together.

    Args:
        name: what the table calls it.
        lengths: tokens of each prompt.
        max_tokens: tokens to produce of each.
        is_filled: whether caches hold random keys and values instead of computed ones.
        beside: tokens of a prompt that arrives when all others decode; None: there is none.
    """

    name: str
    lengths: tuple[int, ...]
    max_tokens: int
    is_filled: bool
    beside: int | None = None

    @property
    def is_batch(self) -> bool:
        return len(self.lengths) + (self.beside is not None) > 1

    @property
    def max_positions(self) -> int:
        """Positions that the longest request takes."""
        return max(*(length + self.max_tokens for length in self.lengths), (self.beside or 0) + 1)

    @property
    def num_cached(self) -> int:
        """Tokens that the cache must hold."""
        return sum(self.lengths) + len(self.lengths) * self.max_tokens + (self.beside or 0) + 1

    def requests(self, seed: int, vocab_size: int) -> list[dict[str, Any]]:
        """The requests as ``peers/main.py`` takes them; the same for every engine."""
        rng = np.random.default_rng(seed)

        def request(length: int, max_tokens: int, **fields: Any) -> dict[str, Any]:
            ids = rng.integers(0, vocab_size, length).tolist()
            return {"ids": ids, "max_tokens": max_tokens, **fields}

        found = [
            request(length, self.max_tokens, is_filled=self.is_filled, after=0)
            for length in self.lengths
        ]
        if self.beside is not None:
            found.append(request(self.beside, 1, is_filled=False, after=WARM_TOKENS))
        return found

    def numbers(self, answers: Answers) -> Numbers:
        """The numbers of one run: seconds, milliseconds and tokens per second.

        Raises:
            ValueError: if a request did not get the tokens it asked for.
        """
        self._check(answers)
        if self.beside is not None:
            return self._beside(answers)
        times_s = [answer["times_s"] for answer in answers]
        gaps_s = [gap for times in times_s for gap in np.diff(times[WARM_TOKENS:])]
        numbers = {"decode_ms": 1e3 * median(gaps_s)}
        if not self.is_filled:
            last_s = max(times[0] for times in times_s)
            numbers = {"prefill_s": last_s - answers[0]["added_s"], **numbers}
        if len(times_s) > 1:
            # all decode from the last one's first tokens to the first one's last
            start_s = max(times[WARM_TOKENS] for times in times_s)
            stop_s = min(times[-1] for times in times_s)
            if stop_s <= start_s:
                raise ValueError(
                    f"max_tokens must let all requests of {self.name} decode together, got "
                    f"{self.max_tokens}, which some had before others began; raise it"
                )
            numbers["tokens_per_s"] = _rate(times_s, start_s, stop_s)
        return numbers

    def _beside(self, answers: Answers) -> Numbers:
        """The prefill, and the tokens of the decodes while it lasted."""
        *decodes, prompt = answers
        start_s, stop_s = prompt["added_s"], prompt["times_s"][0]
        times_s = [decode["times_s"] for decode in decodes]
        gaps_s = [
            gap
            for times in times_s
            for gap, end_s in zip(np.diff(times), times[1:], strict=True)
            if start_s < end_s <= stop_s
        ]
        decoded_per_s = _rate(times_s, start_s, stop_s)
        assert self.beside is not None
        return {
            "prefill_s": stop_s - start_s,
            "decoded_per_s": decoded_per_s,
            "tokens_per_s": decoded_per_s + self.beside / (stop_s - start_s),
            "gap_p95_ms": 1e3 * float(np.percentile(gaps_s, 95)),
        }

    def _check(self, answers: Answers) -> None:
        counts = [len(answer["token_ids"]) for answer in answers]
        if self.beside is None:
            is_right = set(counts) == {self.max_tokens}
        else:  # the decodes are cut off when the prompt has its token
            is_right = counts[-1] == 1 and max(counts) < self.max_tokens
        if not is_right:
            raise ValueError(
                f"{self.name}: an engine must give the tokens it is asked for, got {counts} of "
                f"{self.max_tokens}; look for what ends its requests"
            )


def make_cases(config: BenchConfig) -> list[Case]:
    """One case per length, or all lengths spread over the batch beside one prompt."""
    is_filled = not config.prefill
    mark = ", filled cache" if is_filled else ""
    beside = config.beside_tokens
    if beside is not None:
        spread = np.geomspace(config.lengths[0], config.lengths[-1], config.batch)
        name = f"{config.batch} decodes and a prompt of {short(beside)}{mark}"
        lengths = tuple(round(length) for length in spread)
        return [Case(name, lengths, BESIDE_TOKENS, is_filled, beside)]
    many = f"{config.batch} x " if config.batch > 1 else ""
    return [
        Case(f"{many}{short(length)}{mark}", (length,) * config.batch, config.max_tokens, is_filled)
        for length in config.lengths
    ]


def short(length: int) -> str:
    """A length as people write it: 16K."""
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _rate(times_s: Sequence[Sequence[float]], start_s: float, stop_s: float) -> float:
    """Tokens per second of all requests in ``(start_s, stop_s]``."""
    count = sum(start_s < time_s <= stop_s for times in times_s for time_s in times)
    return count / (stop_s - start_s)
