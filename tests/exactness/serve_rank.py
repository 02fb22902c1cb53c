"""Script of a user, run on every rank of a mesh, as torchrun starts it on several hosts.

``torchrun ... -m tests.exactness.serve_rank MODEL FOLDER MAX_TOKENS OPTIONS`` writes to the folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mnemosyne import LLM, SamplingParams

PROMPTS = [np.arange(70), np.arange(90, 85, -1)]


def serve(model: Path, max_tokens: int, options: dict[str, Any]) -> list[list[int]]:
    """Tokens for each prompt, as this rank sees them.

    Args:
        model: a directory.
        max_tokens: to generate for each prompt.
        options: of the LLM, beyond those that are always the same.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    with LLM(str(model), dtype="float64", device="cpu", schedule={"chunk": 16}, **options) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, params)]


def main(model: Path, folder: Path, max_tokens: int, options: list[dict[str, Any]]) -> None:
    rank = os.environ["RANK"]
    metrics = {"path": str(folder / f"steps{rank}.jsonl")}
    served = [serve(model, max_tokens, {**each, "metrics": metrics}) for each in options]
    (folder / f"rank{rank}.json").write_text(json.dumps(served))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
