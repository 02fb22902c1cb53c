"""Joins engine, scheduler and a simulated cluster; the counterpart of ``rank`` without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mnemosyne.cache.capacity import kinds_of
from mnemosyne.cache.layout import pages_for
from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import SimulateConfig
from mnemosyne.joining.engine import Sweep, join
from mnemosyne.metrics import StepRecord
from mnemosyne.model_zoo.stages import cut_stages
from mnemosyne.parallel.mesh import check_mesh
from mnemosyne.request import RequestOutput
from mnemosyne.schedule.calibrate import Limits, calibrate
from mnemosyne.schedule.predictor import LinearPredictor
from mnemosyne.schedule.work import WorkModel
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.intake import Intake, refused_output
from mnemosyne.shape import ModelShape
from mnemosyne.simulate.cluster import SimulatedCluster
from mnemosyne.simulate.cost import StepCost
from mnemosyne.simulate.footprint import Footprint, footprint
from mnemosyne.simulate.workload import Arrival

ANY_POSITIONS = 2**40  # lengths beyond what a checkpoint was trained for are simulated as well


@dataclass(frozen=True, slots=True)
class Simulation:
    """An engine on simulated hardware, before its first request."""

    engine: Engine
    cluster: SimulatedCluster
    memory: Footprint

    def run(self, arrivals: Sequence[Arrival]) -> list[RequestOutput]:
        """Serve a workload to its end.

        Args:
            arrivals: in order of time.

        Returns:
            One output per request, in order. What can never fit is refused, with the reason.
        """
        outputs = []
        for request_id, arrival in enumerate(arrivals):
            while self.engine.has_work and self.cluster.now_s < arrival.arrival_s:
                self.engine.step()
            self.cluster.wait_until(arrival.arrival_s)
            request = arrival.request(request_id)
            try:
                outputs.append(self.engine.accept(request))
            except ValueError as error:
                outputs.append(refused_output(request.prompt_ids, str(error)))
        while self.engine.has_work:
            self.engine.step()
        return outputs


def build_simulation(
    config: SimulateConfig,
    shape: ModelShape,
    *,
    on_step: Callable[[StepRecord], None] | None = None,
    shares: bool = False,
) -> Simulation:
    """The engine that serves, over an executor that only counts time.

    The predictor of the scheduler is fitted by the same sweep as at the start of a real engine,
    run on the simulated hardware; it knows nothing of the cost model.

    Args:
        config: all choices.
        shape: the model.
        on_step: called with the record of each step.
        shares: whether the prompts of the workload can be told apart, so that they may be shared.

    Raises:
        ValueError: if mesh and model do not fit each other, or the memory.
    """
    mesh = config.mesh
    stages = stages_of(shape, mesh)
    memory = _memory(config, shape, stages)
    cost = StepCost(shape, config.hardware, config.efficiency, mesh, stages)
    cluster, predictor = SimulatedCluster(cost), LinearPredictor()
    engine = join(
        cluster,
        shape,
        _intake(shape, config.model),
        config,
        num_pages=memory.num_pages,
        predictor=predictor,
        sweep=_sweep(predictor, cost),
        clock=cluster.clock,
        on_step=on_step,
        fingerprint=b"simulated" if shares and config.cache.prefix == "auto" else None,
    )
    engine.measure()
    return Simulation(engine, cluster, memory)


def _intake(shape: ModelShape, model: str) -> Intake:
    """Prompts are counts of tokens here: nothing is tokenized."""
    return Intake(
        vocab_size=shape.vocab_size,
        max_positions=ANY_POSITIONS,
        defaults=GenerationDefaults(),
        tokenizer=None,
        model=model,
    )


def _sweep(predictor: LinearPredictor, cost: StepCost) -> Sweep:
    """A sweep on a cluster of its own, so that requests find the clock at 0."""

    def sweep(work_model: WorkModel, limits: Limits) -> None:
        cluster = SimulatedCluster(cost)
        samples = calibrate(cluster, work_model, limits, clock=cluster.clock)
        if samples:
            predictor.fit(samples)

    return sweep


def stages_of(shape: ModelShape, mesh: MeshConfig) -> tuple[int, ...]:
    """Layers of each stage, as a real engine cuts them.

    Raises:
        ValueError: if the mesh cannot cut the model.
    """
    check_mesh(mesh, shape)
    return tuple(len(layers) for layers in cut_stages(shape, mesh.pp))


def _memory(config: SimulateConfig, shape: ModelShape, stages: tuple[int, ...]) -> Footprint:
    """Pages of each group, by the memory of the hardware or as asked.

    Raises:
        ValueError: if not one page fits, or fewer than asked.
    """
    cache, hardware = config.cache, config.hardware
    memory = footprint(
        shape,
        hardware,
        config.mesh,
        stages,
        max_rows=config.schedule.max_chunk + config.schedule.max_sequences,
        max_sampled=config.schedule.max_sequences,
        kinds=kinds_of(shape.windows, cache),
        memory_share=cache.memory_share,
    )
    if memory.num_pages < 1:
        need_gb = (memory.weights + memory.activations) / 1e9
        raise ValueError(
            f"model must leave memory for the cache, got {need_gb:.1f} GB of weights and "
            f"activations on each {hardware.name} of {hardware.memory_gb:.0f} GB; raise mesh.tp or "
            "mesh.pp (mnemosyne plan shows what fits)"
        )
    if cache.num_tokens is None:
        return memory
    asked = memory.kinds.num_tracks * pages_for(cache.num_tokens, cache.page_size)
    if not 1 <= asked <= memory.num_pages:
        raise ValueError(
            f"cache.max_tokens must lie in [1, {memory.num_tokens}] with this mesh on "
            f"{hardware.name}, got {cache.num_tokens}; lower it or add ranks"
        )
    return replace(memory, num_pages=asked)
