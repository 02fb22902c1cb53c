"""Plans: what they count is what the engine allocates, what they promise is what a run does."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnemosyne import cli
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cli.shapes import find_shape
from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import PlanConfig
from mnemosyne.joining.simulated import build_simulation, stages_of
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.simulate.footprint import activation_bytes, footprint
from mnemosyne.simulate.outlook import Outlook
from mnemosyne.simulate.planner import (
    Rank,
    Verdict,
    _why_behind,
    frontier,
    judge,
    layouts,
    plan_layouts,
    remedies,
)
from mnemosyne.simulate.workload import Arrival
from tests.engines import PAGE_SIZE, add, greedy, model_of, open_tiny, pool_of, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint
from tests.simulate.machines import ROUND, simulate_config


def _plan_config(*words: str) -> PlanConfig:
    config = cli.config_of("plan", "model=llama3_8b", *words)
    assert isinstance(config, PlanConfig)
    return config


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operators made and that are still held; and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {_storage(part)._cdata for part in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for part in _tensors(made):
            storage = _storage(part)
            key = storage._cdata
            if key not in given and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.live)
        return made

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen2", {"num_layers": 3, "tied": True}), ("qwen3", {"head_dim": 16})],
)
def test_planned_bytes_are_those_that_the_engine_allocates(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    chunk, num_pages, mesh = 256, 128, MeshConfig()
    path = tiny_checkpoint(tmp_path / family, family=family, mlp_width=192, **options)
    shape = read_spec(path)
    stages = stages_of(shape, mesh)
    planned = footprint(
        shape,
        ROUND,
        mesh,
        stages,
        max_rows=chunk,
        max_sampled=1,
        kinds=PageKinds(PAGE_SIZE),
        memory_share=0.5,
    )
    planned = replace(planned, num_pages=num_pages)

    with open_tiny(path, chunk=chunk, max_tokens=num_pages * PAGE_SIZE) as llm:
        weights = sum(parameter.nbytes for parameter in model_of(llm).parameters())
        pool = pool_of(llm)
        cache = sum(part.nbytes for part in (*pool.k, *pool.v))
        output = add(llm.engine, random_prompts([900])[0], greedy(2))
        llm.engine.step()
        with LiveBytes() as step:
            llm.engine.step()

    assert output.metrics.chunks == [chunk, chunk]
    assert planned.weights == weights
    assert planned.kv_bytes == cache
    assert planned.activations == pytest.approx(step.peak, rel=0.03)


def test_the_layouts_fill_the_gpus_and_none_is_missing() -> None:
    meshes = list(layouts(8))

    degrees = {(m.pp, m.kvp, m.tp) for m in meshes}
    assert all(8 % m.world_size == 0 for m in meshes)
    assert len(degrees) == sum(
        8 % (pp * kvp * tp) == 0
        for pp in (1, 2, 4, 8)
        for kvp in (1, 2, 4, 8)
        for tp in (1, 2, 4, 8)
    )
    assert {m.ffn for m in meshes if m.kvp == 1} == {"tp"}


def test_the_best_layout_meets_the_targets_and_the_others_say_why_not() -> None:
    config = _plan_config("gpus=16", "context=256K")
    verdicts = plan_layouts(config, find_shape("llama3_8b"), stages_of)

    best, *others = verdicts
    assert best.rank is Rank.FITS
    assert best.reason == ""
    assert best.tbt_s is not None
    assert best.tbt_s <= 0.03
    assert best.ttft_s is not None
    assert best.ttft_s <= 60
    assert all(verdict.reason for verdict in others)
    assert best.goodput == max(verdict.goodput for verdict in verdicts)


@pytest.mark.parametrize(
    ("goodput", "ttft_s", "why"),
    [
        (1.5, 1.0, "75% of its goodput"),
        (2.0, 4.0, "larger TTFT"),
        (2.0, 3.0, "more ranks for the same"),
    ],
)
def test_a_layout_is_behind_by_goodput_then_by_ttft_then_by_its_ranks(
    goodput: float, ttft_s: float, why: str
) -> None:
    best = Verdict(MeshConfig(tp=2), 2, Rank.FITS, goodput=2.0, ttft_s=3.0)
    other = Verdict(MeshConfig(tp=4), 1, Rank.FITS, goodput=goodput, ttft_s=ttft_s)

    assert _why_behind(other, best) == why


@pytest.mark.parametrize(
    ("mesh", "context", "within"),
    [
        (MeshConfig(tp=8), 2**17, 0.1),
        (MeshConfig(pp=2, tp=4), 2**17, 0.1),
        (MeshConfig(kvp=2, tp=4), 2**17, 0.1),
        (MeshConfig(pp=4, tp=4), 2**13, 0.2),  # half of its time fills the pipeline
    ],
)
def test_what_a_plan_predicts_is_what_a_run_gives(
    mesh: MeshConfig, context: int, within: float
) -> None:
    shape = find_shape("llama3_8b")
    words = [f"mesh.{axis}={getattr(mesh, axis)}" for axis in ("pp", "kvp", "tp")]
    config = simulate_config(*words, "schedule.policy=fcfs", model="llama3_8b")
    config.cache.max_tokens_per_group = context // mesh.kvp if mesh.kvp > 1 else None
    simulation = build_simulation(config, shape)
    outlook = Outlook(simulation.cluster.cost, context=context)

    beside, alone = simulation.run([Arrival(0.0, 64, 4000), Arrival(1.0, context - 256, 16)])

    gaps = beside.metrics.tbt_s
    budget = config.schedule.target_tbt
    assert alone.metrics.ttft_s == pytest.approx(outlook.ttft_s(1, budget), rel=within)
    assert sorted(gaps)[len(gaps) * 99 // 100] <= 1.1 * budget


def test_a_plan_that_fits_nowhere_comes_with_changes_after_which_it_does() -> None:
    config, shape = _plan_config("gpus=4", "context=1M"), find_shape("llama3_8b")
    verdicts = plan_layouts(config, shape, stages_of)

    changes = remedies(config, shape, stages_of, verdicts)

    assert verdicts[0].rank is not Rank.FITS
    assert {change.key for change in changes} >= {"gpus", "context"}
    assert [change.factor for change in changes] == sorted(change.factor for change in changes)
    for change in changes:
        name, whole = change.key.rpartition(".")[2], config
        if change.key.startswith("slo."):
            slo = replace(config.slo, **{name: change.value * 1.001})
            whole = replace(config, slo=slo)
        else:
            whole = replace(config, **{name: int(change.value)})
        assert plan_layouts(whole, shape, stages_of)[0].rank is Rank.FITS, change
    (longest,) = (int(change.value) for change in changes if change.key == "context")
    longer = replace(config, context=longest * 17 // 16 + 1024)
    assert plan_layouts(longer, shape, stages_of)[0].rank is not Rank.FITS


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["gpus=2", "context=64K", "slo.ttft=100s", "efficiency.step_overhead=3"], 2_000),
        (["gpus=2", "context=64K", "slo.ttft=1ms"], 10_000),
        (["gpus=2", "context=64K", "slo.tbt=1us"], 2_000),
    ],
)
def test_targets_that_nothing_meets_are_given_up_after_few_steps(
    words: list[str], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shape = _plan_config(*words), find_shape("llama3_8b")
    steps: list[int] = []
    judge_pass = Outlook._pass

    def counted(self: Outlook, decodes: int, start: int, chunk: int) -> Any:
        steps.append(chunk)
        return judge_pass(self, decodes, start, chunk)

    monkeypatch.setattr(Outlook, "_pass", counted)

    verdicts = plan_layouts(config, shape, stages_of)
    remedies(config, shape, stages_of, verdicts)

    assert verdicts[0].rank is Rank.TOO_SLOW
    assert len(steps) < most


@pytest.mark.parametrize("words", [("slo.ttft=8s",), ("slo.ttft=2s",), ("slo.tbt=8ms",)])
def test_a_rank_alone_is_that_of_the_whole_verdict(words: tuple[str, ...]) -> None:
    config, shape = _plan_config("gpus=8", "context=128K", *words), find_shape("llama3_8b")

    for mesh in layouts(8):
        whole = judge(config, shape, mesh, stages_of)
        assert judge(config, shape, mesh, stages_of, only_rank=True).rank is whole.rank


def test_a_larger_budget_never_takes_longer() -> None:
    config, shape = _plan_config("gpus=8", "context=128K"), find_shape("llama3_8b")
    best = plan_layouts(config, shape, stages_of)[0]

    points = frontier(config, shape, best, stages_of)

    ttfts = [ttft for _, ttft in points]
    assert ttfts == sorted(ttfts, reverse=True)


def test_where_no_decode_fits_the_budgets_are_those_of_one() -> None:
    config, shape = _plan_config("gpus=8", "context=128K"), find_shape("llama3_8b")
    best = plan_layouts(config, shape, stages_of)[0]

    none, one, two = (replace(best, decodes=number) for number in (0, 1, 2))

    assert frontier(config, shape, none, stages_of) == frontier(config, shape, one, stages_of)
    assert frontier(config, shape, none, stages_of) != frontier(config, shape, two, stages_of)


def test_more_activations_for_more_rows_and_logits_for_many_samples() -> None:
    shape, mesh = find_shape("llama3_8b"), MeshConfig()

    assert activation_bytes(shape, mesh, num_rows=64) == 64 * 3 * (4096 + 14336) * 2
    assert activation_bytes(shape, mesh, num_rows=64, num_sampled=64) == 64 * 128256 * 4


def test_the_command_prints_a_table_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["gpus=4", "context=64K", f"report={report}", f"plot={plot}"]

    status = cli.main(["plan", "model=llama3_8b", *words])

    printed = capsys.readouterr().out
    told = json.loads(report.read_text())
    assert status == cli.OK
    assert "131,072 bytes of KV per token" in printed
    assert "best: mesh.pp=" in printed
    assert told["layouts"][0]["rank"] == "fits"
    assert len(told["layouts"]) == len(list(layouts(4)))
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=llama3_8b", "gpus=1", "context=800K", "slo.ttft=5min"], "got none: the nearest"),
        (["model=llama3_9b"], "got 'llama3_9b'; did you mean llama3_8b?"),
        (["model=bench", "hardware=b20"], "did you mean b200, or a key hardware.NAME=...?"),
        (["model=bench", "slo.tbt=0ms"], "slo.tbt must be a positive time, got '0ms'"),
        (["model=bench", "slo.ttft=soon"], "slo.ttft must be a positive time, got 'soon'"),
        (["model=bench", "gpus=0"], "gpus must be a positive number, got 0"),
        (["model=bench", "gpu=8"], "did you mean gpus?"),
        (["model=bench", "decodes=0"], "decodes must lie in [1, 4096] or be null, got 0"),
        (["model=bench", "decodes=1000000000"], "decodes must lie in [1, 4096] or be null"),
        (["model=bench", "gpus=1000000000"], "gpus must be at most 4096, got 1000000000"),
        (["model=bench", "memory_share=1"], "memory_share must lie in (0, 1), got 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["plan", *words])

    error = capsys.readouterr().err.splitlines()[-1]
    assert status == cli.FAILED
    assert error.startswith("error: ")
    assert said in error
    if "nearest, " in said:
        assert "the smallest change that fits is " in error
