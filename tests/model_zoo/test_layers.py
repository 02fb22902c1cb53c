"""Hooks of a linear layer, and modules put in its place, keep working."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.layers import Linear
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.operators import TORCH
from mnemosyne.runtime.weights import load_weights
from tests.model_zoo.dense import dense_context
from tests.model_zoo.tiny import tiny_checkpoint
from tests.operators.counted import Counted

LAYERS = ("attn.wq", "attn.wk", "attn.wv", "attn.wo", "mlp.gate", "mlp.up", "mlp.down")


class Doubled(nn.Module):
    """Twice another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_TE: Tensor) -> Tensor:
        return 2 * self.inner(x_TE)


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    spec = read_spec(tiny_checkpoint(tmp_path, bias=True))
    decoder = Decoder(spec, dtype=torch.float64, device="meta")
    load_weights(decoder, tmp_path)
    return decoder


def run(decoder: Decoder) -> Tensor:
    ids = torch.arange(5)
    return decoder(ids, ids, dense_context(decoder.spec.windows))


def double_weights(layer: Any) -> None:
    layer.weight.mul_(2)
    layer.bias.mul_(2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["hook", "module"])
def test_what_is_attached_to_a_layer_or_replaces_it_is_called(
    decoder: Decoder, name: str, kind: str
) -> None:
    before, layer = run(decoder), decoder.decoder_layers()[0]
    parent, _, attribute = name.partition(".")
    linear = layer.get_submodule(name)
    assert isinstance(linear, Linear)
    double_weights(linear)
    expected = run(decoder)
    linear.weight.div_(2)
    linear.bias.div_(2)

    if kind == "hook":
        linear.register_forward_hook(lambda module, given, y: 2 * y)
    else:
        setattr(layer.get_submodule(parent), attribute, Doubled(linear))

    assert not torch.allclose(expected, before)
    torch.testing.assert_close(run(decoder), expected, rtol=0, atol=1e-12)


def test_a_hook_before_a_layer_is_called(decoder: Decoder) -> None:
    layer = decoder.decoder_layers()[0]
    seen = []
    layer.attn.wk.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))

    run(decoder)

    assert seen == [(5, 32)]


def test_layers_of_one_input_are_one_call(tmp_path: Path) -> None:
    counted = Counted(TORCH)
    spec = read_spec(tiny_checkpoint(tmp_path))
    decoder = Decoder(spec, dtype=torch.float64, device="meta", operators=counted)
    load_weights(decoder, tmp_path)

    decoder.logits(run(decoder))

    assert counted.calls == {
        "embed": 1,
        "angles": 1,
        "rms_norm": spec.num_layers + 1,
        "add_rms_norm": spec.num_layers,
        "add": spec.num_layers,
        "linear": 3 * spec.num_layers,  # q, k and v; o; down
        "gated": spec.num_layers,
        "logits": 1,
    }
