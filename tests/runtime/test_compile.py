"""Compiled models: the decoder's results, no compiling after warm-up, a cache on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from mnemosyne.kernels.cpu import linear
from mnemosyne.model_zoo.bench import init_random
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.runtime.compile import CompiledModel
from mnemosyne.runtime.few_rows import compile_few_rows
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

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        out_THD = super().__call__(layer, q_THD, k_TKD, v_TKD)
        return torch.empty(out_THD.shape, dtype=out_THD.dtype).copy_(out_THD)


def _results(model: Decoder | CompiledModel, num_rows: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        ids_T = torch.arange(num_rows) * 7 % 48
        hidden_TE = model(ids_T, torch.arange(num_rows), _FreshAttend((None,) * 3))
        return hidden_TE, model.logits(hidden_TE[-3:])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, for all models of this file."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


@pytest.mark.parametrize("mode", ["layer", "step"])
def test_any_number_of_rows_gives_what_the_decoder_gives_and_compiles_nothing_more(
    mode: str, cache: Path
) -> None:
    decoder = _decoder()
    model, calls = CompiledModel(decoder, mode, CPU), []
    model.warm_up(lambda done, total: calls.append((done, total)))
    before = counters["stats"]["unique_graphs"]

    for num_rows in SIZES:
        results = zip(_results(model, num_rows), _results(decoder, num_rows), strict=True)
        assert max((actual - exact).abs().max() for actual, exact in results) < 1e-13

    assert counters["stats"]["unique_graphs"] == before
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 64, 70])
def test_in_bfloat16_a_compiled_step_is_no_worse_than_an_eager_one_of_torch(
    num_rows: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, decoder = _decoder(), _decoder()
    decoder.to(torch.bfloat16).dtype = torch.bfloat16
    exact.load_state_dict(decoder.state_dict())
    model = CompiledModel(decoder, "step", CPU)
    model.warm_up()

    actual = _results(model, num_rows)
    monkeypatch.setattr(linear, "can_run", lambda: False)  # products of torch
    eager, wanted = _results(decoder, num_rows), _results(exact, num_rows)

    for results in zip(actual, eager, wanted, strict=True):
        assert_no_worse_than_eager(*results)


def test_a_second_run_reads_what_the_first_one_compiled(cache: Path) -> None:
    CompiledModel(_decoder(), "step", CPU).warm_up()
    torch._dynamo.reset()
    counters.clear()

    CompiledModel(_decoder(), "step", CPU).warm_up()

    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert list((cache / "mnemosyne" / "compile").iterdir())


@pytest.mark.parametrize("has_bias", [True, False])
def test_sums_of_few_rows_are_those_of_the_matrix_product(has_bias: bool, cache: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 24), (40, 24), (40,))
    )
    arguments = (x, weight, bias) if has_bias else (x, weight)
    compiled = torch.compile(F.linear, fullgraph=True, backend=compile_few_rows)

    with torch.inference_mode():
        actual, exact = compiled(*arguments), F.linear(*arguments)

    assert (actual - exact).abs().max() < 1e-13
