"""The generation defaults of a checkpoint: end tokens and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mnemosyne.files import printable, read_object, shown
from mnemosyne.request import SamplingParams

MAX_ID = 2**31  # of tokens; more than any vocabulary
MAX_RATIO = 1e6  # of a temperature or a penalty


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
        """Read generation_config.json; config.json may name end tokens as well.

        As transformers does, temperature counts only where ``do_sample`` is true; without it the
        default is greedy.

        Args:
            path: a Hugging Face directory; either file may be missing.

        Raises:
            ValueError: if a file is no JSON object or holds a value outside its range.
        """
        file = Path(path) / "generation_config.json"
        generation, config = read_object(file), read_object(Path(path) / "config.json")
        # fine-tunes often change one file and leave the other: any of their tokens ends a text
        ends = _token_ids(file, generation.get("eos_token_id"))
        ends += _token_ids(Path(path) / "config.json", config.get("eos_token_id"))
        do_sample = generation.get("do_sample") or False
        if not isinstance(do_sample, bool):
            raise _error(file, "do_sample", "be true or false", do_sample)
        temperature = _number(file, generation, "temperature", 1.0, MAX_RATIO)
        top_k = _number(file, generation, "top_k", 0, MAX_ID)
        if top_k != int(top_k):
            raise _error(file, "top_k", "be a whole number", top_k)
        top_p = _number(file, generation, "top_p", 1.0, 1)
        penalty = _number(file, generation, "repetition_penalty", 1.0, MAX_RATIO)
        for name, value in (("top_p", top_p), ("repetition_penalty", penalty)):
            if value == 0:
                raise _error(file, name, "be above 0", value)
        return cls(
            end_token_ids=tuple(dict.fromkeys(ends)),
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


def _token_ids(file: Path, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_ID for i in ids):
        raise _error(file, "eos_token_id", "be a token id or a list of them", value)
    return tuple(ids)


def _number(
    file: Path, entries: Mapping[str, Any], name: str, default: float, high: float
) -> float:
    """A number in [0, high]; ``default`` for absent and null."""
    value = entries.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= high:
        raise _error(file, name, f"be a number in [0, {high}]", value)
    return float(value)


def _error(file: Path, name: str, rule: str, value: object) -> ValueError:
    return ValueError(
        f"{name} in {printable(file)} must {rule}, got {shown(value)}; correct the file"
    )
