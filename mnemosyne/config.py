"""Config dataclasses, with their units and checks. YAML chooses, this room types.

A field holds what was written and, once checked, what that means; where it may be written as text,
a property of the parsed type is what other rooms read.
"""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any

SIZE_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
DURATION_SUFFIXES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "": 1.0}  # seconds
Duration = float | int | str  # OmegaConf takes no whole number for a float of several types
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # of one element
DTYPES = ("auto", *DTYPE_BYTES)
CPU_KERNELS = ("amx", "avx512", "avx512f", "avx2", "neon")  # sets of instructions they are for
ATTENTION_BACKENDS = ("auto", "reference", "flex", "triton", "cpu", *CPU_KERNELS)
OPERATORS = ("auto", "torch", *CPU_KERNELS)
COMPILE_MODES = ("auto", "none", "step")
FFN_LAYOUTS = ("tp", "wide")
PREFIX_MODES = ("auto", "off")
POLICIES = ("fcfs", "edf", "lrs", "lars", "mlfq")
SPREAD_MODES = ("auto", "off")


def parse_size(value: int | str, name: str = "size") -> int:
    """Read a count such as ``131072``, ``"128K"`` or ``"1.5M"`` (K = 1024, M = 1024**2).

    Args:
        value: an integer, or digits with an optional suffix K, M or G.
        name: what the value is called in the error.

    Raises:
        ValueError: if the value is not a whole, non-negative number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        count = float(value)
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)", str(value).strip().upper())
        count = float(match[1]) * SIZE_SUFFIXES[match[2]] if match else -1.0
    if count < 0 or count != int(count):
        raise ValueError(
            f"{name} must be a whole number with an optional suffix K, M or G, "
            f"got {value!r}; write 131072, 128K or 1M"
        )
    return int(value) if isinstance(value, int) else int(count)


def parse_duration(value: Duration, name: str = "duration") -> float:
    """Read seconds, such as ``0.03``, ``"30ms"``, ``"60s"`` or ``"2min"``.

    Args:
        value: a number of seconds, or digits with a suffix us, ms, s or min.
        name: what the value is called in the error.

    Raises:
        ValueError: if it is not a positive time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(us|ms|s|min|)", str(value).strip())
    seconds = float(match[1]) * DURATION_SUFFIXES[match[2]] if match else -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"{name} must be a positive time, got {value!r}; write 30ms, 60s or a number of seconds"
        )
    return seconds


def check_types(config: Any, section: str = "") -> None:
    """Refuse a field of a dataclass that does not hold what its annotation says.

    Whole and real numbers of any library count as int and float; true and false do not.

    Args:
        config: the dataclass.
        section: what stands before the names of its fields in errors, such as ``"cache."``.

    Raises:
        ValueError: naming the first such field.
    """
    kind: Any = type(config)
    for name, (kinds, words) in _field_kinds(kind).items():
        value = getattr(config, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{section}{name} must be {words}, got {value!r}; see {kind.__name__}")


def check_positive(config: object, names: tuple[str, ...], section: str, usual: str) -> None:
    """Refuse a field that is not a positive finite number.

    Raises:
        ValueError: naming the first such field.
    """
    for name in names:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{section}{name} must be a positive number, got {value}; {usual}")


def check_choice(name: str, value: str, choices: tuple[str, ...], remedy: str) -> None:
    """Refuse a value that is none of some words.

    Raises:
        ValueError: with the words and the remedy.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; {remedy}")


@cache
def _field_kinds(config: type) -> dict[str, tuple[tuple[type, ...], str]]:
    """Of each field: the classes that its value may have, and how to call them."""
    numbers: dict[object, Any] = {int: Integral, float: Real}
    kinds = {}
    for name, kind in typing.get_type_hints(config).items():
        parts = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
        classes = [typing.get_origin(part) or part for part in parts]
        words = " or ".join("None" if c is type(None) else c.__name__ for c in classes)
        kinds[name] = tuple(numbers.get(c, c) for c in classes), words
    return kinds


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Degrees of the device mesh, outermost axis first; their product is the world size."""

    pp: int = 1  # pipeline stages
    kvp: int = 1  # shards of the KV cache
    tp: int = 1  # shards of heads and MLP width
    ffn: str = "tp"  # what shards the MLP: tp, or "wide" for kvp and tp together
    # a file with the key that tells ranks from strangers; several hosts need one
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_types(self, "mesh.")
        for axis in ("pp", "kvp", "tp"):
            degree = getattr(self, axis)
            if degree < 1:
                raise ValueError(f"mesh.{axis} must be >= 1, got {degree}; use 1 to turn it off")
        check_choice(
            "mesh.ffn", self.ffn, FFN_LAYOUTS, "wide shards the MLP over kvp and tp together"
        )

    @property
    def world_size(self) -> int:
        return self.pp * self.kvp * self.tp

    @property
    def ffn_degree(self) -> int:
        """Ranks that share the MLP."""
        return self.kvp * self.tp if self.ffn == "wide" else self.tp


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache of one rank."""

    max_tokens: int | str | None = None  # tokens that fit, e.g. "1M"; unset: by memory_share
    memory_share: float = 0.5  # share of the free memory, used when max_tokens is unset
    page_size: int = 128  # tokens per page
    max_tokens_per_group: int | str | None = None  # of one request; unset: all that a group holds
    prefix: str = "auto"  # auto: requests share the pages of equal beginnings; off: they do not
    dir: str | None = None  # a folder that keeps long prefixes for later starts; unset: none are
    dir_max_bytes: int | str = "16G"  # that its files hold at most

    def __post_init__(self) -> None:
        check_types(self, "cache.")
        check_choice(
            "cache.prefix",
            self.prefix,
            PREFIX_MODES,
            "off computes every prompt from its first token",
        )
        if self.dir is not None and self.prefix == "off":
            raise ValueError(
                f"cache.prefix must be auto where cache.dir is set, got {self.prefix!r}; "
                "what is not shared is not kept either"
            )
        self.dir_max_bytes = parse_size(self.dir_max_bytes, "cache.dir_max_bytes")
        if self.max_tokens is not None:
            self.max_tokens = parse_size(self.max_tokens, "cache.max_tokens")
        if self.max_tokens_per_group is not None:
            name = "cache.max_tokens_per_group"
            self.max_tokens_per_group = parse_size(self.max_tokens_per_group, name)
        if not 0 < self.memory_share < 1:
            raise ValueError(
                f"cache.memory_share must lie in (0, 1), got {self.memory_share}; "
                "0.5 takes half of what is free"
            )
        if self.page_size < 1:
            raise ValueError(f"cache.page_size must be >= 1, got {self.page_size}; 128 is usual")

    @property
    def num_tokens(self) -> int | None:
        """Tokens that were asked for, if any number was."""
        return None if self.max_tokens is None else int(self.max_tokens)

    @property
    def num_tokens_per_group(self) -> int | None:
        """Tokens of one request that a group takes, if any number was asked for."""
        return None if self.max_tokens_per_group is None else int(self.max_tokens_per_group)


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Limits of a step, and the order of prompts."""

    chunk: int | str = "adaptive"  # or a fixed number of prefill tokens per step
    # between tokens of running decodes: a step is cut to it; seconds, or text such as 200ms
    target_tbt: Duration = 0.2
    min_chunk: int = 32  # tokens; what a prefill gets even when decodes alone fill the step
    max_chunk: int = 8192  # tokens
    max_sequences: int = 64  # sequences admitted at a time
    policy: str = "lars"  # who is prefilled next: fcfs, edf, lrs or lars
    long_tokens: int | str = "32K"  # a prefill beyond this context is long: one of them per step
    max_relative_slack: float = 0.4  # share of a step that a long prefill with slack gives up
    spread: str = "auto"  # auto: idle groups help to prefill; off: each prompt stays in its own
    saved_fit: bool = True  # start from the step times that an earlier start measured
    expected_tokens: int | str = "1K"  # of an output whose max_tokens is not set

    def __post_init__(self) -> None:
        check_types(self, "schedule.")
        if self.chunk != "adaptive":
            self.chunk = parse_size(self.chunk, "schedule.chunk (when not 'adaptive')")
            if self.chunk < 1:
                raise ValueError(
                    f"schedule.chunk must be >= 1 or 'adaptive', got {self.chunk}; 512 is usual"
                )
        self.target_tbt = parse_duration(self.target_tbt, "schedule.target_tbt")
        if not 1 <= self.min_chunk <= self.max_chunk:
            raise ValueError(
                "schedule.min_chunk must lie in [1, schedule.max_chunk="
                f"{self.max_chunk}], got {self.min_chunk}; 32 is usual"
            )
        if self.max_sequences < 1:
            raise ValueError(
                f"schedule.max_sequences must be >= 1, got {self.max_sequences}; 64 is usual"
            )
        self._check_policy()

    def _check_policy(self) -> None:
        check_choice("schedule.policy", self.policy, POLICIES, "lars is usual")
        check_choice(
            "schedule.spread", self.spread, SPREAD_MODES, "auto lets idle groups help to prefill"
        )
        self.long_tokens = parse_size(self.long_tokens, "schedule.long_tokens")
        self.expected_tokens = parse_size(self.expected_tokens, "schedule.expected_tokens")
        if self.expected_tokens < 1:
            raise ValueError(
                f"schedule.expected_tokens must be >= 1, got {self.expected_tokens}; 1K is usual"
            )
        if not 0 <= self.max_relative_slack < 1:
            raise ValueError(
                "schedule.max_relative_slack must lie in [0, 1), got "
                f"{self.max_relative_slack}; 0.4 leaves short prompts two fifths of a step"
            )

    @property
    def fixed_chunk(self) -> int | None:
        """Prefill tokens per step; None where the chunk is solved each step."""
        return None if self.chunk == "adaptive" else int(self.chunk)

    @property
    def is_adaptive(self) -> bool:
        return self.fixed_chunk is None

    @property
    def target_tbt_s(self) -> float:
        return float(self.target_tbt)

    @property
    def max_short_tokens(self) -> int:
        """Tokens of the longest prompt that is not long."""
        return int(self.long_tokens)


@dataclass(kw_only=True, slots=True)
class SloConfig:
    """When a first token is due, for requests that do not say so themselves."""

    ttft_scale: float = 2.0  # times the predicted prefill time of the prompt, alone
    ttft_min: Duration = 1.0  # seconds, or text such as 30s; no deadline is shorter

    def __post_init__(self) -> None:
        check_types(self, "slo.")
        self.ttft_min = parse_duration(self.ttft_min, "slo.ttft_min")
        if not 0 < self.ttft_scale < float("inf"):
            raise ValueError(
                f"slo.ttft_scale must be a positive number, got {self.ttft_scale}; 1 to 10 is usual"
            )

    @property
    def ttft_min_s(self) -> float:
        return float(self.ttft_min)

    @property
    def max_wait_s(self) -> float:
        """Seconds that a prompt may wait, however long it is, and then be prefilled in time.

        After a wait of ``t`` a prefill of ``w`` meets ``max(ttft_min, ttft_scale * w)`` for every
        ``w`` if it does for the one that is due at both.
        """
        return self.ttft_min_s * max(0.0, 1 - 1 / self.ttft_scale)


@dataclass(kw_only=True, slots=True)
class MetricsConfig:
    """Where step records and traces go."""

    path: str | None = None  # JSONL, one line per step; unset: none is written
    trace: str | None = None  # JSON for Chrome or Perfetto: what each rank did when; unset: none

    def __post_init__(self) -> None:
        check_types(self, "metrics.")


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """All that an engine is built from."""

    model: str  # a Hugging Face directory, an id in the hub's cache, "smollm2", "needle" or "bench"
    dtype: str = "auto"  # auto: as the checkpoint says
    device: str = "auto"  # auto: cuda where there is one, else cpu
    attention: str = "auto"  # or reference, flex, triton, cpu, one of CPU_KERNELS
    operators: str = "auto"  # what computes all else: torch, one of CPU_KERNELS
    compile: str = "auto"  # none; step: all but attention; auto: record decodes on CPU
    mesh: MeshConfig = field(default_factory=MeshConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("dtype", self.dtype, DTYPES, "auto takes that of the checkpoint")
        if self.attention not in ATTENTION_BACKENDS:
            raise ValueError(
                f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, "
                f"got {self.attention!r}; auto takes the usual one of the device"
            )
        check_choice(
            "operators", self.operators, OPERATORS, "auto takes the usual ones of the device"
        )
        check_choice("compile", self.compile, COMPILE_MODES, "step compiles all but attention")
