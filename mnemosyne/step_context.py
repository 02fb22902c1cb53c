"""The world of a layer in a step besides its weights: the cache, and the rows of other groups."""

from __future__ import annotations

from dataclasses import dataclass

from mnemosyne.attention.segments import Attend
from mnemosyne.parallel.feed_forward import FeedForward


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """The two calls by which a layer of a model leaves its own mathematics.

    Args:
        attend: stores keys and values in the cache and attends over it.
        feed_forward: runs an MLP over the rows that share it.
    """

    attend: Attend
    feed_forward: FeedForward
