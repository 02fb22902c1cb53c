"""Serve one model on several ranks; every rank gets the same outputs.

torchrun --standalone --nproc-per-node 2 examples/mesh.py [MODEL]
"""

import os
import sys

from mnemosyne import LLM, SamplingParams


def main(model: str = "smollm2") -> None:
    # pp, kvp and tp multiply to the number of ranks; kvp alone holds for any model
    mesh = {"kvp": int(os.environ["WORLD_SIZE"])}
    with LLM(model, mesh=mesh) as llm:
        (output,) = llm.generate("The river was", SamplingParams(max_tokens=24))
        if llm.is_driver:
            print(repr(output.text), f"on {mesh['kvp']} groups")


if __name__ == "__main__":
    main(*sys.argv[1:])
