"""Admission of requests: keys, loading, draining, numbers; and the models that there are."""

from __future__ import annotations

import ipaddress
import time
from typing import Any

from starlette.requests import Request

from mnemosyne.config_serve import HttpConfig
from mnemosyne.server.backend import About, Backend
from mnemosyne.server.errors import ApiError, too_much
from mnemosyne.server.keys import Keys
from mnemosyne.server.reading import ANY, Rules, unknown_model

LOADING_RETRY_S = 5.0
DRAINING_RETRY_S = 30.0


class Gate:
    """Checks that requests pass before anything is done for them.

    Args:
        backend: which may be loading.
        config: limits.
    """

    def __init__(self, backend: Backend, config: HttpConfig) -> None:
        self.config = config
        self.keys = Keys(config.api_keys, config.requests_per_minute, config.tokens_per_minute)
        self.about: About | None = None
        self.names: list[str] = list(config.model_names)
        self.is_leaving = False  # /ready says no
        self.is_closed = False  # no request is taken any more
        self.num_taken = 0  # requests from their first byte to the last of their answers
        self._backend = backend
        self._started_s = time.time()

    def know(self, about: About) -> Rules:
        """Take note of the engine; return the facts that its readers need."""
        self.about = about
        if not [name for name in self.names if name != ANY]:
            self.names = [about.model, *self.names]
        limit = self.config.max_tokens
        return Rules(
            model=about.model,
            names=sorted(self.names, key=lambda name: name == ANY),
            vocab_size=about.vocab_size,
            max_model_len=about.max_model_len,
            max_request_tokens=about.max_request_tokens,
            tokenizer_dir=about.tokenizer_dir,
            max_prompts=self.config.max_prompts,
            max_tokens=None if limit is None else int(limit),
        )

    @property
    def is_ready(self) -> bool:
        is_known = self.about is not None and not self.is_leaving
        return is_known and self._backend.status().is_ready

    def check_open(self) -> About:
        """Refuse requests that come too early or too late.

        Raises:
            ApiError: 503.
        """
        if self.is_closed:
            message = "the server is shutting down and takes no request; send it to another one"
            raise too_much(message, DRAINING_RETRY_S, status=503)
        status = self._backend.status()
        if self.about is None or not (status.is_ready or status.is_alive):
            raise too_much(f"the engine is not ready: {status.stage}", LOADING_RETRY_S, status=503)
        return self.about

    def check_operator(self, request: Request) -> None:
        """Let only clients change the server that have a key, or without keys are on this host.

        Raises:
            ApiError: 401 or 403.
        """
        self.keys.check(request.headers.get("authorization"))
        host = request.client.host if request.client is not None else "127.0.0.1"
        if self.keys.is_open and not is_this_host(host):
            raise ApiError(
                403,
                f"client must be on the server's host, got {host}; ask there or set serve.api_keys",
                code="forbidden",
            )

    def models(self) -> list[dict[str, Any]]:
        """List every name, with the lengths that fit, for ``/v1/models``."""
        about = self.check_open()
        fits = {
            "max_model_len": about.max_model_len,
            "max_request_tokens": min(about.max_model_len, about.max_request_tokens),
            "cache_tokens": about.num_pages * about.page_size,
        }
        made = {"object": "model", "created": int(self._started_s), "owned_by": "mnemosyne"}
        return [{"id": name, **made, **fits} for name in self.names if name != ANY]

    def model(self, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            ApiError: 404.
        """
        models = self.models()
        named = {model["id"]: model for model in models}
        if name in named:
            return named[name]
        if ANY in self.names:
            return {**models[0], "id": name}
        raise unknown_model(name, self.names)

    def check_room(self) -> None:
        """Refuse a request that would wait behind too many.

        Raises:
            ApiError: 429.
        """
        limit = self.config.max_waiting
        if self.num_taken >= limit:
            wait_s = self._backend.status().backlog_s
            raise too_much(
                f"requests at a time must be at most serve.max_waiting={limit}, got one more; "
                f"try again in {max(1.0, wait_s):.0f} s",
                wait_s,
            )


def is_this_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, as a test client has
