"""Which layouts of a model fit some GPUs, what they would do, which is best, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import inf

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.room import Room
from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import HardwareConfig, PlanConfig
from mnemosyne.shape import ModelShape
from mnemosyne.simulate.cost import StepCost
from mnemosyne.simulate.footprint import Footprint, footprint
from mnemosyne.simulate.outlook import Outlook

CutStages = Callable[[ModelShape, MeshConfig], tuple[int, ...]]  # ValueError: cannot be cut so
MOST_GPUS = 1024  # that a remedy asks for
CHUNK = 32  # tokens; the least of a prompt that rides along with decodes


class Rank(IntEnum):
    """How far a layout gets, worst first."""

    CANNOT_CUT = 0
    NO_MEMORY = 1
    TOO_SLOW = 2
    FITS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a layout. Times are seconds; of what was not worked out, None.

    Attributes:
        mesh: the layout of one replica.
        replicas: that the GPUs hold.
        rank: how far it gets.
        reason: why it is not the best, in words; empty for the best.
        memory: of a rank.
        max_context: tokens of the longest request.
        decodes: requests that decode beside a prefill in one replica, at the best goodput.
        tbt_s: between tokens, while a prefill rides along with its smallest chunk.
        ttft_s: of a prompt of the asked length beside the decodes, without waiting.
        goodput: requests per second of all replicas that meet both targets.
    """

    mesh: MeshConfig
    replicas: int
    rank: Rank
    reason: str = ""
    memory: Footprint | None = None
    max_context: int | None = None
    decodes: int | None = None
    tbt_s: float | None = None
    ttft_s: float | None = None
    goodput: float = 0.0


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change to a plan that fits nowhere, after which it does."""

    key: str
    value: float
    factor: float  # how much more of it is asked for, or how much less


def plan_layouts(config: PlanConfig, shape: ModelShape, cut: CutStages) -> list[Verdict]:
    """Judge every layout whose replicas fill the GPUs.

    Args:
        config: GPUs, hardware, length, targets.
        shape: the model.
        cut: layers of each stage; raises ValueError where a layout cannot cut the model.

    Returns:
        Best first. Only those of rank ``FITS`` meet the targets.
    """
    verdicts = [judge(config, shape, mesh, cut) for mesh in layouts(config.gpus)]
    verdicts.sort(key=lambda v: (-v.rank, -v.goodput, v.ttft_s or 0.0, v.mesh.world_size))
    best = verdicts[0]
    if best.rank is not Rank.FITS:
        return verdicts
    return [
        replace(v, reason=_why_behind(v, best)) if v.rank is Rank.FITS and v is not best else v
        for v in verdicts
    ]


def layouts(gpus: int) -> Iterator[MeshConfig]:
    """All meshes of which some number fills the GPUs."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for world in divisors:
        for tp in (n for n in divisors if world % n == 0):
            for kvp in (n for n in divisors if world // tp % n == 0):
                for ffn in ("tp", "wide") if kvp > 1 else ("tp",):
                    yield MeshConfig(pp=world // tp // kvp, kvp=kvp, tp=tp, ffn=ffn)


def judge(
    config: PlanConfig,
    shape: ModelShape,
    mesh: MeshConfig,
    cut: CutStages,
    *,
    only_rank: bool = False,
) -> Verdict:
    """Judge one layout.

    More decodes make every pass longer: once a number of them is too many, so are all larger ones.

    Args:
        config: hardware, length, targets.
        shape: the model.
        mesh: the layout.
        cut: as for ``plan_layouts``.
        only_rank: work out no time of a layout that is too slow once that is certain.
    """
    replicas = config.gpus // mesh.world_size
    try:
        stages = cut(shape, mesh)
    except ValueError as error:
        return Verdict(mesh, replicas, Rank.CANNOT_CUT, str(error))
    memory = footprint(
        shape,
        config.hardware,
        mesh,
        stages,
        max_rows=config.max_chunk,
        max_sampled=1,
        kinds=PageKinds.of(shape.windows, config.page_size),
        memory_share=config.memory_share,
    )
    kinds, num_tokens = memory.kinds, config.context_tokens + config.output
    room = Room([memory.num_pages] * mesh.kvp, kinds, kinds.most_tokens(memory.num_pages))
    max_context = max(0, room.max_request_tokens() - config.output)
    held = Verdict(mesh, replicas, Rank.NO_MEMORY, memory=memory, max_context=max_context)
    if config.context_tokens > max_context:
        return replace(held, reason=_why_too_small(memory, config.hardware))
    cost = StepCost(shape, config.hardware, config.efficiency, mesh, stages)
    sizes = {"page_size": config.page_size, "max_chunk": config.max_chunk}
    outlook = Outlook(cost, context=config.context_tokens, **sizes)
    slots = room.num_pages // kinds.pages(num_tokens)
    trials: list[Verdict] = []
    for decodes in _loads(config, slots):
        trials.append(_at_load(config, held, outlook, decodes, only_rank))
        if trials[-1].rank is not Rank.FITS:
            break
    return max(trials, key=lambda v: (v.rank, v.goodput, -(v.ttft_s or 0.0)))


def _why_too_small(memory: Footprint, hardware: HardwareConfig) -> str:
    """The reason that there is no room for a prompt of the asked length."""
    used = (memory.weights + memory.activations) / 1e9
    if used > hardware.memory_gb:
        return f"a rank needs {used:.0f} GB without cache"
    return "cache too small"


def frontier(
    config: PlanConfig, shape: ModelShape, verdict: Verdict, cut: CutStages
) -> list[tuple[float, float]]:
    """TTFT and TBT of a layout as the budget of a step varies.

    Returns:
        ``(tbt_s, ttft_s)`` for budgets from the smallest step to eight times the target.
    """
    stages = cut(shape, verdict.mesh)
    cost = StepCost(shape, config.hardware, config.efficiency, verdict.mesh, stages)
    outlook = Outlook(cost, context=config.context_tokens, max_chunk=config.max_chunk)
    decodes = verdict.decodes or 1
    least_s = outlook.tbt_s(decodes, CHUNK)
    most_s = max(8 * config.slo.tbt_s, 2 * least_s)
    budgets = [least_s * (most_s / least_s) ** (step / 12) for step in range(13)]
    return [(budget, outlook.ttft_s(decodes, budget)) for budget in budgets]


def remedies(
    config: PlanConfig, shape: ModelShape, cut: CutStages, verdicts: Sequence[Verdict]
) -> list[Remedy]:
    """Single changes after which some layout fits, the smallest first.

    Args:
        config: of a plan that fits nowhere.
        shape: the model.
        cut: as for ``plan_layouts``.
        verdicts: what came of it.
    """
    found = []
    slow = [v for v in verdicts if v.rank is Rank.TOO_SLOW and v.tbt_s and v.ttft_s]
    in_time = [v.ttft_s for v in slow if v.ttft_s and (v.tbt_s or 0) <= config.slo.tbt_s]
    if in_time:
        found.append(Remedy("slo.ttft", min(in_time), min(in_time) / config.slo.ttft_s))
    steady = [v.tbt_s for v in slow if v.tbt_s and (v.ttft_s or 0) <= config.slo.ttft_s]
    if steady:
        found.append(Remedy("slo.tbt", min(steady), min(steady) / config.slo.tbt_s))
    gpus = _fewest_gpus(config, shape, cut)
    if gpus:
        found.append(Remedy("gpus", gpus, gpus / config.gpus))
    context = _largest_context(config, shape, cut)
    if context:
        found.append(Remedy("context", context, config.context_tokens / context))
    return sorted(found, key=lambda remedy: remedy.factor)


def _loads(config: PlanConfig, slots: int) -> list[int]:
    """Numbers of decodes to try: one slot of the cache is the prompt's."""
    if config.decodes is not None:
        return [config.decodes]
    most = max(1, slots - 1)
    return [2**power for power in range(10) if 2**power <= most]


def _at_load(
    config: PlanConfig, held: Verdict, outlook: Outlook, decodes: int, only_rank: bool
) -> Verdict:
    """The verdict if that many requests decode beside a prefill."""
    slo_tbt, slo_ttft = config.slo.tbt_s, config.slo.ttft_s
    tbt_s = outlook.tbt_s(decodes, min(CHUNK, config.context_tokens))
    if only_rank and tbt_s > slo_tbt:
        return replace(held, rank=Rank.TOO_SLOW)
    ttft_s = outlook.ttft_s(decodes, slo_tbt, limit_s=slo_ttft if only_rank else inf)
    seen = replace(held, rank=Rank.TOO_SLOW, decodes=decodes, tbt_s=tbt_s, ttft_s=ttft_s)
    if tbt_s > slo_tbt:
        return replace(seen, reason=f"TBT over {1e3 * slo_tbt:g} ms")
    if ttft_s > slo_ttft:
        return replace(seen, reason=f"TTFT over {slo_ttft:g} s")
    # Prompts queue for one server (M/D/1): the wait, rho S / (2 (1 - rho)), may take what the
    # target leaves. Decodes come and go at the pace of the target.
    spare_s = slo_ttft - ttft_s
    utilisation = 2 * spare_s / (ttft_s + 2 * spare_s)
    by_prefill = utilisation / ttft_s
    by_decode = decodes / (config.output * slo_tbt)
    return replace(seen, rank=Rank.FITS, goodput=held.replicas * min(by_prefill, by_decode))


def _why_behind(verdict: Verdict, best: Verdict) -> str:
    assert verdict.ttft_s is not None
    assert best.ttft_s is not None
    if verdict.goodput < best.goodput:
        share = verdict.goodput / best.goodput
        return f"{share:.0%} of its goodput"
    return "larger TTFT" if verdict.ttft_s > best.ttft_s else "more ranks for the same"


def _fits_somewhere(
    config: PlanConfig, shape: ModelShape, cut: CutStages, *, but_on: int = 0
) -> bool:
    """Return whether a layout fits, those left out whose replicas fill ``but_on`` GPUs as well."""
    return any(
        judge(config, shape, mesh, cut, only_rank=True).rank is Rank.FITS
        for mesh in layouts(config.gpus)
        if not but_on or but_on % mesh.world_size
    )


def _fewest_gpus(config: PlanConfig, shape: ModelShape, cut: CutStages) -> int | None:
    """A power of two times the GPUs, on which one decode beside a prefill fits."""
    gpus, tried = 2 * config.gpus, 0
    while gpus <= MOST_GPUS:
        one = replace(config, gpus=gpus, decodes=1)
        if _fits_somewhere(one, shape, cut, but_on=tried):
            return gpus
        gpus, tried = 2 * gpus, gpus
    return None


def _largest_context(config: PlanConfig, shape: ModelShape, cut: CutStages) -> int | None:
    """The longest prompt that fits somewhere, to a sixteenth; None below 1K."""
    low, high = 1024, config.context_tokens
    one = replace(config, decodes=1)
    if high <= low or not _fits_somewhere(replace(one, context=low), shape, cut):
        return None
    while high > low * 17 // 16:
        middle = int((low * high) ** 0.5) // 1024 * 1024
        if middle <= low:
            break
        if _fits_somewhere(replace(one, context=middle), shape, cut):
            low = middle
        else:
            high = middle
    return low
