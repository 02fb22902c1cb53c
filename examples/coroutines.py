"""Serve coroutines: many requests on one engine, one of which is given up early.

python examples/coroutines.py [MODEL]
"""

import asyncio
import sys

from mnemosyne import LLM, AsyncEngine, SamplingParams


async def complete(engine: AsyncEngine, prompt: str) -> str:
    pieces = engine.submit(prompt, SamplingParams(max_tokens=24))
    return "".join([piece.text async for piece in pieces])


async def first_words(engine: AsyncEngine, prompt: str, num_pieces: int) -> str:
    text = ""
    async for piece in engine.submit(prompt, SamplingParams(max_tokens=1000)):
        text += piece.text
        num_pieces -= bool(piece.text)
        if num_pieces <= 0:
            break  # leaving the loop cancels the request and frees its cache
    return text


async def serve(llm: LLM) -> None:
    async with AsyncEngine(llm.engine) as engine:
        answers = await asyncio.gather(
            complete(engine, "The river was"),
            complete(engine, "In the morning"),
            first_words(engine, "Once upon a time", 4),
        )
    for answer in answers:
        print(repr(answer))


def main(model: str = "smollm2") -> None:
    with LLM(model) as llm:
        asyncio.run(serve(llm))


if __name__ == "__main__":
    main(*sys.argv[1:])
