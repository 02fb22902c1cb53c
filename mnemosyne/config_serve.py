"""The config of ``mnemosyne serve``."""

from __future__ import annotations

from dataclasses import dataclass, field

from mnemosyne.config import Duration, EngineConfig, check_types, parse_duration, parse_size

DURATIONS = ("keep_alive", "write_timeout", "shutdown_timeout")


@dataclass(kw_only=True, slots=True)
class HttpConfig:
    """The addresses, clients and limits of a server."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    model_names: list[str] = field(default_factory=list)  # unset: the model's; "any" takes all
    api_keys: str | None = None  # a file, one key per line; unset: no key is asked for
    requests_per_minute: int | None = None  # of each key
    tokens_per_minute: int | None = None  # prompt and output, of each key
    tls_cert: str | None = None  # PEM files, both or neither
    tls_key: str | None = None
    cors_origins: list[str] = field(default_factory=list)  # pages of other hosts that may ask
    max_waiting: int = 1024  # requests accepted and not answered, running ones included
    max_body: int | str = "256M"  # bytes of a request
    max_prompts: int = 256  # of one request
    max_tokens: int | str | None = None  # of a chat answer where the client sets no limit
    readers: int = 2  # processes that parse, render and tokenise
    keep_alive: Duration = 5.0  # seconds of silence before an event says that all is well
    write_timeout: Duration = 60.0  # seconds that a client may leave what is sent to it
    grace: Duration | None = None  # after SIGTERM, while requests are still taken; unset: none
    shutdown_timeout: Duration = 300.0  # seconds for running requests to finish
    # whether streams outlive the engine: requests that a death interrupts go on in the next one
    resume: bool = True
    # unset: the server starts its ranks. A name: ranks that others start come to it by that name
    link: str | None = None
    access_log: bool = True
    log_json: bool = False

    def __post_init__(self) -> None:
        check_types(self, "serve.")
        if not 0 <= self.port < 2**16:
            raise ValueError(
                f"serve.port must lie in [0, 65535], got {self.port}; 8000 is the default"
            )
        self.max_body = parse_size(self.max_body, "serve.max_body")
        if self.max_tokens is not None:
            self.max_tokens = parse_size(self.max_tokens, "serve.max_tokens")
        for name in DURATIONS:
            setattr(self, name, parse_duration(getattr(self, name), f"serve.{name}"))
        if self.grace is not None:
            self.grace = parse_duration(self.grace, "serve.grace")
        least = dict.fromkeys(("max_waiting", "max_body", "max_prompts", "readers"), 1)
        optional = ("requests_per_minute", "tokens_per_minute", "max_tokens")
        for name in (*least, *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"serve.{name} must be >= 1, got {value}; raise it")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                "serve.tls_cert and serve.tls_key must be given together, got one; add the other"
            )


@dataclass(kw_only=True, slots=True)
class ServeConfig(EngineConfig):
    """``mnemosyne serve``: an engine behind OpenAI's API."""

    serve: HttpConfig = field(default_factory=HttpConfig)


@dataclass(kw_only=True, slots=True)
class DrainConfig:
    """``mnemosyne drain URL``: a server finishes what runs and ends."""

    url: str  # of the server, without a path
    api_key: str | None = None  # a file whose first line is a key of its
    timeout: Duration = 3600.0  # seconds, for all of it

    def __post_init__(self) -> None:
        check_types(self)
        self.timeout = parse_duration(self.timeout, "timeout")
