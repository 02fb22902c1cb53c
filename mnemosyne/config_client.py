"""Configs of the commands that talk to a server: ``chat`` and ``bench serve``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mnemosyne.config import Duration, EngineConfig, parse_duration, parse_size


def check_url(url: str) -> None:
    """Refuse what is no address of a server.

    Raises:
        ValueError: if it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"url must begin with http:// or https://, got {url!r}; write http://127.0.0.1:8000"
        )


@dataclass(kw_only=True, slots=True)
class ChatConfig(EngineConfig):
    """``mnemosyne chat``: a conversation in the terminal."""

    model: str = "smollm2"
    url: str | None = None  # of a server; unset: the model is loaded here
    api_key: str | None = None  # a file with the key of the server
    system: str | None = None  # what stands before the conversation
    max_tokens: int | None = 512  # of each answer
    temperature: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if self.url is not None:
            check_url(self.url)


@dataclass(kw_only=True, slots=True)
class BenchServeConfig:
    """``mnemosyne bench serve``: load for an OpenAI-compatible server."""

    url: str  # such as http://127.0.0.1:8000
    model: str | None = None  # unset: the first that the server lists
    api_key: str | None = None  # a file with the key
    requests: int = 64
    rate: float | None = None  # requests per second, at random moments; unset: all at once
    concurrency: int | None = None  # at a time; unset: any number
    lengths: list[Any] = field(default_factory=lambda: [256])  # tokens of prompts, drawn evenly
    max_tokens: int = 64  # of each answer
    long: int | str | None = None  # tokens of one more prompt, which comes first
    ttft: Duration = 2.0  # seconds to the first token that count as good
    tbt: Duration = 0.2  # seconds between tokens, at the 99th percentile of a request
    timeout: Duration = 600.0  # seconds for an answer
    ignore_eos: bool = True  # false for servers that do not know the field
    seed: int = 0
    output: str | None = None  # JSONL, one line per request
    plot: str | None = None  # a PNG

    def __post_init__(self) -> None:
        check_url(self.url)
        self.url = self.url.rstrip("/").removesuffix("/v1")
        for name in ("ttft", "tbt", "timeout"):
            setattr(self, name, parse_duration(getattr(self, name), name))
        self.lengths = [parse_size(length, "lengths") for length in self.lengths]
        if self.long is not None:
            self.long = parse_size(self.long, "long")
        for name in ("requests", "concurrency", "max_tokens", "long"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}; raise it")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must each be >= 1, got {self.lengths}; write lengths=[256]")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(
                f"rate must be a positive number, got {self.rate}; 2.0 is two a second"
            )


def read_key(path: str | None) -> str | None:
    """The key in a file.

    Raises:
        ValueError: if it cannot be read.
    """
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError as error:
        raise ValueError(
            f"api_key must be a file that can be read, got {path!r} ({error.strerror}); name one"
        ) from error
