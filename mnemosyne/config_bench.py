"""The config of ``mnemosyne bench``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mnemosyne.config import EngineConfig, parse_size

PEERS = ("transformers", "vllm", "llamacpp")


@dataclass(kw_only=True, slots=True)
class BenchConfig(EngineConfig):
    """``mnemosyne bench``: this engine and others side by side on one machine."""

    model: str = "bench"
    dtype: str = "bfloat16"
    peers: list[str] = field(default_factory=list)  # transformers, vllm, llamacpp
    transformers_python: str | None = None  # interpreter that has it; unset: this one
    vllm_python: str | None = None  # likewise
    llamacpp_python: str | None = None  # likewise
    ours: bool = True  # false: the peers alone
    lengths: list[Any] = field(default_factory=lambda: ["16K"])  # tokens of the prompts
    prefill: bool = True  # false: caches are filled with random keys and values
    batch: int = 1  # requests of each length that decode together
    beside: int | str | None = None  # a prompt that comes while a batch over all lengths decodes
    max_tokens: int = 32  # tokens to decode of each request
    start: bool = False  # measure the time to the first token of fresh processes instead
    runs: int = 3  # of each engine, in turns; medians are shown
    threads: int | None = None  # unset: the cores that this process may use
    peer_chunk: int = 2048  # prefill tokens of a step of the peers
    seed: int = 0  # of the ids
    output: str = "mnemosyne-bench.json"
    plot: str | None = "mnemosyne-bench.png"  # null: no picture

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        for peer in self.peers:
            if peer not in PEERS:
                raise ValueError(
                    f"peers must be among {', '.join(PEERS)}, got {peer!r}; write peers=[vllm]"
                )
        self.lengths = [parse_size(length, "lengths") for length in self.lengths]
        if self.beside is not None:
            self.beside = parse_size(self.beside, "beside")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(
                f"lengths must be one length or more, each >= 2, got {self.lengths}; "
                "write lengths=[16K,64K]"
            )
        self._check_counts()

    @property
    def beside_tokens(self) -> int | None:
        """Tokens of the prompt that comes beside decodes, if one does."""
        return None if self.beside is None else int(self.beside)

    def _check_counts(self) -> None:
        smallest = {"batch": 1, "max_tokens": 8, "runs": 1, "peer_chunk": 1, "beside": 1}
        for name, least in {**smallest, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}; raise it")
        if not self.ours and not self.peers:
            raise ValueError("ours must be true where there are no peers, got false; name peers")
        if self.mesh.world_size > 1:
            raise ValueError(
                f"mesh must be one process for bench, got {self.mesh.world_size}; "
                "tools/bench_mesh.py compares meshes"
            )
