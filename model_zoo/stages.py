"""The layers of each stage of a pipeline: cuts between layers, balanced by predicted time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise
from math import inf

from mnemosyne.shape import ModelShape

# Of the rows of a typical step, those that need logits: a chunk of prefill has one at most, so
# that the head, as large as it may be, weighs little beside the layers.
LOGIT_SHARE = 1 / 16
TIE = 1e-9  # relative; the same sum in another order


def cut_stages(shape: ModelShape, pp: int) -> list[range]:
    """The layers of each stage of a model.

    The head counts as layers: its weights against those of a layer, times ``LOGIT_SHARE``.

    Args:
        shape: the model.
        pp: stages, at most as many as layers.
    """
    heads = 2 * shape.num_heads + 2 * shape.num_kv_heads
    layer_width = heads * shape.head_dim + 3 * shape.mlp_width
    head_layers = LOGIT_SHARE * shape.vocab_size / layer_width
    return stage_layers([1.0] * shape.num_layers, pp, last_extra=head_layers)


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
