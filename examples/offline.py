"""Complete a list of prompts together, each with its own way to sample.

python examples/offline.py [MODEL]
"""

import sys

from mnemosyne import LLM, SamplingParams

PROMPTS = ["In the morning", "The river was"]
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=1),
    SamplingParams(max_tokens=24, temperature=0.0, stop="."),
]


def main(model: str = "smollm2") -> None:
    with LLM(model) as llm:
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, PARAMS), strict=True):
            if output.error:  # a prompt that cannot be served does not end the others
                print(f"{prompt!r} was refused: {output.error}")
            else:
                print(f"{prompt!r} -> {output.text!r} ({output.finish_reason})")


if __name__ == "__main__":
    main(*sys.argv[1:])
