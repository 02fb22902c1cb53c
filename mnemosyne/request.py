"""What a client asks for and what it gets back: parameters, requests, outputs, pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from mnemosyne.config import Duration, check_types, parse_duration

NUM_SEEDS = 2**63  # seeds are non-negative int64


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    ``temperature`` 0 is greedy. ``None`` means "not set": end tokens and the sampling defaults of
    a checkpoint's ``generation_config.json`` then apply where it has them (see ``resolved``).
    """

    max_tokens: int = 16
    min_tokens: int = 0  # no end token or stop string before this many tokens
    temperature: float | None = None  # 0 is greedy; unset: the model's default, else 0
    top_p: float | None = None  # in (0, 1]
    top_k: int | None = None  # 0 keeps all
    min_p: float = 0.0  # keep tokens with p >= min_p * p_max
    seed: int | None = None  # unset: drawn once when the request is accepted
    repetition_penalty: float | None = None  # > 0, over prompt and output; 1 is off
    presence_penalty: float = 0.0  # subtracted once for a token the output has
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()  # strings; the text ends before the first one
    stop_token_ids: Sequence[int] = ()  # besides the model's own end tokens
    ignore_eos: bool = False  # the model's own end tokens do not end the request
    skip_special_tokens: bool = True  # leave special tokens such as <|im_end|> out of the text
    n: int = 1  # independent samples of the same prompt
    logprobs: int | None = None  # report the k most likely tokens of each output position
    prompt_logprobs: int | None = None  # the same for each prompt position but the first
    priority: int = 0  # a lower number is admitted and prefilled first, whatever the policy
    # of the first token, from acceptance: seconds, or text such as 500ms; unset: by slo
    deadline: Duration | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        check_types(self)
        self._check_lengths()
        self._check_numbers()
        self._check_tokens()

    def _check_lengths(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "be >= 1", self.max_tokens, "ask for a token")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"lie in [0, max_tokens={self.max_tokens}]",
            self.min_tokens,
            "lower it or raise max_tokens",
        )
        _require(self.n >= 1, "n", "be >= 1", self.n, "ask for one sample")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= 1000,
                name,
                "lie in [0, 1000]",
                value,
                "use None to turn it off",
            )
        _require(
            all(isinstance(text, str) and text for text in self.stop),
            "stop",
            "hold non-empty strings",
            list(self.stop),
            "drop the empty ones",
        )

    def _check_numbers(self) -> None:
        value = self.temperature
        _require(
            value is None or (math.isfinite(value) and value >= 0),
            "temperature",
            "be a finite number >= 0",
            value,
            "use 0 for greedy",
        )
        value = self.top_p
        _require(value is None or 0 < value <= 1, "top_p", "lie in (0, 1]", value, "1 is off")
        _require(
            self.top_k is None or self.top_k >= 0, "top_k", "be >= 0", self.top_k, "0 keeps all"
        )
        _require(0 <= self.min_p <= 1, "min_p", "lie in [0, 1]", self.min_p, "0 is off")
        value = self.repetition_penalty
        _require(
            value is None or (math.isfinite(value) and value > 0),
            "repetition_penalty",
            "be a finite number > 0",
            value,
            "1 is off",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(math.isfinite(value), name, "be finite", value, "0 is off")
        _require(
            self.seed is None or 0 <= self.seed < NUM_SEEDS,
            "seed",
            "lie in [0, 2**63)",
            self.seed,
            "use None for a random one",
        )
        if self.deadline is not None:
            self.deadline = parse_duration(self.deadline, "deadline")

    def _check_tokens(self) -> None:
        for name in ("logit_bias", "stop_token_ids"):
            value = getattr(self, name)
            _require(
                all(isinstance(token, Integral) for token in value),
                name,
                "hold token ids",
                value,
                "encode texts first",
            )
        for token, bias in self.logit_bias.items():
            _require(
                _is_finite(bias),
                f"logit_bias[{token}]",
                "be finite",
                bias,
                "use -100 to ban",
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _require(holds: bool, name: str, rule: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value!r}; {remedy}")


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities (natural log) at one position."""

    token_id: int  # the token that stands there
    logprob: float
    rank: int  # 1 is the most likely
    top: tuple[tuple[int, float], ...] = ()  # the k most likely, best first


class Sampled(NamedTuple):
    """What one sampled row gave. ``error`` is set when its logits were not finite."""

    token_id: int
    logprobs: Logprobs | None = None
    error: str | None = None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Times of one request in seconds, and how its prompt was cut."""

    arrival_s: float
    deadline_s: float | None = None  # of the first token, from acceptance
    queued_s: float | None = None  # from acceptance until its pages were reserved
    ttft_s: float | None = None  # first token out minus accepted
    missed_deadline: bool | None = None  # once there is a first token
    num_shards: int | None = None  # groups that hold its cache
    tbt_s: list[float] = field(default_factory=list)  # gaps between consecutive tokens
    chunks: list[int] = field(default_factory=list)  # tokens per prefill chunk
    finished_s: float | None = None


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """What a request got.

    ``finish_reason`` is ``"stop"`` (end token or stop string), ``"length"``, ``"cancelled"``,
    ``"error"`` (then ``error`` says why) or None while it still runs.
    """

    request_id: int | None  # None if it was refused
    prompt_token_ids: np.ndarray  # int64 [num_prompt_tokens]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the end token or stop string that ended it
    error: str | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None  # None for the first position
    metrics: RequestMetrics
    samples: list[RequestOutput] = field(default_factory=list)  # for n > 1: all n, itself first


class Piece(NamedTuple):
    """What one step added to one request, as streams yield it.

    A tuple, as ``Chunk`` is: every decode of a step brings one, and it is made in half the time.
    """

    request_id: int | None  # None if it was refused
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    prefilled: int = 0  # prompt tokens computed so far
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What a client sent, checked and resolved: every sampling default is filled in."""

    request_id: int
    prompt_ids: np.ndarray  # int64 [num_prompt_tokens]
    params: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...]  # the model's own
    arrival_s: float
    priority: int = 0  # a lower number is prefilled first
    deadline_s: float | None = None  # for the first token, after arrival; unset: by the slo config
    # kept, not counted each time: a scheduling decision asks dozens of times
    num_prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False)  # of prompt and output together

    def __post_init__(self) -> None:
        num_prompt_tokens = len(self.prompt_ids)
        object.__setattr__(self, "num_prompt_tokens", num_prompt_tokens)
        object.__setattr__(self, "max_tokens", num_prompt_tokens + self.params.max_tokens)
