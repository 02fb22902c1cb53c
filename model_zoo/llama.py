"""Llama 2, 3, 3.1, 3.2 and the many models published in its format."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes


def llama(config: Config, sizes: Sizes) -> Family:
    """Read what Llama adds: full attention, biases on request.

    Raises:
        ValueError: for a value that is not implemented.
    """
    # Above 1 it splits the projections into pieces that are rounded one by one.
    pieces = config.integer("pretraining_tp", 1)
    config.require(pieces == 1, "pretraining_tp", "be 1", pieces)
    bias = config.flag("attention_bias", False)
    return Family(
        windows=(None,) * sizes.num_layers,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
