"""Chunks cut into slices over the groups give what one process gives, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mnemosyne import LLM, SamplingParams
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.metrics import StepRecord
from mnemosyne.request import RequestOutput
from mnemosyne.runtime.worker import Worker
from tests.engines import add, drain, greedy, pages_used, random_prompts
from tests.model_zoo.tiny import VOCAB_SIZE, tiny_checkpoint
from tests.ranks import run_ranks
from tests.schedule.clocked import Rates
from tests.slices import Cut, SlicedExecutor, even, single, steep, tail

PROMPTS = random_prompts((5, 33, 97, 130), seed=3)
MAX_TOKENS = 6
ALL = SamplingParams(
    max_tokens=MAX_TOKENS, temperature=0.0, logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE
)
CUTS = {"even": even, "steep": steep, "single": single, "tail": tail}
CHUNK = 40
BROKEN = 0  # a token whose embedding is nan where broken requests are tried
# in slices of helping groups and of homes; the last one breaks the home's slice behind it as well
BROKEN_AT = (3, CHUNK - 2, CHUNK + 5, 2 * CHUNK - 1, CHUNK + 7)
NEVER = {BROKEN: -100.0}  # what a request samples is its next input: none may sample the token


def _open(path: Path, mesh: dict[str, Any], *, chunk: int = CHUNK, prefix: str = "off") -> LLM:
    """An engine whose layers keep all keys: those that forget are on one group."""
    # step times of a clock, so that nothing depends on how fast this machine is
    with mock.patch.object(PageKinds, "of", lambda windows, page_size: PageKinds(page_size)):
        return LLM(
            str(path),
            dtype="float64",
            device="cpu",
            schedule={"chunk": chunk},
            cache={"max_tokens": 2048, "page_size": 16, "prefix": prefix},
            mesh=mesh,
            predictor=Rates(pair_s=1e-6),
        )


def _values(outputs: list[RequestOutput]) -> list[Any]:
    """Tokens, and all log-probabilities of prompt and output, ``[positions, V]``."""
    found = []
    for output in outputs:
        entries = [*(output.prompt_logprobs or [])[1:], *(output.logprobs or [])]
        rows = [[value for _, value in sorted(entry.top)] for entry in entries]
        found.append((output.error, output.token_ids, np.array(rows)))
    return found


def _dismissing(after: int) -> Cut:
    """Even slices of so many chunks, then none."""
    count = 0

    def cut(num_tokens: int, num_lanes: int) -> list[int] | None:
        nonlocal count
        count += 1
        return even(num_tokens, num_lanes) if count <= after else None

    return cut


def _run(llm: LLM, prompts: list[np.ndarray], params: SamplingParams) -> list[RequestOutput]:
    outputs = [add(llm.engine, prompt, params) for prompt in prompts]
    drain(llm.engine)
    return outputs


def _serve(cases: list[tuple[dict[str, Any], Path]]) -> dict[str, Any]:
    """Outputs by mesh, checkpoint and cut, on rank 0."""
    found: dict[str, Any] = {}
    for mesh, path in cases:
        with _open(path, mesh) as llm:
            if not llm.is_driver:
                llm.follow()
                continue
            sliced = SlicedExecutor(llm.engine, mesh["kvp"])
            for name, cut in CUTS.items():
                sliced.cut = cut
                found[f"{mesh} {path.name} {name}"] = _values(_run(llm, PROMPTS, ALL))
            for after in range(3):
                sliced.cut = _dismissing(after)
                values = _values(_run(llm, PROMPTS[3:], ALL))
                found[f"{mesh} {path.name} dismissed {after}"] = values
            assert sliced.num_slices > 40
            found[f"{mesh} {path.name} cancelled"] = _cancel_at_any_step(llm, sliced)
    return found


def _cancel_at_any_step(llm: LLM, sliced: SlicedExecutor) -> list[Any]:
    """A prompt beside others that are cancelled in each of their steps."""
    sliced.cut, engine = steep, llm.engine
    for num_steps in range(5):
        victim = add(engine, PROMPTS[3], greedy(MAX_TOKENS))
        for _ in range(num_steps):
            engine.step()
        engine.cancel(victim.request_id)
    values = _values(_run(llm, PROMPTS[2:3], ALL))
    engine.step()
    _run(llm, PROMPTS[:1], ALL)  # tells the ranks what was released
    assert pages_used(engine) == 0
    return values


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("slices")
    return [
        tiny_checkpoint(root / "llama", num_layers=2),
        tiny_checkpoint(root / "qwen3", family="qwen3", num_layers=3, window=24),
    ]


@pytest.fixture(scope="module")
def expected(paths: list[Path]) -> dict[str, list[Any]]:
    found = {}
    for path in paths:
        with _open(path, {}) as llm:
            found[path.name] = _values(_run(llm, PROMPTS, ALL))
    return found


@pytest.mark.parametrize(
    "meshes",
    [
        [{"kvp": 2}, {"kvp": 2, "ffn": "wide"}],
        [{"kvp": 4}, {"pp": 2, "kvp": 2}, {"kvp": 2, "tp": 2}],
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_slices_give_the_tokens_and_logits_of_one_process(meshes, paths, expected):
    num_ranks = int(np.prod([meshes[0].get(axis, 1) for axis in ("pp", "kvp", "tp")]))
    # each mesh takes long: the checkpoint without windows is for the first one alone
    cases = [(meshes[0], paths[0])] if num_ranks == 2 else []
    cases += [(mesh, paths[1]) for mesh in meshes]

    found = run_ranks(_serve, num_ranks, cases, timeout_s=280)[0]

    assert len(found) == len(cases) * (len(CUTS) + 4)
    for case, values in found.items():
        (name,) = (path.name for path in paths if f" {path.name} " in case)
        wanted = expected[name][3:] if "dismissed" in case else expected[name]
        wanted = wanted[2:3] if "cancelled" in case else wanted
        for (error, ids, mine), (_, want, theirs) in zip(values, wanted, strict=True):
            assert (error, ids) == (None, want), case
            assert mine.shape == theirs.shape
            assert np.abs(mine - theirs).max() < 1e-10, case


def _break(path: Path) -> tuple[list[str | None], bool]:
    """How broken requests end that had copies, and whether any page of this rank keeps a nan."""
    with _open(path, {"kvp": 2}) as llm:
        worker = _worker(llm)
        worker._model.embed.weight[BROKEN] = torch.nan
        reasons = []
        if llm.is_driver:
            sliced = SlicedExecutor(llm.engine, 2)
            sliced.cut = even
            params = greedy(2, logit_bias=NEVER)
            whole = np.where(PROMPTS[3] == BROKEN, 1, PROMPTS[3])
            for position in BROKEN_AT:
                (output,) = _run(llm, [np.insert(whole, position, BROKEN)], params)
                reasons.append(output.finish_reason)
            sliced.cut = None
            _run(llm, [whole[:1]], params)  # tells the ranks what was released
        else:
            llm.follow()
        slots = worker.pool.padding_slot
        pools = (*worker.pool.k, *worker.pool.v)
        return reasons, all(bool(pool[:, :slots].isfinite().all()) for pool in pools)


def _worker(llm: LLM) -> Worker:
    return (llm._session.follower or llm._session._driver)._rank.worker


def test_a_nan_beyond_the_window_is_cleared_wherever_it_was_handed(tmp_path):
    path = tiny_checkpoint(tmp_path / "windowed", family="mistral", window=8)

    by_rank = run_ranks(_break, 2, path)

    assert by_rank == [(["length"] * len(BROKEN_AT), True), ([], True)]


LONG_PROMPTS = random_prompts((700, 20, 530), seed=5)
LOGPROBS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=VOCAB_SIZE)


def _serve_long(
    path: Path, meshes: list[dict[str, Any]]
) -> list[tuple[list[Any], list[StepRecord], list[list[int]]]]:
    """Outputs, records and groups of each chunk on each mesh, as the scheduler cuts them."""
    found = []
    for mesh in meshes:
        with _open(path, mesh, chunk=300, prefix="auto") as llm:
            if not llm.is_driver:
                llm.follow()
                continue
            records: list[StepRecord] = []
            llm.engine.on_step = records.append
            outputs = [output for p in LONG_PROMPTS for output in _run(llm, [p], LOGPROBS)]
            outputs += _run(llm, LONG_PROMPTS, LOGPROBS)  # cached now but for their ends
            assert pages_used(llm.engine) == 0
            groups = [output.metrics.groups for output in outputs]
            assert all(sum(o.metrics.chunks) for o in outputs[:3])
            found.append((_values(outputs), records, groups))
    return found


def test_idle_groups_help_to_prefill_and_the_tokens_are_those_of_one_process(paths):
    with _open(paths[1], {}, chunk=300) as llm:
        expected = _values(_run(llm, LONG_PROMPTS, LOGPROBS)) * 2
    meshes = [{"kvp": 2}, {"kvp": 2, "ffn": "wide"}]

    by_mesh, _ = run_ranks(_serve_long, 2, paths[1], meshes)

    for values, records, groups in by_mesh:
        assert groups[:3] == [[2, 2, 2], [1], [2, 2]]
        first, _, last, after = records[:4]
        assert set(first.groups) == {0, 1}
        assert first.pages_lent == -(-700 // 16)
        assert first.num_handed == 300  # each slice to the other group
        assert last.num_handed < 100  # the home alone takes those of a prompt that ends
        assert after.pages_lent == after.num_handed == 0
        for (error, ids, mine), (_, want, theirs) in zip(values, expected, strict=True):
            assert (error, ids) == (None, want)
            assert np.abs(mine - theirs).max() < 1e-10
