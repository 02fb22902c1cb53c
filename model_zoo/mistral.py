"""Mistral 7B v0.1 to v0.3, Nemo and Small: Llama with one sliding window for all layers."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config, Family, num_layers


def mistral(config: Config) -> Family:
    """Read what Mistral adds: ``sliding_window``, null where every layer sees everything."""
    window = config.value("sliding_window", absent=4096)
    if window is not None:
        window = config.integer("sliding_window", 4096)
    return Family(windows=(window,) * num_layers(config))
