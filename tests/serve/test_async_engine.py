"""The engine behind an event loop: streams side by side, leaving early, refusals, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mnemosyne.llm import LLM
from mnemosyne.request import Piece, SamplingParams
from mnemosyne.schedule.plan import Plan
from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.serve.prompts import PromptIds, PromptReader
from tests.engines import WrappedExecutor, greedy, open_tiny, pages_used, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint

T = TypeVar("T")
PROMPTS = random_prompts((20, 33, 8))
FOREVER = greedy(900)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("async") / "tiny")


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint, max_tokens=4096) as llm:
        yield llm


def run(coroutine: Awaitable[T], timeout_s: float = 60) -> T:
    """Run to the end; a deadlock is an error, and so is a thread that stays."""

    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, timeout_s)

    result = asyncio.run(bounded())
    assert not [t for t in threading.enumerate() if t.name == "mnemosyne-engine"]
    return result


async def collect(engine: AsyncEngine, prompt: Any, params: SamplingParams) -> list[Piece]:
    return [piece async for piece in engine.submit(prompt, params)]


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def test_streams_interleave_and_bring_the_tokens_of_lone_runs(llm: LLM) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(30))]
    arrivals: list[int] = []

    async def follow(engine: AsyncEngine, index: int) -> list[Piece]:
        pieces = []
        async for piece in engine.submit(PROMPTS[index], greedy(30)):
            arrivals.append(index)
            pieces.append(piece)
        return pieces

    async def main() -> list[list[Piece]]:
        async with AsyncEngine(llm.engine) as engine:
            return await asyncio.gather(*(follow(engine, index) for index in range(3)))

    streams = run(main())

    assert [tokens_of(pieces) for pieces in streams] == expected
    assert [pieces[-1].finish_reason for pieces in streams] == ["length"] * 3
    first_end = min(len(arrivals) - arrivals[::-1].index(i) for i in range(3))
    assert set(arrivals[:first_end]) == {0, 1, 2}, "each began before any ended"


def test_samples_of_one_prompt_share_a_stream(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=1, n=3)

    async def main() -> list[Piece]:
        async with AsyncEngine(llm.engine) as engine:
            return await collect(engine, PROMPTS[0], params)

    pieces = run(main())

    by_request: dict[int | None, list[Piece]] = {}
    for piece in pieces:
        by_request.setdefault(piece.request_id, []).append(piece)
    expected = [sample.token_ids for sample in llm.generate(PROMPTS[0], params)[0].samples]
    assert [tokens_of(own) for own in by_request.values()] == expected


def test_breaking_out_of_the_loop_frees_the_pages(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[1], greedy(40))[0].token_ids

    async def leave_early(engine: AsyncEngine) -> None:
        async for piece in engine.submit(PROMPTS[0], FOREVER):
            if piece.token_ids:
                break

    async def main() -> list[Piece]:
        async with AsyncEngine(llm.engine) as engine:
            await leave_early(engine)
            pieces = await collect(engine, PROMPTS[1], greedy(40))
            await until(lambda: pages_used(llm.engine) == 0)
            return pieces

    assert tokens_of(run(main())) == expected


def test_cancelling_the_task_frees_the_pages(llm: LLM) -> None:
    async def main() -> int:
        async with AsyncEngine(llm.engine) as engine:
            task = asyncio.create_task(collect(engine, PROMPTS[0], FOREVER))
            await until(lambda: pages_used(llm.engine) > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: pages_used(llm.engine) == 0)
            return len(tokens_of(await collect(engine, PROMPTS[2], greedy(3))))

    assert run(main()) == 3


def test_a_task_cancelled_before_its_prompt_is_accepted_leaves_no_request(llm: LLM) -> None:
    is_stepping, may_go_on = threading.Event(), threading.Event()

    def hold(plan: Plan) -> None:
        if plan.index == 2:
            is_stepping.set()
            assert may_go_on.wait(30)

    WrappedExecutor(llm.engine, before=hold)
    added: list[int] = []
    add = llm.engine.add
    llm.engine.add = lambda *given: added.append(1) or add(*given)  # type: ignore[method-assign]

    async def main() -> None:
        async with AsyncEngine(llm.engine) as engine:
            first = asyncio.create_task(collect(engine, PROMPTS[0], greedy(20)))
            await until(is_stepping.is_set)
            second = asyncio.create_task(collect(engine, PROMPTS[1], FOREVER))
            await until(lambda: bool(engine._calls))  # it waits to be accepted
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            may_go_on.set()
            await first
            await until(lambda: not llm.engine.has_work)

    run(main())

    assert len(added) == 2, "it was accepted, and then dropped"


def test_a_request_cancelled_by_id_ends_its_stream(llm: LLM) -> None:
    async def main() -> list[Piece]:
        pieces = []
        async with AsyncEngine(llm.engine) as engine:
            async for piece in engine.submit(PROMPTS[0], FOREVER):
                pieces.append(piece)
                if len(pieces) == 5:
                    engine.cancel(piece.request_id)
                    engine.cancel(999)
            assert pages_used(llm.engine) == 0
        engine.cancel(piece.request_id)  # nothing to do any more
        return pieces

    pieces = run(main())

    assert pieces[-1].finish_reason == "cancelled"
    assert len(pieces) < 100


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "at least one token"),
        ([-1], r"got -1"),
        ("text", "token ids for"),
        ([5] * 2000, "1024"),
    ],
)
def test_a_refused_prompt_raises_in_its_submitter_only(llm: LLM, prompt: Any, said: str) -> None:
    expected = llm.generate(PROMPTS[0], greedy(20))[0].token_ids

    async def main() -> list[Piece]:
        async with AsyncEngine(llm.engine) as engine:
            other = asyncio.create_task(collect(engine, PROMPTS[0], greedy(20)))
            with pytest.raises(ValueError, match=said):
                await collect(engine, prompt, greedy(2))
            return await other

    assert tokens_of(run(main())) == expected


def test_nonsense_raises_in_its_submitter_only(llm: LLM) -> None:
    async def main() -> int:
        async with AsyncEngine(llm.engine) as engine:
            with pytest.raises(ValueError, match="params must be a SamplingParams, got None"):
                await collect(engine, PROMPTS[0], None)  # type: ignore[arg-type]
            return len(tokens_of(await collect(engine, PROMPTS[0], greedy(3))))

    assert run(main()) == 3


def test_a_failed_executor_ends_every_stream_with_an_error(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(plan: Plan) -> None:
        if plan.index == 9:
            raise MemoryError("no room for the step")

    WrappedExecutor(llm.engine, before=fail)

    async def main() -> list[list[Piece]]:
        async with AsyncEngine(llm.engine) as engine:
            streams = await asyncio.gather(*(collect(engine, p, FOREVER) for p in PROMPTS))
            with pytest.raises(RuntimeError, match="the engine failed: no room for the step"):
                await collect(engine, PROMPTS[0], greedy(3))
        async with engine:  # a new start
            assert len(tokens_of(await collect(engine, PROMPTS[0], greedy(3)))) == 3
        return streams

    streams = run(main())

    for pieces in streams:
        assert pieces[-1].finish_reason == "error"
        assert pieces[-1].error == "the engine failed: no room for the step"
    assert [record.message for record in caplog.records] == [
        "the engine failed; all its requests end"
    ]
    assert pages_used(llm.engine) == 0


def test_leaving_the_engine_ends_running_streams(llm: LLM) -> None:
    async def main() -> list[Piece]:
        async with AsyncEngine(llm.engine) as engine:
            task = asyncio.create_task(collect(engine, PROMPTS[0], FOREVER))
            await until(lambda: pages_used(llm.engine) > 0)
        return await task

    pieces = run(main())

    assert pieces[-1].finish_reason == "cancelled"
    assert not llm.engine.has_work
    assert pages_used(llm.engine) == 0


def test_submitting_outside_the_engine_is_refused(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncEngine(llm.engine)
        with pytest.raises(RuntimeError, match="submit inside `async with AsyncEngine`"):
            await collect(engine, PROMPTS[0], greedy(3))
        async with engine:
            pass
        with pytest.raises(RuntimeError, match="submit inside `async with AsyncEngine`"):
            await collect(engine, PROMPTS[0], greedy(3))

    run(main())


def test_an_error_in_the_body_still_stops_the_engine(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm.engine) as engine:
            task = asyncio.create_task(collect(engine, PROMPTS[0], FOREVER))
            await until(lambda: pages_used(llm.engine) > 0)
            try:
                raise LookupError("in the body")
            finally:
                task.cancel()

    with pytest.raises(LookupError):
        run(main())

    assert not llm.engine.has_work


def test_many_submitters_that_come_and_go_leave_nothing(llm: LLM) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(10))]

    async def come_and_go(engine: AsyncEngine, index: int) -> list[int] | None:
        await asyncio.sleep(0.002 * (index % 7))
        if index % 3:
            return tokens_of(await collect(engine, PROMPTS[index % 3], greedy(10)))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(collect(engine, PROMPTS[0], FOREVER), 0.005 * (index % 5))
        return None

    async def main() -> list[list[int] | None]:
        async with AsyncEngine(llm.engine) as engine:
            found = await asyncio.gather(*(come_and_go(engine, index) for index in range(24)))
            await until(lambda: not llm.engine.has_work)
            assert not engine._streams
            return found

    found = run(main())

    assert found == [expected[i % 3] if i % 3 else None for i in range(24)]
    assert pages_used(llm.engine) == 0


def test_prompts_are_read_in_other_threads_than_the_one_that_steps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    read = PromptReader.read

    def note(reader: PromptReader, prompt: Any) -> Any:
        if not isinstance(prompt, PromptIds):
            readers.append(threading.current_thread().name)
        return read(reader, prompt)

    monkeypatch.setattr(PromptReader, "read", note)

    async def main() -> None:
        async with AsyncEngine(llm.engine) as engine:
            await asyncio.gather(*(collect(engine, prompt, greedy(2)) for prompt in PROMPTS))

    run(main())

    assert len(readers) == 3
    assert all(name.startswith("mnemosyne-prompts") for name in readers)
    left = [t for t in threading.enumerate() if t.name.startswith("mnemosyne-prompts")]
    for thread in left:  # nobody waits for them when an engine is left
        thread.join(60)
    assert not [thread for thread in left if thread.is_alive()]


def test_what_a_reader_misses_comes_as_one_piece(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[0], greedy(200))[0].token_ids

    async def main() -> list[Piece]:
        pieces = []
        async with AsyncEngine(llm.engine) as engine:
            async for piece in engine.submit(PROMPTS[0], greedy(200)):
                pieces.append(piece)
                if len(pieces) == 1:
                    await until(lambda: not llm.engine.has_work)
        return pieces

    pieces = run(main())

    assert len(pieces) <= 3
    assert tokens_of(pieces) == expected
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].prefilled == len(PROMPTS[0])


def test_other_users_are_refused_by_name_while_it_runs(llm: LLM) -> None:
    async def main() -> list[Piece]:
        async with AsyncEngine(llm.engine) as engine:
            task = asyncio.create_task(collect(engine, PROMPTS[0], greedy(60)))
            said = r"must have an engine that nobody uses, got one that AsyncEngine uses; leave"
            for use in (
                lambda: llm.generate(PROMPTS[1], greedy(2)),
                lambda: next(llm.stream(PROMPTS[1], greedy(2))),
                lambda: llm.engine.add(PROMPTS[1], greedy(2)),
                llm.engine.step,
                lambda: llm.engine.cancel(0),
                lambda: llm.engine.abort("cancelled"),
            ):
                with pytest.raises(ValueError, match=said):
                    await asyncio.to_thread(lambda use=use: list(use() or ()))
            with pytest.raises(ValueError, match=said):
                await AsyncEngine(llm.engine).__aenter__()
            with pytest.raises(ValueError, match="must be entered once at a time"):
                await engine.__aenter__()
            return await task

    expected = llm.generate(PROMPTS[0], greedy(60))[0].token_ids
    assert tokens_of(run(main())) == expected
    assert llm.generate(PROMPTS[0], greedy(60))[0].token_ids == expected


def test_an_engine_that_is_used_is_not_entered(llm: LLM) -> None:
    async def enter() -> None:
        async with AsyncEngine(llm.engine):
            pass

    pieces = llm.stream(PROMPTS, greedy(5))
    next(pieces)
    with pytest.raises(ValueError, match=r"AsyncEngine must .* one that LLM\.stream uses; exhaust"):
        run(enter())
    pieces.close()
    llm.engine.add(PROMPTS[0], greedy(5))
    with pytest.raises(ValueError, match="AsyncEngine must have an idle engine, got one with req"):
        run(enter())
    llm.engine.abort("cancelled")
    run(enter())


def test_closing_the_llm_ends_the_streams_with_its_name(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[Piece]:
        llm = open_tiny(checkpoint, max_tokens=4096)
        engine = llm.engine
        async with AsyncEngine(engine) as served:
            task = asyncio.create_task(collect(served, PROMPTS[0], FOREVER))
            await until(lambda: pages_used(engine) > 0)
            await asyncio.to_thread(llm.close)
            return await task

    pieces = run(main())

    assert pieces[-1].finish_reason == "error"
    assert "AsyncEngine must have an open LLM, got one that was closed" in str(pieces[-1].error)


def test_another_event_loop_is_refused(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm.engine) as engine:

            def elsewhere() -> None:
                asyncio.run(collect(engine, PROMPTS[0], greedy(2)))

            with pytest.raises(ValueError, match="must be awaited on the event loop that entered"):
                await asyncio.to_thread(elsewhere)

    run(main())


def test_parameters_changed_after_submitting_change_nothing(llm: LLM) -> None:
    async def main() -> list[Piece]:
        params = greedy(30)
        async with AsyncEngine(llm.engine) as engine:
            task = asyncio.create_task(collect(engine, PROMPTS[0], params))
            await asyncio.sleep(0)
            params.max_tokens = "many"  # type: ignore[assignment]
            return await task

    assert len(tokens_of(run(main()))) == 30


def test_pieces_tell_their_sample_what_ended_it_and_once_the_logprobs_of_the_prompt(
    llm: LLM,
) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=3, prompt_logprobs=2)
    expected = llm.generate(PROMPTS[0], params)[0].samples
    ends = SamplingParams(max_tokens=6, stop_token_ids=range(96))

    async def main() -> tuple[list[Piece], list[Piece]]:
        async with AsyncEngine(llm.engine) as engine:
            samples = await collect(engine, PROMPTS[0], params)
            return samples, await collect(engine, PROMPTS[1], ends)

    samples, ended = run(main())

    for sample, output in enumerate(expected):
        own = [piece for piece in samples if piece.sample == sample]
        assert tokens_of(own) == output.token_ids
        told = [piece.prompt_logprobs for piece in own if piece.prompt_logprobs is not None]
        assert told == [tuple(output.prompt_logprobs or ())]
    assert ended[-1].stop_reason == ended[-1].token_ids[-1]
    assert ended[-1].finish_reason == "stop"
