"""The words between client and engine: parameters, requests, outputs, pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mnemosyne.config import Duration, parse_duration
from mnemosyne.plain import (
    Number,
    Whole,
    plain_flag,
    plain_items,
    plain_list,
    plain_text,
    refusal,
)

NUM_SEEDS = 2**63  # seeds are non-negative int64
MAX_SAMPLES = 128  # of one prompt: they are all made between two steps
MAX_STOPS = 256  # stop strings, each looked for in every piece of text
MAX_STOP_CHARACTERS = 1024  # of one of them
MAX_STOP_TOKENS = 1024
MAX_BIASES = 65_536  # entries of logit_bias
MAX_SALT_CHARACTERS = 1024  # of cache_salt
MIN_DEADLINE_S, MAX_DEADLINE_S = 1e-9, 1e9  # 1 ns and 32 years
LARGEST = 1e300  # of a bias or penalty, so that their sums are finite in float64
LARGEST_FACTOR = 1e100  # of the penalty that logits are multiplied by

WHOLES = {
    "max_tokens": Whole(low=1, rule="be >= 1", remedy="ask for a token"),
    "min_tokens": Whole(rule="be >= 0", remedy="use 0 for no minimum"),
    "top_k": Whole(low=-1, rule="be >= 0", remedy="0 keeps all, and so does -1"),
    "seed": Whole(rule="lie in [0, 2**63)", remedy="use None for a random one"),
    "n": Whole(
        low=1, high=MAX_SAMPLES, rule=f"lie in [1, {MAX_SAMPLES}]", remedy="send the prompt again"
    ),
    "logprobs": Whole(high=1000, rule="lie in [0, 1000]", remedy="use None to turn it off"),
    "prompt_logprobs": Whole(high=1000, rule="lie in [0, 1000]", remedy="use None to turn it off"),
    "priority": Whole(low=-(2**63), rule="lie in [-2**63, 2**63)", remedy="0 is usual"),
}
NUMBERS = {
    "temperature": Number(
        low=0.0, high=math.inf, rule="be a finite number >= 0", remedy="use 0 for greedy"
    ),
    "top_p": Number(low=5e-324, high=1.0, rule="lie in (0, 1]", remedy="1 is off"),
    "min_p": Number(low=0.0, high=1.0, rule="lie in [0, 1]", remedy="0 is off"),
    "repetition_penalty": Number(
        low=1 / LARGEST_FACTOR,
        high=LARGEST_FACTOR,
        rule="lie in [1e-100, 1e100]",
        remedy="1 is off",
    ),
    "presence_penalty": Number(
        low=-LARGEST, high=LARGEST, rule="lie in [-1e300, 1e300]", remedy="0 is off"
    ),
    "frequency_penalty": Number(
        low=-LARGEST, high=LARGEST, rule="lie in [-1e300, 1e300]", remedy="0 is off"
    ),
}
KINDS = WHOLES | NUMBERS
TOKEN = Whole(low=-(2**63), rule="hold token ids", remedy="encode texts first")
BIAS = Number(low=-LARGEST, high=LARGEST, rule="lie in [-1e300, 1e300]", remedy="use -100 to ban")
# None turns these off, as it does in vLLM; of other fields it means "not set"
OFF: dict[str, Any] = {
    "min_tokens": 0,
    "n": 1,
    "priority": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "stop": (),
    "stop_token_ids": (),
}


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    ``temperature`` 0 is greedy. ``None`` means "not set": end tokens and the sampling defaults of
    a checkpoint's ``generation_config.json`` then apply where it has them.
    Penalties, ``min_p``, ``logit_bias``, ``stop``, ``stop_token_ids``, ``min_tokens`` and ``n``
    have no such default: None turns them off.

    Numbers, lists and mappings of any library are accepted and become plain ones, here and again
    when a prompt is accepted with them, so that what a client changes afterwards changes nothing.
    """

    # None: as many as the model and an empty cache hold after the prompt; room for
    # schedule.expected_tokens is reserved, and more is found as the output grows
    max_tokens: int | None = 16
    min_tokens: int = 0  # no end token or stop string before this many tokens
    temperature: float | None = None  # 0 is greedy; unset: the model's default, else 0
    top_p: float | None = None  # in (0, 1]
    top_k: int | None = None  # 0 and -1 keep all
    min_p: float = 0.0  # keep tokens with p >= min_p * p_max
    seed: int | None = None  # unset: drawn once when the request is accepted
    repetition_penalty: float | None = None  # over prompt and output; 1 is off
    presence_penalty: float = 0.0  # subtracted once for a token the output has
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # strings; the text ends before the first one. Special tokens count, shown or not
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()  # besides the model's own end tokens
    ignore_eos: bool = False  # the model's own end tokens do not end the request
    skip_special_tokens: bool = True  # leave special tokens such as <|im_end|> out of the text
    n: int = 1  # independent samples of the same prompt, at most 128
    logprobs: int | None = None  # report the k most likely tokens of each output position
    prompt_logprobs: int | None = None  # the same for each prompt position but the first
    priority: int = 0  # a lower number is admitted and prefilled first, whatever the policy
    # of the first token, from acceptance: seconds, or text such as 500ms; unset: by slo. One
    # beyond 32 years counts as 32 years
    deadline: Duration | None = None
    # requests share cached prefixes only with requests of the same salt, such as a tenant's name
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        """Make every value plain and bounded, or refuse it by name."""
        for name, off in OFF.items():
            if getattr(self, name) is None:
                setattr(self, name, off)
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, kind.plain(name, value))
        self.top_k = 0 if self.top_k == -1 else self.top_k
        for name in ("ignore_eos", "skip_special_tokens"):
            setattr(self, name, plain_flag(name, getattr(self, name)))
        self.stop = _plain_stops(self.stop)
        self.stop_token_ids = _plain_tokens(self.stop_token_ids)
        self.logit_bias = _plain_biases(self.logit_bias)
        self.deadline = None if self.deadline is None else _plain_deadline(self.deadline)
        if self.cache_salt is not None:
            self.cache_salt = plain_text(
                "cache_salt",
                self.cache_salt,
                limit=MAX_SALT_CHARACTERS,
                remedy="use None to share with all that have none",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal(
                "min_tokens",
                f"lie in [0, max_tokens={self.max_tokens}]",
                self.min_tokens,
                "lower it or raise max_tokens",
            )


def own_params(params: object) -> SamplingParams:
    """A copy of what a client wrote, checked anew: the fields may have been changed since.

    Raises:
        ValueError: if they are no sampling parameters, or hold a value outside its rule.
    """
    try:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"not {SamplingParams.__name__}")
        values = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    except Exception as error:  # a field was deleted, or a class of the client's own
        raise refusal(
            "params", "be a SamplingParams", params, "write SamplingParams(max_tokens=16)"
        ) from error
    return SamplingParams(**values)


def _plain_stops(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    listed = plain_list("stop", texts, limit=MAX_STOPS, of="strings")
    remedy = "drop the empty ones"
    plain = (plain_text("stop", text, limit=MAX_STOP_CHARACTERS, remedy=remedy) for text in listed)
    return tuple(dict.fromkeys(plain))


def _plain_tokens(value: object) -> tuple[int, ...]:
    name = "stop_token_ids"
    listed = plain_list(name, value, limit=MAX_STOP_TOKENS, of="token ids")
    return tuple(dict.fromkeys(TOKEN.plain(name, token) for token in listed))


def _plain_biases(value: object) -> dict[int, float]:
    items = plain_items("logit_bias", value, limit=MAX_BIASES, of="token ids to biases")
    tokens = [TOKEN.plain("logit_bias", token) for token, _ in items]
    biases = [bias for _, bias in items]
    return {
        token: BIAS.plain(f"logit_bias[{token}]", bias)
        for token, bias in zip(tokens, biases, strict=True)
    }


def _plain_deadline(value: object) -> float:
    rule = Number(
        low=5e-324,
        high=math.inf,
        rule="be a positive time",
        remedy="write 30ms, 60s or a number of seconds",
    )
    if isinstance(value, str):
        seconds = parse_duration(value, "deadline")
    else:
        seconds = rule.plain("deadline", value)
    return min(max(seconds, MIN_DEADLINE_S), MAX_DEADLINE_S)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities (natural log) at one position."""

    token_id: int  # the token that stands there
    logprob: float
    rank: int  # 1 is the most likely
    top: tuple[tuple[int, float], ...] = ()  # the k most likely, best first


class Sampled(NamedTuple):
    """The token of one sampled row. ``error`` is set when its logits were not finite."""

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
    groups: list[int] = field(default_factory=list)  # that each of these was cut over
    num_set_back: int = 0  # how often it gave its pages up, to compute all of them again
    num_cached: int = 0  # prompt tokens that the cache held, and that were not computed again
    num_restored: int = 0  # of those, tokens that came from the disk
    differs_at: int | None = None  # first position where a long prompt differs from the nearest
    # cached one, if there is one that goes on there; and both texts from there on
    cache_miss: str | None = None
    finished_s: float | None = None


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """The output of a request.

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
    """The addition of one step to one request, as streams yield it.

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
    sample: int = 0  # which of the request's n
    stop_reason: int | str | None = None  # the end token or stop string that ended it
    # of the whole prompt, once, with its end; None for the first position
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    num_cached: int = 0  # prompt tokens that the cache held


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A client's request, checked and resolved: every sampling default is filled in."""

    request_id: int
    # int64 [num_prompt_tokens], what is prefilled: the prompt, then tokens of the output that are
    # known already, as those of a request that goes on after its engine died
    prompt_ids: np.ndarray
    params: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...]  # the model's own
    arrival_s: float
    priority: int = 0  # a lower number is prefilled first
    deadline_s: float | None = None  # for the first token, after arrival; unset: by the slo config
    sample: int = 0  # which of the n
    num_given: int = 0  # of the ids, those at the end that are output
    is_open: bool = False  # max_tokens was not set: it is what fits, and no end to expect
    # kept, not counted each time: a scheduling decision asks dozens of times
    num_prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False)  # of prompt and output together

    def __post_init__(self) -> None:
        assert self.params.max_tokens is not None, "the intake resolves it"
        num_prompt_tokens = len(self.prompt_ids)
        object.__setattr__(self, "num_prompt_tokens", num_prompt_tokens)
        num_own = num_prompt_tokens - self.num_given
        object.__setattr__(self, "max_tokens", num_own + self.params.max_tokens)

    @property
    def own_prompt_ids(self) -> np.ndarray:
        """The prompt as the client sent it, int64."""
        return self.prompt_ids[: len(self.prompt_ids) - self.num_given]

    @property
    def given_ids(self) -> list[int]:
        """Tokens of the output that are known already."""
        ids: list[int] = self.prompt_ids[len(self.prompt_ids) - self.num_given :].tolist()
        return ids
