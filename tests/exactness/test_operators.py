"""Whatever computes, the tokens are the same in float64, and no worse than torch's otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemosyne.config import CacheConfig, EngineConfig, ScheduleConfig
from mnemosyne.joining.compute import Wraps
from mnemosyne.joining.rank import build_rank
from mnemosyne.joining.real import build_engine
from mnemosyne.kernels.cpu import attention, linear, rows
from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from mnemosyne.operators import Operators
from mnemosyne.runtime.step import Model
from tests.attention.cases import assert_no_worse_than_eager
from tests.engines import add, drain, greedy, open_tiny, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint
from tests.operators.counted import Counted

PROMPTS = random_prompts((1, 33, 41))
NATIVE = [each.name for each in INSTRUCTION_SETS if each.why_not() is None]


class Recording:
    """A model that keeps the logits it gave.

    Args:
        inner: computes.
        is_rounded: whether its weights are rounded to bfloat16 first.
    """

    def __init__(self, inner: Any, is_rounded: bool) -> None:
        self.inner = inner
        self.found: list[Tensor] = []
        for parameter in inner.parameters() if is_rounded else ():
            parameter.copy_(parameter.bfloat16())

    def __call__(self, *arguments: Any) -> Tensor:
        return self.inner(*arguments)

    def logits(self, hidden_BE: Tensor) -> Tensor:
        self.found.append(self.inner.logits(hidden_BE))
        return self.found[-1]


def config(path: Path, **choices: Any) -> EngineConfig:
    return EngineConfig(
        model=str(path),
        device="cpu",
        schedule=ScheduleConfig(chunk=16),
        cache=CacheConfig(max_tokens=2048, page_size=16),
        compile="none",
        **choices,
    )


def serve(chosen: EngineConfig, wraps: Wraps, **params: Any) -> list[list[int]]:
    """Tokens of every prompt."""
    engine = build_engine(build_rank(chosen, wraps=wraps), chosen)
    outputs = [add(engine, prompt, greedy(**params)) for prompt in PROMPTS]
    drain(engine)
    assert all(output.error is None for output in outputs)
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of multiples of 32, as native sets take them."""
    path = tmp_path_factory.mktemp("operators") / "wide"
    return tiny_checkpoint(path, family="qwen3", head_dim=32, mlp_width=64)


@pytest.mark.parametrize("attention", ["reference", "cpu", "flex"])
def test_torch_gives_the_same_float64_tokens_with_every_backend(wide: Path, attention: str) -> None:
    with open_tiny(wide) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(6))]

    with open_tiny(wide, attention=attention, operators="torch") as llm:
        outputs = llm.generate(PROMPTS, greedy(6))

    assert [output.token_ids for output in outputs] == expected


def logits_of(chosen: EngineConfig, *, is_rounded: bool = False) -> Tensor:
    """Logits of all positions of all prompts but their last ones, and of the next."""
    models: list[Recording] = []

    def record(model: Model) -> Model:
        models.append(Recording(model, is_rounded))
        return models[0]

    serve(chosen, Wraps(model=record), max_tokens=1, prompt_logprobs=1)
    return torch.cat(models[0].found)


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_set_with_plain_attention_is_no_worse_than_torch(wide: Path, name: str) -> None:
    half = {"dtype": "bfloat16", "attention": "reference"}

    actual = logits_of(config(wide, operators=name, **half))
    eager = logits_of(config(wide, operators="torch", **half))

    exact = config(wide, operators="torch", dtype="float64", attention="reference")
    assert_no_worse_than_eager(actual, eager, logits_of(exact, is_rounded=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of C++ kernels, by the module that makes them."""
    found: list[str] = []

    def counting(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: (found.append(name), launch(*arguments))[1]

    for module in (attention, linear, rows):
        monkeypatch.setattr(module, "launch", counting(module.__name__, module.launch))
    return found


@pytest.mark.parametrize("name", ["torch", *NATIVE])
def test_the_set_that_the_config_names_computes_and_no_other(
    wide: Path, name: str, launches: list[str]
) -> None:
    counted: list[Counted] = []

    def count(operators: Operators) -> Operators:
        counted.append(Counted(operators))
        return counted[0]

    chosen = config(wide, operators=name, dtype="bfloat16", attention="reference")
    serve(chosen, Wraps(operators=count), max_tokens=3)

    assert counted[0].name == name
    calls = counted[0].calls
    assert calls.keys() == {
        *("embed", "rms_norm", "add_rms_norm", "add", "linear", "gated"),
        *("angles", "rotate_and_write", "logits"),
    }
    fused = 1 * calls["add_rms_norm"] + 2 * calls["rotate_and_write"]
    assert len(launches) == (0 if name == "torch" else calls.total() + fused)


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_set_is_refused_where_a_row_is_no_whole_vectors(name: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "narrow", head_dim=32, mlp_width=48)

    with pytest.raises(ValueError, match=f"operators={name} must .* mlp_width is 48; use op"):
        build_rank(config(path, operators=name, dtype="bfloat16"))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_kernels_that_can_be_neither_compiled_nor_recorded_are_refused(
    wide: Path, name: str, attention: str
) -> None:
    chosen = config(wide, operators=name, dtype="bfloat16", attention=attention)
    chosen.compile = "step"

    with pytest.raises(
        ValueError,
        match=f"operators must be torch for compile=step with attention={attention} on 1 rank, "
        f"got {name}; write operators=torch, or compile=none",
    ):
        build_rank(chosen)
