"""Work of the routes: who may ask, how much is taken, and the life of a request."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mnemosyne.config_serve import HttpConfig
from mnemosyne.request import SamplingParams
from mnemosyne.server.answer import Answer, Part
from mnemosyne.server.backend import Backend, Event, Overloaded
from mnemosyne.server.body import Body, Gone
from mnemosyne.server.dialects import Dialect
from mnemosyne.server.errors import FAILED, ApiError, invalid, too_much
from mnemosyne.server.exposition import Exposition, HttpTotals, Timer
from mnemosyne.server.gate import Gate
from mnemosyne.server.inquiry import Inquiry
from mnemosyne.server.merging import merged
from mnemosyne.server.presence import while_present
from mnemosyne.server.progress import PromptProgress
from mnemosyne.server.readers import Readers
from mnemosyne.server.streams import EventStream
from mnemosyne.server.token_names import TokenNames
from mnemosyne.server.upload import LINE_BYTES, Upload, is_upload

log = logging.getLogger(__name__)

FIRST_S = 0.05  # what a stream's headers wait for a refusal
PART_IDS = 1 << 14  # that are written at a time, in 1 ms
GONE = 499  # status of a request whose client left, for the log


class Service:
    """One server over one backend.

    Args:
        backend: serves the jobs.
        config: limits.
    """

    def __init__(self, backend: Backend, config: HttpConfig) -> None:
        self.backend, self.config = backend, config
        self.gate = Gate(backend, config)
        self.totals = HttpTotals()
        self._answers: dict[str, Answer] = {}
        self._readers = Readers(config.readers)
        self._token_names = TokenNames(self._readers.token_bytes)
        self._knowing: asyncio.Task[None] | None = None
        self.exposition = Exposition(
            self.totals, backend.status, lambda: list(self._answers.values())
        )

    def start(self) -> None:
        """Start the readers, and wait for the engine to be known."""
        self.loop = asyncio.get_running_loop()
        self._readers.start()
        self._knowing = asyncio.ensure_future(self._know())

    async def known(self) -> None:
        """Wait until requests can be read."""
        assert self._knowing is not None, "it was started"
        await self._knowing

    async def stop(self) -> None:
        if self._knowing is not None:
            self._knowing.cancel()
            await asyncio.gather(self._knowing, return_exceptions=True)
        await self._readers.close()

    async def _know(self) -> None:
        self._readers.know(self.gate.know(await self.backend.about()))

    async def answer(self, request: Request, kind: str, dialect: Dialect) -> Response:
        """Answer a request of some dialect.

        Args:
            request: whose body is not read yet.
            kind: of the body, as workers call it.
            dialect: how the answer is written.

        Raises:
            ApiError: if it is refused.
        """
        who = self.gate.keys.check(request.headers.get("authorization"))
        self.gate.check_open()
        self.gate.check_room()
        self.gate.keys.admit(who)
        self.gate.num_taken += 1
        is_passed_on = False
        try:
            if kind == "completions" and is_upload(request):
                inquiry, prompts = await self._gather(request, who)
            else:
                inquiry, prompts = await self._inquire(request, kind, who)
            answer = Answer(f"{dialect.PREFIX}{request.state.request_id}", inquiry, prompts)
            self._accept(answer, who, request)
            response = await self._respond(answer, dialect, request, who)
            is_passed_on = isinstance(response, StreamResponse)
            return response
        except Gone:
            return Response(status_code=GONE)
        finally:
            if not is_passed_on:
                self.gate.num_taken -= 1

    async def convert(self, request: Request, kind: str) -> Response:
        """Answer a request that a worker answers alone.

        Raises:
            ApiError: if it is refused.
        """
        self.gate.keys.admit(self.gate.keys.check(request.headers.get("authorization")))
        self.gate.check_open()
        self.gate.check_room()
        self.gate.num_taken += 1
        try:
            said, ids = await self.read(request, kind)
        except Gone:
            return Response(status_code=GONE)
        finally:
            self.gate.num_taken -= 1
        if kind != "tokenize":
            return json_response(said)
        return StreamingResponse(_with_tokens(said, ids), media_type="application/json")

    async def read(self, request: Request, kind: str) -> tuple[Any, np.ndarray]:
        """Read a body in a worker.

        Raises:
            ApiError: if it is refused.
            Gone: if the client left meanwhile.
        """
        announced = request.headers.get("content-length", "")
        wait_s = float(self.config.write_timeout)
        with closing(Body(int(self.config.max_body), wait_s)) as body:
            size = int(announced) if announced.isdecimal() else None
            await body.receive(request.receive, size)
            return await while_present(request.receive, self._readers.read(kind, body))

    async def _inquire(
        self, request: Request, kind: str, who: str
    ) -> tuple[Inquiry, list[np.ndarray]]:
        said, ids = await self.read(request, kind)
        inquiry = _inquiry(said, request)
        self.gate.keys.take_tokens(who, len(ids))
        return inquiry, np.split(ids, np.cumsum(inquiry.num_tokens)[:-1])

    async def _gather(self, request: Request, who: str) -> tuple[Inquiry, list[np.ndarray]]:
        """The same of an upload in pieces, most of whose prompt is prefilled by then."""
        limit, wait_s = int(self.config.max_body), float(self.config.write_timeout)
        # tokens count as they come: they are prefilled even if the end of the upload never does
        count = partial(self.gate.keys.take_tokens, who)
        upload = Upload(request.receive, limit, wait_s, count)
        with closing(Body(LINE_BYTES)) as body:
            body.add(await upload.opening())
            said, _ = await self._readers.read("opening", body)
        inquiry = _inquiry(said, request)
        params, name = self._salted(inquiry.sampling(), who), request.state.request_id
        try:
            ids = await upload.prompt(self.backend, self.gate.check_open(), params, name)
        except (ValueError, Overloaded, RuntimeError) as error:
            raise _refused(error) from error
        inquiry.num_tokens = [len(ids)]
        return inquiry, [ids]

    def _salted(self, params: SamplingParams, who: str) -> SamplingParams:
        """Parameters under which no other key can find out what this one has cached."""
        if self.gate.keys.is_open:
            return params
        salted = f"{who} {params.cache_salt or ''}"
        return replace(params, cache_salt=hashlib.sha256(salted.encode()).hexdigest())

    def _accept(self, answer: Answer, who: str, request: Request) -> None:
        answer.params = self._salted(answer.params, who)
        self.totals.accept(answer)
        self._answers[answer.id] = answer
        request.state.note = {"prompt_tokens": answer.num_prompt_tokens}

    async def _respond(
        self, answer: Answer, dialect: Dialect, request: Request, who: str
    ) -> Response:
        timer = Timer(self.totals)
        progress = PromptProgress(answer, self.backend.status)
        events = merged(self.backend, answer.jobs())

        def end(outcome: str) -> None:
            self._answers.pop(answer.id, None)
            self.totals.count_end(outcome)
            timer.end(answer)
            self.gate.keys.take_tokens(who, answer.num_output_tokens)
            request.state.note["output_tokens"] = answer.num_output_tokens
            request.state.note["end"] = outcome

        if answer.inquiry.stream:
            try:
                first = await begun(events)
            except BaseException as error:
                end("failed")
                raise _refused(error) from error
            stream = EventStream(
                answer,
                events,
                first,
                dialect,
                names=self._token_names,
                progress=progress,
                timer=timer,
                keep_alive_s=float(self.config.keep_alive),
                write_s=float(self.config.write_timeout),
            )
            return StreamResponse(stream, self, end)
        outcome = "left"
        try:
            parts = await while_present(request.receive, self._collect(answer, events, timer))
            outcome = "finished"
        except (ValueError, Overloaded, RuntimeError) as error:
            outcome = "failed"
            raise _refused(error) from error
        finally:
            end(outcome)
        if not answer.inquiry.logprobs:
            return json_response(dialect.whole(answer, parts, self._token_names))
        # of a long prompt they take seconds to write: not on the loop
        return await asyncio.to_thread(
            lambda: json_response(dialect.whole(answer, parts, self._token_names))
        )

    async def _collect(
        self, answer: Answer, events: AsyncIterator[tuple[int, Event]], timer: Timer
    ) -> list[Part]:
        """All that the choices say."""
        parts: dict[int, Part] = {}
        async with aclosing(events) as stream:  # type: ignore[type-var]
            async for prompt, event in stream:
                part = answer.enter(prompt, event)
                if event.finish_reason in ("error", "cancelled"):
                    raise RuntimeError(event.error or "the server ended the request")
                if part is None:
                    continue
                timer.note(part.index, len(event.token_ids))
                if part.index in parts:
                    parts[part.index].add(part)
                else:
                    parts[part.index] = part
        if answer.inquiry.logprobs:
            for part in parts.values():
                await self._token_names.learn(part.logprobs, part.prompt_logprobs, part.echoed_ids)
        return [parts[index] for index in sorted(parts)]

    def release(self) -> None:
        """Forget a request whose stream is at its end."""
        self.gate.num_taken -= 1


class StreamResponse(Response):
    """A stream as a response of the framework, and what is to be done behind its end."""

    def __init__(self, stream: EventStream, service: Service, end: Any) -> None:
        super().__init__()
        self._stream, self._service, self._end = stream, service, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._stream(scope, receive, send)
        finally:
            self._service.release()
            self._end(self._stream.outcome)


async def begun(events: AsyncIterator[tuple[int, Event]]) -> asyncio.Future[tuple[int, Event]]:
    """The first event, on its way or there.

    Raises:
        ValueError: if the job is refused within a moment.
        Overloaded: likewise.
    """
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=FIRST_S)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        raise
    return first


def _inquiry(said: Any, request: Request) -> Inquiry:
    inquiry = msgspec.convert(said, Inquiry)
    if inquiry.ignored:
        log.info("%s: ignored fields: %s", request.state.request_id, ", ".join(inquiry.ignored))
    return inquiry


async def _with_tokens(said: dict[str, Any], ids: np.ndarray) -> AsyncIterator[bytes]:
    """JSON of what was said with all ids, by parts: some millions would hold the loop."""
    yield msgspec.json.encode({**said, "tokens": []})[:-2]
    for start in range(0, len(ids), PART_IDS):
        part = msgspec.json.encode(ids[start : start + PART_IDS].tolist())
        yield (b"," if start else b"") + part[1:-1]
        await asyncio.sleep(0)  # others first: a client that keeps up never lets this wait
    yield b"]}"


def json_response(content: Any, status: int = 200) -> Response:
    data = msgspec.json.encode(content)
    return Response(data, status, media_type="application/json")


def _refused(error: BaseException) -> BaseException:
    """Turn an error of the backend into what a client is told."""
    if isinstance(error, Overloaded):
        return too_much(str(error), error.retry_after_s)
    if isinstance(error, ValueError):
        return invalid(error)
    if isinstance(error, RuntimeError):
        return ApiError(500, str(error), kind=FAILED, code="engine_error")
    return error
