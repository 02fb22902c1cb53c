"""The configs of ``mnemosyne generate`` and ``mnemosyne demo``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mnemosyne.config import Duration, EngineConfig, parse_size


@dataclass(kw_only=True, slots=True)
class GenerateConfig(EngineConfig):
    """``mnemosyne generate``: an engine, prompts and sampling parameters."""

    prompt: str | None = None
    prompts: list[str] = field(default_factory=list)
    prompt_file: str | None = None  # a text file; "-" reads standard input
    token_ids: list[Any] = field(default_factory=list)  # lists of ids, for models without text
    chat: bool = False  # wrap each prompt as a user message in the model's chat template
    stream: bool = True  # print text as it comes (a single prompt)
    output: str | None = None  # JSONL, one line per request
    max_tokens: int | None = 128  # unset: as many as model and cache hold
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None  # by token id
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deadline: Duration | None = None  # seconds, or text such as 2s
    cache_salt: str | None = None


@dataclass(kw_only=True, slots=True)
class DemoConfig(EngineConfig):
    """``mnemosyne demo``: one passkey in a long text, a dozen short requests beside it."""

    model: str = "needle"
    dtype: str = "bfloat16"
    length: int | str = "56K"  # tokens of the long prompt
    depth: float = 0.5  # where the passkey stands, 0 is the beginning
    num_short: int = 12
    seed: int = 0
    plot: str = "mnemosyne-demo.png"

    def __post_init__(self) -> None:
        # zero-argument super() does not survive the class that slots=True rebuilds
        EngineConfig.__post_init__(self)
        self.length = parse_size(self.length, "length")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], got {self.depth}; 0.5 is the middle")
        if self.num_short < 0:
            raise ValueError(f"num_short must be >= 0, got {self.num_short}; the default is 12")

    @property
    def num_tokens(self) -> int:
        """Tokens of the long prompt."""
        return int(self.length)
