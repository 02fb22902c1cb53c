"""Loglikelihoods as lm-eval asks a server for them; runs in an interpreter that has it.

Usage: python in_lm_eval.py URL TOKENIZER < PAIRS
Reads pairs of texts as JSON, and prints [loglikelihood, is_greedy] of each.
"""

from __future__ import annotations

import json
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def main(url: str, tokenizer: str) -> None:
    """Read contexts and continuations, print what lm-eval finds."""
    model = LocalCompletionsAPI(
        model="any",
        base_url=f"{url}/v1/completions",
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        num_concurrent=4,
    )
    pairs = json.load(sys.stdin)
    asked = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
    print(json.dumps(model.loglikelihood(asked)))


if __name__ == "__main__":
    main(*sys.argv[1:])
