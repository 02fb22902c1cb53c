"""The ASGI app: routes of OpenAI's API and those that operators use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mnemosyne.config_serve import HttpConfig
from mnemosyne.serve.engine import Engine
from mnemosyne.server.backend import Backend
from mnemosyne.server.dialects import chat, completions
from mnemosyne.server.door import Door
from mnemosyne.server.drain import Drain
from mnemosyne.server.embedded import EmbeddedBackend
from mnemosyne.server.errors import INVALID, NOT_FOUND, ApiError
from mnemosyne.server.exposition import CONTENT_TYPE
from mnemosyne.server.openapi import BODIES, RESPONSES, document
from mnemosyne.server.service import Service, json_response
from mnemosyne.version import VERSION


def create_app(
    backend: Engine | Backend,
    config: HttpConfig | None = None,
    *,
    on_drained: Callable[[], None] = lambda: None,
) -> FastAPI:
    """An app to run under any ASGI server, or to mount in another app.

    Args:
        backend: an idle engine, which it claims while it runs, or what stands for one.
        config: limits; host, port and TLS are the ASGI server's.
        on_drained: called once ``/drain`` has ended all requests.

    Raises:
        ValueError: if the file of API keys cannot be used.

    Example:
        >>> with LLM("smollm2") as llm:
        ...     uvicorn.run(create_app(llm.engine))
    """
    config = config or HttpConfig()
    embedded = EmbeddedBackend(backend) if isinstance(backend, Engine) else None
    service = Service(embedded or backend, config)  # type: ignore[arg-type]
    drain = Drain(service, on_drained)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            service.start()
            stack.push_async_callback(service.stop)
            if embedded is not None:
                await stack.enter_async_context(embedded)
                await service.known()
            yield

    app = FastAPI(
        title="Mnemosyne",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service, app.state.drain = service, drain
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    _handle_errors(app)
    _add_inference(app, service)
    _add_models(app, service)
    _add_operations(app, service, drain)
    _add_middleware(app, service, config)
    return app


def _add_middleware(app: FastAPI, service: Service, config: HttpConfig) -> None:
    app.add_middleware(Door, count=service.totals.count_response, logs=config.access_log)
    if config.cors_origins:
        origins, everything = config.cors_origins, ["*"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=everything,
            allow_headers=everything,
        )


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return Response(error.body(), error.status, error.headers, "application/json")

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        kind = NOT_FOUND if error.status_code == 404 else INVALID
        said = (
            f"path and method must be those of a route, got {request.method} to another one; "
            "see /openapi.json"
        )
        made = ApiError(error.status_code, said, kind=kind, headers=dict(error.headers or {}))
        return await refuse(request, made)


def _add_inference(app: FastAPI, service: Service) -> None:
    def route(path: str, kind: str) -> Any:
        extra = {"requestBody": BODIES[kind]}
        return app.post(path, responses=RESPONSES[kind], openapi_extra=extra)

    @route("/v1/chat/completions", "chat")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, "chat", chat)  # type: ignore[arg-type]

    @route("/v1/completions", "completions")
    async def completion(request: Request) -> Response:
        return await service.answer(request, "completions", completions)  # type: ignore[arg-type]

    @route("/tokenize", "tokenize")
    async def tokenize(request: Request) -> Response:
        return await service.convert(request, "tokenize")

    @route("/detokenize", "detokenize")
    async def detokenize(request: Request) -> Response:
        return await service.convert(request, "detokenize")


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=RESPONSES["models"])
    async def models(request: Request) -> Response:
        service.gate.keys.check(request.headers.get("authorization"))
        return json_response({"object": "list", "data": service.gate.models()})

    @app.get("/v1/models/{model_id:path}", responses=RESPONSES["model"])
    async def model(request: Request, model_id: str) -> Response:
        service.gate.keys.check(request.headers.get("authorization"))
        return json_response(service.gate.model(model_id))


def _add_operations(app: FastAPI, service: Service, drain: Drain) -> None:
    @app.get("/health", responses=RESPONSES["health"])
    async def health() -> Response:
        status = service.backend.status()
        said = {"status": "ok" if status.is_alive else "stuck"}
        said["heartbeat_age_s"] = round(status.heartbeat_age_s, 3)  # type: ignore[assignment]
        return json_response(said, 200 if status.is_alive else 503)

    @app.get("/ready", responses=RESPONSES["ready"])
    async def ready() -> Response:
        status = service.backend.status()
        stage = "draining" if service.gate.is_leaving else status.stage or "ready"
        return json_response({"status": stage}, 200 if service.gate.is_ready else 503)

    @app.get("/metrics", responses=RESPONSES["metrics"])
    async def metrics() -> Response:
        return Response(service.exposition.page(), media_type=CONTENT_TYPE)

    @app.get("/version", responses=RESPONSES["version"])
    async def show_version() -> Response:
        return json_response({"version": VERSION})

    @app.post("/drain", responses=RESPONSES["drain"])
    async def drain_all(request: Request) -> Response:
        service.gate.check_operator(request)
        return json_response(await drain.run())

    @app.post("/cache/clear", responses=RESPONSES["clear"])
    async def clear(request: Request) -> Response:
        service.gate.check_operator(request)
        return json_response({"pages_freed": await service.backend.clear_cache()})
