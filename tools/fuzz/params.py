"""The door of the library: prompts and sampling parameters, beside a neighbour in the same call."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from mnemosyne import LLM, SamplingParams
from mnemosyne.model_zoo.needle import write_needle
from tools.fuzz import values
from tools.fuzz.door import Door

NEIGHBOUR, CONTROL = [5, 6, 7], [170, 171]
VOCABULARY = 300  # ids are drawn below it: some are beyond that of the model
MAX_TOKENS = 1024  # of the cache: max_tokens=None fills it, well within the time of an input
FIELDS = [field.name for field in fields(SamplingParams)]


@contextmanager
def params_door() -> Iterator[Door]:
    """Prompts and parameters for ``LLM.generate``, with a small model."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            str(write_needle(Path(folder) / "needle")),
            device="cpu",
            schedule={"chunk": 64},
            cache={"max_tokens": MAX_TOKENS},
        ) as llm,
    ):
        library = _Library(llm)
        yield Door(name="params", draw=draw, feed=library.feed, control=library.control)


def draw(rng: random.Random) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A prompt, the parameters it comes with, and what the client changes in them afterwards."""
    given = {
        name: _meant(rng, name) if rng.random() < 0.9 else values.odd(rng)
        for name in rng.sample(FIELDS, rng.choice([0, 1, 1, 2, 3, 5]))
    }
    prompt = _prompt(rng) if rng.random() < 0.8 else values.odd(rng)
    changed = {rng.choice(FIELDS): values.odd(rng)} if rng.random() < 0.05 else {}
    return prompt, given, changed


class _Library:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._plain = SamplingParams(max_tokens=3, temperature=0.0)
        self._expected = [o.token_ids for o in llm.generate([NEIGHBOUR, CONTROL], self._plain)]

    def feed(self, given: tuple[Any, dict[str, Any], dict[str, Any]]) -> bool:
        prompt, written, changed = given
        try:
            params = SamplingParams(**{"max_tokens": 3} | written)
        except ValueError:
            return False
        for name, value in changed.items():
            setattr(params, name, value)
        outputs = self._llm.generate([NEIGHBOUR, prompt], [self._plain, params])
        assert outputs[0].token_ids == self._expected[0], "the neighbour has other tokens"
        if outputs[1].error is not None:
            assert "\n" not in outputs[1].error[:60], "a refusal is a sentence"
        return outputs[1].error is None

    def control(self) -> None:
        (output,) = self._llm.generate([CONTROL], self._plain)
        assert output.token_ids == self._expected[1], "the control has other tokens"


def _meant(rng: random.Random, name: str) -> Any:
    """A value that is right for a field, or nearly."""
    if name in ("max_tokens", "min_tokens", "n"):
        return values.whole(rng, 0 if name == "min_tokens" else 1, 4)
    if name in ("logprobs", "prompt_logprobs", "top_k", "seed"):
        return values.whole(rng, 0, 400)
    if name == "priority":
        return values.whole(rng, -3, 3)
    if name in ("temperature", "repetition_penalty"):
        return values.real(rng, 0.1, 2)
    if name in ("top_p", "min_p"):
        return values.real(rng, 0.01, 1)
    if name in ("presence_penalty", "frequency_penalty"):
        return rng.choice([values.real(rng, -2, 2), rng.choice(values.REALS)])
    if name == "stop":
        return values.listed(rng, rng.sample(["a", "the", "\n", "é"], rng.randint(0, 3)))
    if name == "stop_token_ids":
        return values.listed(rng, _ids(rng, 3))
    if name == "logit_bias":
        return values.mapped(rng, {i: values.real(rng, -100, 100) for i in _ids(rng, 3)})
    if name == "deadline":
        return rng.choice([values.real(rng, 0.01, 100), "500ms", 1e306, 1e-9])
    return rng.choice([True, False])


def _ids(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, most))]


def _prompt(rng: random.Random) -> Any:
    ids = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 5, 70, 200]))]
    text = " ".join(rng.sample(["the", "river", "was", "Monday", "Tuesday", "é", "\n"], 4))
    kinds = [ids, text, values.listed(rng, ids), {"prompt": text}, {"prompt_token_ids": ids}]
    kinds += [{"input_ids": values.listed(rng, ids), "attention_mask": [1] * len(ids)}]
    return rng.choice(kinds)
