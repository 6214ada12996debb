"""The ASGI app: endpoints of `teachers.remote.wire`, authentication, `/health` and `/metrics`."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from ..teachers.remote import wire
from ..teachers.remote.api import RowTensors
from ..teachers.remote.wire import TeacherInfo, TokenizeRequest, TokenTextsRequest, WireError
from .batching import Batcher, QueueFull
from .metrics import Metrics
from .teacher import ServedTeacher

HEALTH, METRICS = "/health", "/metrics"
_BINARY = "application/octet-stream"
_CLIENT_CLOSED_REQUEST = 499  # the status that other servers log; nobody receives it
_Result = TypeVar("_Result")


def create_app(
    teacher: ServedTeacher, *, head_file: Path, token: str | None, max_queued_tokens: int, metrics: Metrics
) -> Starlette:
    """Return the app of a teacher.

    Args:
        teacher: the teacher; its `info` has the limits of requests.
        head_file: file that is written with the output head, from which it is sent.
        token: token that requests must send as a bearer token, except for /health; None: none.
        max_queued_tokens: see `Batcher`.
        metrics: counters.
    """
    wire.write_head(teacher.head, head_file)
    batcher = Batcher(
        teacher.compute_rows,
        max_batch_tokens=teacher.info.max_request_tokens,
        max_queued_tokens=max_queued_tokens,
        metrics=metrics,
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        await run_in_threadpool(batcher.close)

    endpoints = _Endpoints(teacher, batcher, head_file, metrics)
    routes = [
        Route(HEALTH, endpoints.health),
        Route(METRICS, endpoints.metrics),
        Route(wire.INFO, endpoints.info),
        Route(wire.HEAD, endpoints.head),
        Route(wire.HIDDEN_STATES, endpoints.hidden_states, methods=["POST"]),
        Route(wire.TOKENIZE, endpoints.tokenize, methods=["POST"]),
        Route(wire.TOKEN_TEXTS, endpoints.token_texts, methods=["POST"]),
    ]
    middleware = [Middleware(_CountRequests, metrics=metrics, paths={route.path for route in routes})]
    if token is not None:
        middleware.append(Middleware(_RequireToken, token=token))
    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _answer_error, Exception: _answer_failure},
    )


class _Endpoints:
    """The endpoints of a teacher."""

    def __init__(self, teacher: ServedTeacher, batcher: Batcher, head_file: Path, metrics: Metrics):
        self._teacher, self._batcher, self._head_file, self._metrics = teacher, batcher, head_file, metrics

    async def health(self, request: Request) -> Response:
        """Answer that the server is ready; it does not listen before."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Return all counters."""
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def info(self, request: Request) -> Response:
        """Return the `TeacherInfo`."""
        return JSONResponse(self._teacher.info.model_dump())

    async def head(self, request: Request) -> Response:
        """Return the output head, `wire.write_head`."""
        return FileResponse(self._head_file, media_type=_BINARY)

    async def hidden_states(self, request: Request) -> Response:
        """Return the last hidden states of rows, and outputs of layers, `wire.encode_hidden_states`."""
        info = self._teacher.info
        rows, dtype = await _read(request, info.max_request_bytes, partial(wire.parse_request, info=info))
        try:
            computed = await _wait(request, self._batcher.submit(rows))
        except QueueFull as error:
            raise HTTPException(503, str(error), {"Retry-After": str(error.retry_after)}) from None
        return Response(await run_in_threadpool(_encode, computed, dtype, info), media_type=_BINARY)

    async def tokenize(self, request: Request) -> Response:
        """Return the ids of a text, without special tokens."""
        tokenizer = self._tokenizer()
        body = await _read(request, self._teacher.info.max_request_bytes, partial(wire.parse, TokenizeRequest))
        return JSONResponse({"ids": list(tokenizer(body.text, add_special_tokens=False)["input_ids"])})

    async def token_texts(self, request: Request) -> Response:
        """Return the text of each of some ids."""
        tokenizer, info = self._tokenizer(), self._teacher.info
        body = await _read(request, info.max_request_bytes, partial(wire.parse, TokenTextsRequest))
        if body.ids and max(body.ids) >= info.embeddings:
            raise HTTPException(400, f"the id {max(body.ids)} is beyond the teacher's ids, 0 to {info.embeddings - 1}")
        return JSONResponse({"texts": [str(tokenizer.decode([token_id])) for token_id in body.ids]})

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._teacher.tokenizer is None:
            raise HTTPException(404, "the served model has no tokenizer")
        return self._teacher.tokenizer


def _encode(rows: Sequence[RowTensors], dtype: str, info: TeacherInfo) -> bytes:
    """Return the body of an answer with hidden states.

    Raises:
        HTTPException: they are not finite, or not after they were rounded to `dtype`.
    """
    if not all(tensor.to(wire.DTYPES[dtype]).isfinite().all() for row in rows for tensor in row.values()):
        raise HTTPException(
            422, f"the hidden states of the teacher in {dtype} are not finite: use another dtype, or another --dtype"
        )
    return wire.encode_hidden_states(rows, dtype, info)


async def _read(request: Request, max_bytes: int, parse: Callable[[bytes], _Result]) -> _Result:
    """Return the parsed body of a request.

    Raises:
        HTTPException: it is longer than `max_bytes`, or is not what it should be.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise HTTPException(413, f"the request has more than {max_bytes} bytes")
    except ClientDisconnect:
        raise HTTPException(_CLIENT_CLOSED_REQUEST, "the client closed the connection") from None
    try:
        return parse(bytes(body))
    except WireError as error:
        raise HTTPException(400, str(error)) from None


async def _wait(request: Request, result: "Future[_Result]") -> _Result:
    """Wait for a result, which is cancelled if the client closes the connection.

    Raises:
        HTTPException: the client closed it.
    """
    waiting = asyncio.wrap_future(result)
    closed = asyncio.ensure_future(_closed(request))
    either: list[asyncio.Future] = [waiting, closed]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise HTTPException(_CLIENT_CLOSED_REQUEST, "the client closed the connection")
        return waiting.result()
    finally:
        closed.cancel()
        waiting.cancel()


async def _closed(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": {"message": error.detail}}, error.status_code, error.headers)


async def _answer_failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": {"message": f"{type(error).__name__}: {error}"}}, 500)


class _RequireToken:
    """Refuses requests without the bearer token, except for /health."""

    def __init__(self, app: ASGIApp, token: str):
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != HEALTH:
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, self._expected):
                headers = {"WWW-Authenticate": "Bearer"}
                refused = JSONResponse({"error": {"message": "a bearer token is missing or wrong"}}, 401, headers)
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _CountRequests:
    """Counts requests by path and status, and their seconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, is_counted = time.monotonic(), False
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def send_counted(message: Message) -> None:
            nonlocal is_counted
            if message["type"] == "http.response.start":  # before the client reads the answer
                self._metrics.count("requests_total", path=path, status=f"{message['status']}")
                is_counted = True
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            if not is_counted:  # the answer to an error that no handler expected is sent outside of this middleware
                self._metrics.count("requests_total", path=path, status="500")
            raise
        finally:
            if path == wire.HIDDEN_STATES:
                self._metrics.observe("request_seconds", time.monotonic() - start)
