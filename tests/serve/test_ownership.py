"""One user of an engine at a time: threads one after another, a fork and a rival by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.llm import LLM
from mnemosyne.metrics import StepRecord
from mnemosyne.request import RequestOutput
from mnemosyne.serve.ownership import Claim, Ownership
from tests.engines import WrappedExecutor, greedy, open_tiny, pages_used, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint

PROMPTS = random_prompts((20, 33, 8, 12))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ownership") / "tiny")


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint) as llm:
        yield llm


def test_threads_that_generate_together_get_their_own_tokens(llm: LLM) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(8))]

    def call(index: int) -> list[int]:
        (output,) = llm.generate([PROMPTS[index % 4]], greedy(8))
        assert output.finish_reason == "length"
        return output.token_ids

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(24)))

    assert found == [expected[index % 4] for index in range(24)]
    assert pages_used(llm.engine) == 0


def test_a_stream_may_be_read_by_several_threads_and_keeps_others_out(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[0], greedy(5))[0].token_ids
    pieces = llm.stream(PROMPTS[0], greedy(5))

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        found = [first.submit(next, pieces).result()]
        with pytest.raises(ValueError, match=r"LLM\.generate must .* LLM\.stream uses; exhaust"):
            second.submit(llm.generate, PROMPTS[1], greedy(2)).result()
        found.append(second.submit(next, pieces).result())
        found += first.submit(list, pieces).result()

    assert [token for _, piece in found for token in piece.token_ids] == expected


def test_a_stream_that_was_dropped_gives_the_engine_back(llm: LLM) -> None:
    pieces = llm.stream(PROMPTS, greedy(5))
    next(pieces)
    del pieces

    assert llm.generate(PROMPTS[0], greedy(2))[0].finish_reason == "length"


def test_generating_inside_a_callback_is_refused_and_not_awaited(llm: LLM) -> None:
    said: list[str] = []

    def again(record: StepRecord) -> None:
        try:
            llm.generate(PROMPTS[1], greedy(2))
        except ValueError as error:
            said.append(str(error))

    llm.engine.on_step = again
    (output,) = llm.generate(PROMPTS[0], greedy(2))

    assert output.finish_reason == "length"
    assert said[0].startswith("LLM.generate must have an engine that nobody uses, got one that LLM")


def test_requests_added_by_hand_are_not_mixed_with_a_call(llm: LLM) -> None:
    llm.engine.add(PROMPTS[0], greedy(2))

    with pytest.raises(
        ValueError, match=r"LLM\.generate must have an idle engine, got one with req"
    ):
        llm.generate(PROMPTS[1], greedy(2))


def test_an_engine_in_a_step_refuses_other_threads(llm: LLM) -> None:
    is_stepping, may_go_on = threading.Event(), threading.Event()

    def hold(plan: object) -> None:
        is_stepping.set()
        assert may_go_on.wait(30)

    WrappedExecutor(llm.engine, before=hold)
    llm.engine.add(PROMPTS[0], greedy(1))
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(llm.engine.step)
        assert is_stepping.wait(30)
        for use in (
            llm.engine.step,
            lambda: llm.engine.add(PROMPTS[1], greedy(1)),
            lambda: llm.generate(PROMPTS[1], greedy(1)),
        ):
            with pytest.raises(ValueError, match="must have an idle engine, got one in a step; ca"):
                use()
        may_go_on.set()
        step.result()


def test_closing_waits_for_a_call_of_another_thread(checkpoint: Path) -> None:
    llm = open_tiny(checkpoint)
    started = threading.Event()
    llm.engine.on_step = lambda record: started.set()

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, PROMPTS, greedy(40))
        assert started.wait(30)
        llm.close()

    outputs: list[RequestOutput] = call.result()
    assert [output.finish_reason for output in outputs] == ["length"] * 4
    with pytest.raises(ValueError, match="LLM must be open"):
        llm.generate(PROMPTS, greedy(2))


def test_a_claim_that_may_not_wait_is_refused_at_once() -> None:
    ownership = Ownership()
    with ThreadPoolExecutor(1) as pool, _claim(ownership):
        refused = pool.submit(lambda: _enter(ownership, waits=False)).exception()
    assert str(refused).startswith("LLM.stream must have an engine that nobody uses, got one that")

    _enter(ownership, waits=False)


def _claim(ownership: Ownership) -> AbstractContextManager[Claim]:
    return ownership.claim("LLM.generate", ends_alone=True, remedy="wait")


def _enter(ownership: Ownership, *, waits: bool) -> None:
    with ownership.claim("LLM.stream", ends_alone=False, remedy="close it", waits=waits):
        pass


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 says so
@pytest.mark.parametrize("what", ["generate", "stream", "add", "step"])
def test_a_fork_is_told_what_to_do(llm: LLM, what: str) -> None:
    expected = llm.generate(PROMPTS[0], greedy(4))[0].token_ids
    uses: dict[str, Callable[[], Any]] = {
        "generate": lambda: llm.generate(PROMPTS[0], greedy(4)),
        "stream": lambda: next(llm.stream(PROMPTS[0], greedy(4))),
        "add": lambda: llm.engine.add(PROMPTS[0], greedy(4)),
        "step": llm.engine.step,
    }
    read_end, write_end = os.pipe()

    child = os.fork()
    if child == 0:
        try:
            uses[what]()
        except ValueError as error:
            os.write(write_end, str(error).encode())
        llm.close()  # does nothing there
        os._exit(0)

    os.close(write_end)
    assert _ends(child), "the fork hangs"
    said = os.read(read_end, 1000).decode()
    os.close(read_end)
    assert said.startswith("LLM must be used in the process that made it")
    assert "spawn" in said
    assert llm.generate(PROMPTS[0], greedy(4))[0].token_ids == expected


def _ends(child: int, within_s: float = 30) -> bool:
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
