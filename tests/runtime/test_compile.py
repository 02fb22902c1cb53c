"""Compiled models: the decoder's results, no compiling after warm-up, a cache on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mnemosyne.model_zoo.bench import init_random
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.parallel.feed_forward import own_rows
from mnemosyne.runtime.compile import CompiledModel
from mnemosyne.step_context import StepContext
from tests.attention.cases import assert_no_worse_than_eager
from tests.model_zoo.dense import DenseAttend

# importing the compiler warns of what torch itself still uses
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

CPU = torch.device("cpu")
SIZES = (1, 2, 4, 8, 16, 40, 264)


def _decoder() -> Decoder:
    spec = ModelSpec(
        family="llama",
        vocab_size=48,
        width=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10_000.0, dim=8),
        tied=False,
        windows=(None,) * 3,
        max_positions=1024,
        dtype="float64",
    )
    decoder = Decoder(spec, dtype=torch.float64, device="cpu")
    init_random(decoder, 0)
    return decoder


class _FreshAttend(DenseAttend):
    """As backends do, it returns rows in memory of their own."""

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        out_THD = super().__call__(*arguments, **named)
        return torch.empty(out_THD.shape, dtype=out_THD.dtype).copy_(out_THD)


def _results(model: Decoder | CompiledModel, num_rows: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        ids_T = torch.arange(num_rows) * 7 % 48
        context = StepContext(_FreshAttend((None,) * 3), own_rows)
        hidden_TE = model(ids_T, torch.arange(num_rows), context)
        return hidden_TE, model.logits(hidden_TE[-3:])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, for all models of this file."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


def test_any_number_of_rows_gives_what_the_decoder_gives_and_compiles_nothing_more(
    cache: Path,
) -> None:
    decoder = _decoder()
    model, calls = CompiledModel(decoder, CPU), []
    model.warm_up(lambda done, total: calls.append((done, total)))
    before = counters["stats"]["unique_graphs"]

    for num_rows in SIZES:
        results = zip(_results(model, num_rows), _results(decoder, num_rows), strict=True)
        assert max((actual - exact).abs().max() for actual, exact in results) < 1e-13

    assert counters["stats"]["unique_graphs"] == before
    assert calls == [(0, 2), (1, 2), (2, 2)]


def test_in_bfloat16_a_compiled_step_is_no_worse_than_an_eager_one(cache: Path) -> None:
    exact, decoder = _decoder(), _decoder()
    decoder.to(torch.bfloat16).dtype = torch.bfloat16
    exact.load_state_dict(decoder.state_dict())
    model = CompiledModel(decoder, CPU)
    model.warm_up()

    for num_rows in (1, 2, 3, 64, 70):
        found = (_results(each, num_rows) for each in (model, decoder, exact))
        for results in zip(*found, strict=True):
            assert_no_worse_than_eager(*results)


def test_a_second_run_reads_what_the_first_one_compiled(cache: Path) -> None:
    CompiledModel(_decoder(), CPU).warm_up()
    torch._dynamo.reset()
    counters.clear()

    CompiledModel(_decoder(), CPU).warm_up()

    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert list((cache / "mnemosyne" / "compile").iterdir())
