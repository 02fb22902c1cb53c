"""The outcome of each prompt, as text for people and as JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import TextIO

from mnemosyne.request import RequestOutput


@dataclass(kw_only=True, slots=True)
class Answer:
    """One prompt: its samples, or why it was refused."""

    number: int  # counted from 1, as people do
    samples: list[RequestOutput] = field(default_factory=list)
    refusal: str | None = None

    @property
    def errors(self) -> list[str]:
        errors = [self.refusal, *(sample.error for sample in self.samples)]
        return [f"prompt {self.number}: {error}" for error in errors if error is not None]

    @property
    def is_finished(self) -> bool:
        reasons = {sample.finish_reason for sample in self.samples}
        return bool(reasons) and reasons <= {"stop", "length"}


def print_answers(answers: Sequence[Answer], *, has_text: bool) -> None:
    """Print every sample in the order of the prompts, labelled where there are several.

    Args:
        answers: of all prompts, in order.
        has_text: whether the model has a tokenizer; token ids are printed if not.
    """
    is_labelled = len(answers) > 1 or any(len(answer.samples) > 1 for answer in answers)
    for answer in answers:
        for index, sample in enumerate(answer.samples, start=1):
            if sample.finish_reason == "cancelled" and not sample.token_ids:
                continue  # Ctrl-C came before its first token
            label = f"{answer.number}.{index}" if len(answer.samples) > 1 else f"{answer.number}"
            text = sample.text if has_text else " ".join(map(str, sample.token_ids))
            print(f"[{label}] {text}" if is_labelled else text)


def summary(answers: Sequence[Answer], seconds: float, error: Mapping[int, float]) -> str:
    """One line: requests finished, tokens, speed, lateness, and the quality of predictions.

    Args:
        answers: of all prompts.
        seconds: that serving them took.
        error: percentiles of the relative error of predicted step times, nan if there are none.
    """
    samples = [sample for answer in answers for sample in answer.samples]
    num_finished = sum(answer.is_finished for answer in answers)
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    firsts_s = [s.metrics.ttft_s for s in samples if s.metrics.ttft_s is not None]
    first = f", the first after {min(firsts_s):.2f} s" if firsts_s else ""
    num_missed = sum(sample.metrics.missed_deadline is True for sample in samples)
    missed = f", {num_missed} after their deadlines" if num_missed else ""
    foreseen = (
        ""
        if isnan(error[50])
        else f"; step times foreseen within {error[50]:.1%} (median), {error[95]:.0%} (p95)"
    )
    return (
        f"{num_finished} of {len(answers)} prompts finished: "
        f"{num_tokens} tokens in {seconds:.2f} s{first}{missed}{foreseen}"
    )


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO | None]:
    """Open the file of JSON lines before the work starts, so that a bad path costs nothing.

    Raises:
        ValueError: if it cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        raise ValueError(
            f"output must be a file that can be written, got {path!r} ({error.strerror}); "
            "name one in an existing directory"
        ) from error
    with file:
        yield file


def write_answers(answers: Sequence[Answer], file: TextIO) -> None:
    """Write one line per sample, and one per refused prompt."""
    for answer in answers:
        if answer.refusal is not None:
            line = {"prompt": answer.number, "finish_reason": "error", "error": answer.refusal}
            file.write(json.dumps(line) + "\n")
        for index, sample in enumerate(answer.samples, start=1):
            line = {
                "prompt": answer.number,
                "sample": index,
                "text": sample.text,
                "token_ids": sample.token_ids,
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop_reason,
                "error": sample.error,
                "num_prompt_tokens": len(sample.prompt_token_ids),
                "logprobs": sample.logprobs and [asdict(entry) for entry in sample.logprobs],
                "prompt_logprobs": sample.prompt_logprobs
                and [entry and asdict(entry) for entry in sample.prompt_logprobs],
                "metrics": asdict(sample.metrics),
            }
            file.write(json.dumps(line) + "\n")
