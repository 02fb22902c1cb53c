"""What a checkpoint says about generation: end tokens and sampling defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from mnemosyne.request import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """Stands in for the sampling parameters that a request leaves unset."""

    end_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def from_dir(cls, path: Path | str) -> GenerationDefaults:
        """Read generation_config.json; end tokens may also stand in config.json.

        As transformers does, temperature counts only where ``do_sample`` is true; without it the
        default is greedy.

        Args:
            path: a Hugging Face directory; either file may be missing.

        Raises:
            ValueError: if a file is no JSON object or holds a value outside its range.
        """
        file = Path(path) / "generation_config.json"
        generation, config = read_object(file), read_object(Path(path) / "config.json")
        ends, source = generation.get("eos_token_id"), file
        if ends is None:
            ends, source = config.get("eos_token_id"), Path(path) / "config.json"
        do_sample = generation.get("do_sample") or False
        if not isinstance(do_sample, bool):
            raise _error(file, "do_sample", "be true or false", do_sample)
        temperature = _number(file, generation, "temperature", 1.0, 0, inf)
        top_k = _number(file, generation, "top_k", 0, 0, inf)
        if top_k != int(top_k):
            raise _error(file, "top_k", "be a whole number", top_k)
        top_p = _number(file, generation, "top_p", 1.0, 0, 1)
        penalty = _number(file, generation, "repetition_penalty", 1.0, 0, inf)
        for name, value in (("top_p", top_p), ("repetition_penalty", penalty)):
            if value == 0:
                raise _error(file, name, "be above 0", value)
        return cls(
            end_token_ids=_token_ids(source, ends),
            temperature=temperature if do_sample else 0.0,
            top_p=top_p,
            top_k=int(top_k),
            repetition_penalty=penalty,
        )

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """A copy of the parameters in which every unset sampling value is filled in.

        The seed stays as it is: it is drawn where the request is accepted.
        """
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        unset = {name: getattr(self, name) for name in names if getattr(params, name) is None}
        return replace(params, **unset)


def read_object(file: Path) -> dict[str, Any]:
    """The entries of a JSON file; none if there is no such file.

    Raises:
        ValueError: if the file holds anything but a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be valid JSON, got an error: {error}; replace it") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} must hold a JSON object, got {entries!r:.40}; replace it")
    return entries


def _token_ids(file: Path, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise _error(file, "eos_token_id", "be a token id or a list of them", value)
    return tuple(ids)


def _number(
    file: Path, entries: Mapping[str, Any], name: str, default: float, low: float, high: float
) -> float:
    """A number in [low, high]; ``default`` for absent and null."""
    value = entries.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise _error(file, name, f"be a number in [{low}, {high}]", value)
    if value == inf:
        raise _error(file, name, "be finite", value)
    return float(value)


def _error(file: Path, name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{name} in {file} must {rule}, got {value!r}; correct the file")
