"""A user's program with all public names: mypy --strict reads it, and nothing runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mnemosyne import (
    LLM,
    AsyncEngine,
    CacheConfig,
    EngineConfig,
    MeshConfig,
    MetricsConfig,
    Piece,
    RequestOutput,
    SamplingParams,
    ScheduleConfig,
    SloConfig,
)

CONFIG = EngineConfig(
    model="needle",
    schedule=ScheduleConfig(target_tbt=0.05),
    slo=SloConfig(ttft_min=0.5),
    cache=CacheConfig(max_tokens=4096),
    mesh=MeshConfig(kvp=2),
    metrics=MetricsConfig(path="steps.jsonl"),
)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.text for output in outputs if output.error is None]


def offline() -> list[str]:
    params = SamplingParams(max_tokens=4, temperature=0.0, stop=["."])
    with LLM("needle", cache={"max_tokens": "4K"}) as llm:
        whole: str = llm.generate("the river", params)[0].text
        said = llm.chat([{"role": "user", "content": "the river"}], params)
        pieces: list[tuple[int, Piece]] = list(llm.stream(["the river"], params))
        first_s: float | None = said[0].metrics.ttft_s
        assert first_s is None or first_s >= 0
        return [whole, *texts(said), *(piece.text for _, piece in pieces)]


async def online(llm: LLM) -> AsyncIterator[str]:
    async with AsyncEngine(llm.engine) as engine:
        async for piece in engine.submit("the river", SamplingParams(max_tokens=4)):
            yield piece.text


def opened() -> LLM:
    return LLM.from_config(CONFIG)
