"""Read a long text, show how far the model is, then print its answer as it comes.

python examples/streaming.py FILE QUESTION [MODEL]
"""

import sys
from pathlib import Path

from mnemosyne import LLM, SamplingParams


def main(path: str, question: str, model: str = "smollm2") -> None:
    prompt = f"{Path(path).read_text(encoding='utf-8')}\n\n{question}\n"
    with LLM(model) as llm:
        for _, piece in llm.stream(prompt, SamplingParams(max_tokens=64)):
            if piece.error:
                print(f"refused: {piece.error}", file=sys.stderr)
            elif not piece.token_ids and piece.num_prompt_tokens:
                share = piece.prefilled / piece.num_prompt_tokens
                print(f"\r{share:4.0%} of the prompt is read", end="", file=sys.stderr)
            print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
