"""Config dataclasses of what runs no model: ``mnemosyne simulate`` and ``mnemosyne plan``."""

from __future__ import annotations

from dataclasses import dataclass, field

from mnemosyne.config import (
    CacheConfig,
    Duration,
    MeshConfig,
    MetricsConfig,
    ScheduleConfig,
    SloConfig,
    check_positive,
    check_types,
    parse_duration,
    parse_size,
)

GPU_TARGET_TBT = 0.03  # seconds; what the paper promises
MOST_GPUS = 4096  # of a plan, which judges every layout of them
MOST_DECODES = 4096  # beside a prefill, of which each is counted by itself
GPU_MEMORY_SHARE = 0.9  # of what the weights leave; the rest is for activations and the allocator


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """Peaks of one accelerator and its links; ``conf/hardware`` has them with their sources."""

    name: str
    peak_tflops: float  # dense bfloat16 with float32 accumulation, 1e12 operations per second
    memory_gb: float  # 1e9 bytes
    memory_gb_per_s: float  # 1e9 bytes per second
    gpus_per_node: int  # that the fast link joins
    node_gb_per_s: float  # of the fast link, per accelerator, one direction
    network_gb_per_s: float  # between nodes, per accelerator, one direction

    def __post_init__(self) -> None:
        check_types(self, "hardware.")
        names = tuple(name for name in self.__dataclass_fields__ if name != "name")
        check_positive(self, names, "hardware.", "the maker's data sheet has it")


@dataclass(kw_only=True, slots=True)
class EfficiencyConfig:
    """Shares of the peaks that are reached: one set for all experiments, in ``conf/efficiency``."""

    gemm: float  # share of the peak that large matrix products reach
    attention: float  # share of the peak that attention over a chunk reaches
    weights: float  # share of the memory bandwidth at which weights are read
    kv: float  # share of the memory bandwidth at which the cache is read
    links: float  # share of the bandwidth of either link
    node_latency: Duration  # of one collective within a node
    network_latency: Duration  # of one collective or message between nodes
    layer_overhead: Duration  # per layer and step: launches and small kernels
    step_overhead: Duration  # per step and stage: planning, inputs, sampling

    def __post_init__(self) -> None:
        check_types(self, "efficiency.")
        for name in ("gemm", "attention", "weights", "kv", "links"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(
                    f"efficiency.{name} must lie in (0, 1], got {value}; it is a share of a peak"
                )
        for name in ("node_latency", "network_latency", "layer_overhead", "step_overhead"):
            value = getattr(self, name)
            if value not in (0, "0"):
                value = parse_duration(value, f"efficiency.{name}")
            setattr(self, name, float(value))

    @property
    def node_latency_s(self) -> float:
        return float(self.node_latency)

    @property
    def network_latency_s(self) -> float:
        return float(self.network_latency)

    @property
    def layer_overhead_s(self) -> float:
        return float(self.layer_overhead)

    @property
    def step_overhead_s(self) -> float:
        return float(self.step_overhead)


@dataclass(kw_only=True, slots=True)
class WorkloadConfig:
    """Requests of a simulation: drawn, or read from a trace."""

    trace: str | None = None  # JSONL, one request per line; unset: drawn as the other keys say
    rate: float = 0.75  # requests per second, Poisson
    num_requests: int = 1000
    seed: int = 0
    prompt_median: int = 1730  # tokens of short prompts, log-normal
    prompt_p90: int = 5696
    output_median: int = 415  # tokens of every output, log-normal
    output_p90: int = 834
    long_share: float = 0.05  # of the requests
    long_min: int | str = "128K"  # tokens of long prompts, log-uniform
    long_max: int | str = "1M"

    def __post_init__(self) -> None:
        check_types(self, "workload.")
        self.long_min = parse_size(self.long_min, "workload.long_min")
        self.long_max = parse_size(self.long_max, "workload.long_max")
        names = ("rate", "num_requests", "prompt_median", "output_median", "long_min")
        check_positive(self, names, "workload.", "1 is the least that makes a request")
        if not 0 <= self.long_share <= 1:
            raise ValueError(
                f"workload.long_share must lie in [0, 1], got {self.long_share}; 0.05 is 5%"
            )
        for low, high in (
            ("prompt_median", "prompt_p90"),
            ("output_median", "output_p90"),
            ("long_min", "long_max"),
        ):
            if getattr(self, high) < getattr(self, low):
                raise ValueError(
                    f"workload.{high} must be at least workload.{low}={getattr(self, low)}, "
                    f"got {getattr(self, high)}; raise it"
                )

    @property
    def long_range(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest of the long prompts."""
        return int(self.long_min), int(self.long_max)


@dataclass(kw_only=True, slots=True)
class SimulateConfig:
    """``mnemosyne simulate``: a workload through engine and scheduler on simulated hardware."""

    model: str  # a name in conf/shape, or a Hugging Face directory
    hardware: HardwareConfig
    efficiency: EfficiencyConfig
    calibration: str | None = None  # JSONL of measured steps that the efficiencies are fitted to
    mesh: MeshConfig = field(default_factory=MeshConfig)
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(target_tbt=GPU_TARGET_TBT)
    )
    slo: SloConfig = field(default_factory=SloConfig)
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(memory_share=GPU_MEMORY_SHARE))
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    output: str | None = None  # JSONL, one line per request; it can be replayed as a trace
    report: str | None = None  # JSON, the numbers of the table
    plot: str | None = None  # PNG

    def __post_init__(self) -> None:
        check_types(self)
        if self.metrics.trace is not None:
            raise ValueError(
                f"metrics.trace must be null in a simulation, got {self.metrics.trace!r}; "
                "metrics.path writes its steps"
            )
        if self.cache.dir is not None:
            raise ValueError(
                f"cache.dir must be null in a simulation, got {self.cache.dir!r}; "
                "cache.max_tokens may stand for what a disk holds"
            )


@dataclass(kw_only=True, slots=True)
class PlanSloConfig:
    """Targets of a plan; seconds, or text such as 30ms."""

    tbt: Duration = "30ms"  # time between tokens, while a prompt is prefilled beside them
    ttft: Duration = "60s"  # time to the first token of a prompt of the asked length

    def __post_init__(self) -> None:
        check_types(self, "slo.")
        self.tbt = parse_duration(self.tbt, "slo.tbt")
        self.ttft = parse_duration(self.ttft, "slo.ttft")

    @property
    def tbt_s(self) -> float:
        return float(self.tbt)

    @property
    def ttft_s(self) -> float:
        return float(self.ttft)


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """``mnemosyne plan``: which layout serves a model best, before anything is loaded."""

    model: str  # a name in conf/shape, or a Hugging Face directory
    hardware: HardwareConfig
    efficiency: EfficiencyConfig
    calibration: str | None = None  # JSONL of measured steps that the efficiencies are fitted to
    gpus: int = 8
    context: int | str = "1M"  # tokens of a prompt
    output: int = 256  # tokens of an answer
    decodes: int | None = None  # requests that decode beside a prefill; unset: the best number
    slo: PlanSloConfig = field(default_factory=PlanSloConfig)
    max_chunk: int = 8192  # tokens
    page_size: int = 128  # tokens per page
    memory_share: float = GPU_MEMORY_SHARE  # of what weights and activations leave
    report: str | None = None  # JSON, every layout
    plot: str | None = None  # PNG

    def __post_init__(self) -> None:
        check_types(self)
        self.context = parse_size(self.context, "context")
        names = ("gpus", "context", "output", "max_chunk", "page_size")
        check_positive(self, names, "", "1 is the least")
        if self.gpus > MOST_GPUS:
            raise ValueError(
                f"gpus must be at most {MOST_GPUS}, got {self.gpus}; plan for a part of them"
            )
        if self.decodes is not None and not 1 <= self.decodes <= MOST_DECODES:
            raise ValueError(
                f"decodes must lie in [1, {MOST_DECODES}] or be null, got {self.decodes}; "
                "null finds the best number"
            )
        if not 0 < self.memory_share < 1:
            raise ValueError(
                f"memory_share must lie in (0, 1), got {self.memory_share}; the default is 0.9"
            )

    @property
    def context_tokens(self) -> int:
        return int(self.context)
