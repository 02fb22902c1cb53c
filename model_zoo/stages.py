"""Which layers each stage of a pipeline holds: cuts between layers, balanced by predicted time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise
from math import inf
from typing import Protocol

# Of the rows of a typical step, those that need logits: a chunk of prefill has one at most, so
# that the head, as large as it may be, weighs little beside the layers.
LOGIT_SHARE = 1 / 16
TIE = 1e-9  # relative; the same sum in another order


class Sizes(Protocol):
    """What of a model decides the cuts; a ``ModelSpec`` has it, and a shape without a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def cut_stages(spec: Sizes, pp: int, *, head_layers: float | None = None) -> list[range]:
    """The layers of each stage of a model.

    Args:
        spec: the model.
        pp: stages, at most as many as layers.
        head_layers: time of the head, in layers; None takes the number of its weights against
            those of a layer, times ``LOGIT_SHARE``.
    """
    if head_layers is None:
        heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
        layer_width = heads * spec.head_dim + 3 * spec.mlp_width
        head_layers = LOGIT_SHARE * spec.vocab_size / layer_width
    return stage_layers([1.0] * spec.num_layers, pp, last_extra=head_layers)


def stage_layers(times: Sequence[float], pp: int, *, last_extra: float = 0.0) -> list[range]:
    """Cut layers into consecutive stages, so that the slowest stage is as fast as can be.

    Within that limit each stage takes as many layers as come under the average of what is left,
    which leaves layers that do not divide to later stages.

    Args:
        times: of each layer, in any unit.
        pp: stages; each gets one layer at least.
        last_extra: what the last stage does besides its layers, in the same unit.

    Returns:
        ``pp`` ranges that hold all layers in order.
    """
    assert 1 <= pp <= len(times)
    work = [*times[:-1], times[-1] + last_extra]
    sums = [0.0, *accumulate(work)]
    limits = sorted({stop - start for start, stop in combinations(sums, 2)})
    at = bisect_left(limits, True, key=lambda limit: _min_stages(work, limit * (1 + TIE)) <= pp)
    limit = limits[at] * (1 + TIE)
    cuts = [0]
    for later in range(pp - 1, 0, -1):  # stages after the one that is cut
        start = cuts[-1]
        average = (sums[-1] - sums[start]) / (later + 1) * (1 + TIE)
        stop = start + 1
        while stop < len(work) - later and (
            sums[stop + 1] - sums[start] <= average or _min_stages(work[stop:], limit) > later
        ):
            stop += 1
        cuts.append(stop)
    return [range(start, stop) for start, stop in pairwise([*cuts, len(work)])]


def _min_stages(work: Sequence[float], limit: float) -> float:
    """Fewest stages that take no longer than a limit; infinite if one layer does."""
    count, time = 1, 0.0
    for layer in work:
        if layer > limit:
            return inf
        time += layer
        if time > limit:
            count, time = count + 1, layer
    return count
