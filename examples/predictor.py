"""Bring a predictor of step times: here, rates that are known beforehand.

python examples/predictor.py [MODEL]

A chunk is as large as its predicted step time allows, so the predictor decides how long prompts are
cut. One that raises, or returns nonsense, is logged and replaced by the project's own.
"""

import sys

from mnemosyne import LLM, SamplingParams
from mnemosyne.schedule.work import StepWork


class Rates:
    """Seconds of a step from fixed rates; an error of at most a few percent would be good."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []  # predicted, measured

    def predict(self, work: StepWork) -> float:
        """Return seconds; must not fall when the work grows."""
        return 1e-3 + 20e-6 * work.num_tokens + 1e-9 * (work.prefill_pairs + work.decode_keys)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Take note of a measured step: a predictor that learns would learn here."""
        self.steps.append((self.predict(work), seconds))


def main(model: str = "smollm2") -> None:
    rates = Rates()
    with LLM(model, predictor=rates, schedule={"target_tbt": 0.02}) as llm:
        (output,) = llm.generate("The river was " * 200, SamplingParams(max_tokens=8))
    print("chunks of the prompt:", *output.metrics.chunks)
    for predicted, measured in rates.steps[:4]:
        print(f"predicted {1e3 * predicted:6.2f} ms, took {1e3 * measured:6.2f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
