"""Requests of a simulation: drawn from a mix of lengths, read from a trace, written as one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from mnemosyne.cache.layout import pages_for
from mnemosyne.config_simulate import WorkloadConfig
from mnemosyne.request import Request, SamplingParams

Z_P90 = 1.2815515655446004  # the 90th percentile of the standard normal distribution
HASHED_TOKENS = 512  # of a prompt that each of its hashes stands for
MOST_HASHES = 2**30  # they are the tokens of prompts, which are hashed as int32
MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
RESULTS = ("ttft_s", "tpot_s", "tbt_p99_s", "finish_reason")  # a line of results may be replayed


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a workload: arrival, lengths, urgency; times in seconds."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    deadline_s: float | None = None  # for the first token, after arrival; unset: by the slo
    # each stands for 512 tokens of the prompt, the last one for the rest; none: nothing is known
    hash_ids: tuple[int, ...] = ()

    def request(self, request_id: int) -> Request:
        """The request that engine and scheduler see.

        Its prompt takes no memory, however long, if nothing is known of its tokens; else equal
        hashes give equal tokens.
        """
        ids = np.broadcast_to(np.int64(0), (self.prompt_tokens,))
        if self.hash_ids:
            hashes = np.array(self.hash_ids, dtype=np.int64)
            ids = np.repeat(hashes, HASHED_TOKENS)[: self.prompt_tokens]
        return Request(
            request_id=request_id,
            prompt_ids=ids,
            params=SamplingParams(max_tokens=self.output_tokens, temperature=0.0, ignore_eos=True),
            seed=0,
            end_token_ids=(),
            arrival_s=self.arrival_s,
            priority=self.priority,
            deadline_s=self.deadline_s,
        )


def draw(config: WorkloadConfig) -> list[Arrival]:
    """Poisson arrivals; short prompts and outputs are log-normal, long prompts log-uniform.

    Args:
        config: rate, quantiles and the share of long prompts. The same seed gives the same
            requests whatever the rate, arriving closer together or further apart.
    """
    rng = np.random.default_rng(config.seed)
    count = config.num_requests
    gaps = rng.exponential(1.0, count) / config.rate
    prompts = _log_normal(rng, config.prompt_median, config.prompt_p90, count)
    outputs = _log_normal(rng, config.output_median, config.output_p90, count)
    low, high = np.log(config.long_range)
    longs = np.rint(np.exp(rng.uniform(low, high, count))).astype(np.int64)
    is_long = rng.random(count) < config.long_share
    lengths = np.where(is_long, longs, prompts)
    return [
        Arrival(float(arrival_s), int(prompt), int(output))
        for arrival_s, prompt, output in zip(np.cumsum(gaps), lengths, outputs, strict=True)
    ]


def _log_normal(rng: np.random.Generator, median: int, p90: int, count: int) -> np.ndarray:
    """Whole numbers >= 1 of the log-normal distribution with these quantiles."""
    sigma = np.log(p90 / median) / Z_P90
    return np.maximum(1, np.rint(median * np.exp(sigma * rng.standard_normal(count)))).astype(
        np.int64
    )


def read_trace(path: str | Path) -> list[Arrival]:
    """Requests of a JSONL file, in order of arrival.

    A line is an object with ``arrival_s``, ``prompt_tokens`` and ``output_tokens``, and may have
    ``priority``, ``deadline_s`` and ``hash_ids``; what a simulation writes besides is skipped. Or
    it is one of a Mooncake trace: ``timestamp`` in milliseconds, ``input_length``,
    ``output_length`` and ``hash_ids``.

    Source: traces of Qin et al. 2024, arXiv:2407.00079.

    Raises:
        ValueError: naming file, line and field, where a line does not hold a request; if the file
            cannot be read or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise ValueError(
            f"workload.trace must be a readable JSONL file, got {str(path)!r} ({reason}); "
            "check the path"
        ) from error
    arrivals = [
        _arrival(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not arrivals:
        raise ValueError(f"{path} must hold at least one request, got none; write one per line")
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def write_trace(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line.

    Raises:
        ValueError: if the file cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise ValueError(
            f"output must be a file that can be written, got {str(path)!r} ({error.strerror}); "
            "name one in an existing directory"
        ) from error


def as_row(arrival: Arrival) -> dict[str, Any]:
    """A request as a line of a trace."""
    return asdict(arrival)


def _arrival(line: str, place: str) -> Arrival:
    """Read one line; ``place`` is its file and number."""
    try:
        entries = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place} must be a JSON object, got {line[:60]!r} ({error.msg})"
        ) from error
    if not isinstance(entries, dict):
        raise ValueError(f"{place} must be a JSON object, got {line[:60]!r}; write one per line")
    known = [entry.name for entry in fields(Arrival)]
    if "timestamp" in entries:
        known = list(MOONCAKE)
    for name in entries:
        if name not in known and name not in RESULTS:
            close = get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "drop it"
            raise ValueError(
                f"{place}: field must be one of {', '.join(known)}, got {name!r}; {remedy}"
            )
    if "timestamp" in entries:
        num_tokens = _whole(entries, "input_length", place, least=1)
        return Arrival(
            arrival_s=_number(entries, "timestamp", place, least=0.0) / 1000,
            prompt_tokens=num_tokens,
            output_tokens=_whole(entries, "output_length", place, least=1),
            hash_ids=_hashes(entries, num_tokens, place),
        )
    return Arrival(
        arrival_s=_number(entries, "arrival_s", place, least=0.0),
        prompt_tokens=_whole(entries, "prompt_tokens", place, least=1),
        output_tokens=_whole(entries, "output_tokens", place, least=1),
        priority=_whole(entries, "priority", place, least=0, default=0),
        deadline_s=None
        if entries.get("deadline_s") is None
        else _number(entries, "deadline_s", place, least=1e-9),
        hash_ids=_hashes(entries, entries["prompt_tokens"], place),
    )


def _hashes(entries: dict[str, Any], num_tokens: int, place: str) -> tuple[int, ...]:
    found = entries.get("hash_ids", [])
    is_plain = isinstance(found, list) and all(type(each) is int for each in found)
    if not is_plain or not all(0 <= each < MOST_HASHES for each in found):
        raise ValueError(
            f"{place}: hash_ids must be a list of whole numbers in [0, 2**30), "
            f"got {str(found)[:60]}; number the hashes from 0"
        )
    if found and len(found) != pages_for(num_tokens, HASHED_TOKENS):
        raise ValueError(
            f"{place}: hash_ids must hold one for each {HASHED_TOKENS} of {num_tokens} tokens, "
            f"got {len(found)}; leave them out if they are not known"
        )
    return tuple(found)


def _number(entries: dict[str, Any], name: str, place: str, *, least: float) -> float:
    value = entries.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= float(value) < float("inf"):  # type: ignore[arg-type]
        raise ValueError(
            f"{place}: {name} must be a number of seconds >= {least:g}, got {value!r}; correct it"
        )
    return float(value)  # type: ignore[arg-type]


def _whole(
    entries: dict[str, Any], name: str, place: str, *, least: int, default: int | None = None
) -> int:
    value = entries.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{place}: {name} must be a whole number >= {least}, got {value!r}; correct it"
        )
    return value
