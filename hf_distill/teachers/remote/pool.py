"""`ServerPool`: requests to the servers of one teacher, with retries on another server and bounded concurrency."""

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
from transformers.utils import logging

from ...core.defaults import CONCURRENT_REQUESTS, REQUEST_TIMEOUT_SECONDS, RETRY_SECONDS
from ...core.escape import printable
from ...core.server_urls import DEFAULT_KEY_VARIABLE, is_loopback, read_api_key, server_urls
from ...errors import DistillError, RunError

logger = logging.get_logger(__name__)
Answer = TypeVar("Answer")
Item = TypeVar("Item")
_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.25, 30.0
_RETRIED_STATUS = {408, 425, 429}  # and all from 500 on
_NOT_AUTHORIZED_STATUS = {401, 403}
_CANCELLED = "The requests to the teacher server were cancelled"
_SHOWN_CHARACTERS = 400  # of a response in an error


class MalformedAnswer(ValueError):
    """An answer with status 200 that is not what the protocol promises; the request is sent again."""


class ServerFailure(RunError):
    """A server did not answer correctly after all retries; the message names the URL and the last response."""


class RequestRefused(RunError):
    """A server refused a request with a status that a retry does not change.

    status:  HTTP status
    message: the server's text
    """

    def __init__(self, url: str, status: int, message: str):
        super().__init__(f"{url} answered with HTTP {status}: {message}")
        self.url, self.status, self.message = url, status, message

    @property
    def is_about_key(self) -> bool:
        """Whether the server refused the API key; the message says what to do."""
        return self.status in _NOT_AUTHORIZED_STATUS


@dataclass
class _Server:
    """State of one URL in this process."""

    url: str
    client: httpx2.Client
    in_flight: int = 0
    failures: int = 0  # since the last success
    usable_at: float = 0.0  # seconds, monotonic


class _Session:
    """Connections and threads of one process."""

    def __init__(self, urls: Sequence[str], timeout: float, concurrency: int, api_key: str | None):
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.process = os.getpid()
        self.servers = [
            _Server(url, httpx2.Client(headers=headers, timeout=timeout, limits=limits, trust_env=not is_loopback(url)))
            for url in urls
        ]
        self.executor = ThreadPoolExecutor(concurrency, thread_name_prefix="remote-teacher")
        self.lock, self.closed = threading.Lock(), threading.Event()

    def close(self) -> None:
        """Cancel all requests: those that wait for a thread or a server, and those in flight."""
        self.closed.set()
        self.executor.shutdown(wait=False, cancel_futures=True)
        for server in self.servers:
            server.client.close()

    def acquire(self, url: str | None) -> _Server:
        """Wait until a server is usable, and choose the one with the fewest requests in flight.

        Raises:
            ServerFailure: the session was closed.
        """
        servers, delay = [each for each in self.servers if url in (None, each.url)], 0.0
        while not self.closed.wait(delay):
            with self.lock:
                now = time.monotonic()
                usable = [each for each in servers if each.usable_at <= now]
                if usable:
                    server = min(usable, key=lambda each: (each.in_flight, each.failures))
                    server.in_flight += 1
                    return server
                delay = min(each.usable_at for each in servers) - now
        raise ServerFailure(_CANCELLED)

    def release(self, server: _Server, is_failure: bool, retry_after: float | None = None) -> None:
        """Record the end of a request; after a failure the server rests."""
        with self.lock:
            server.in_flight -= 1
            if not is_failure:
                server.failures, server.usable_at = 0, 0.0
                return
            now = time.monotonic()
            if server.usable_at <= now:  # requests that failed at the same time count once
                delay = min(_FIRST_DELAY_SECONDS * 2**server.failures, _MAX_DELAY_SECONDS)
                server.failures = min(server.failures + 1, 16)
                server.usable_at = now + delay * (0.75 + 0.5 * _JITTER.random())
            if retry_after is not None:
                server.usable_at = max(server.usable_at, now + retry_after)

    def usable_at(self, url: str | None) -> float:
        """Return when the first server is usable, monotonic."""
        with self.lock:
            return min(each.usable_at for each in self.servers if url in (None, each.url))


class ServerPool:
    """The servers of one teacher. Its methods may be called from any thread; a forked or unpickled copy reconnects.

    A request goes to the URL with the fewest requests in flight. After a failure (no connection, a timeout, status 408,
    425, 429 or 5xx, or a malformed answer) its URL rests for a time that doubles with each failure, or for the time of
    `Retry-After`, and the request is sent to another URL, or to the same one if there is no other.

    Args:
        urls: base URLs.
        timeout: seconds without a byte of the answer until a request counts as failed.
        retry_seconds: time after its first failure for which a request is repeated.
        concurrency: largest number of requests in flight in this process.
        api_key_env: name of the environment variable with the API key; None: `HF_DISTILL_TEACHER_API_KEY` if it is set.

    Raises:
        DistillError: an argument is wrong, or the named environment variable is not set.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        timeout: float = REQUEST_TIMEOUT_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        concurrency: int = CONCURRENT_REQUESTS,
        api_key_env: str | None = None,
    ):
        self.urls = server_urls(urls)
        if type(concurrency) is not int or concurrency < 1:
            raise DistillError(f"concurrency of a remote teacher is {concurrency!r}; it must be an integer above 0")
        if not _is_number(timeout) or timeout <= 0:
            raise DistillError(f"timeout of a remote teacher is {timeout!r}; it must be a number of seconds above 0")
        if not _is_number(retry_seconds) or retry_seconds < 0:
            raise DistillError(
                f"retry_seconds of a remote teacher is {retry_seconds!r}; it must be a number of seconds, at least 0"
            )
        read_api_key(api_key_env)
        self.timeout, self.retry_seconds, self.concurrency = timeout, retry_seconds, concurrency
        self._api_key_env, self._opening = api_key_env, threading.Lock()
        self._session: _Session | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments; connections and the key are those of a process."""
        return self.__dict__ | {"_session": None, "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock())

    def close(self) -> None:
        """Cancel all requests and close the connections; the next request opens new ones."""
        session, self._session = self._session, None
        if session is not None and session.process == os.getpid():
            session.close()

    def _open(self) -> _Session:
        """Return the session of this process; that of a parent process is left to it."""
        with self._opening:
            if self._session is None or self._session.process != os.getpid():
                key = read_api_key(self._api_key_env)
                self._session = _Session(self.urls, self.timeout, self.concurrency, key)
            return self._session

    def map(self, function: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """Call a function for each item in up to `concurrency` threads, and return the results in order.

        Raises:
            RunError: that of the first call that failed; calls for other items that have not started are cancelled.
        """
        executor = self._open().executor
        try:
            futures: list[Future[Answer]] = [executor.submit(function, item) for item in items]
        except RuntimeError:  # another thread closed the session
            raise ServerFailure(_CANCELLED) from None
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in done:
            if future.cancelled():
                raise ServerFailure(_CANCELLED)
            if (error := future.exception()) is not None:
                raise error
        return [future.result() for future in futures]

    def request(
        self,
        path: str,
        body: dict[str, Any] | None,
        parse: Callable[[Any], Answer],
        *,
        url: str | None = None,
        retry_seconds: float | None = None,
        read: Callable[[httpx2.Response], Any] | None = None,
    ) -> Answer:
        """Send a request until a server answers it correctly.

        Args:
            path: the part of the URL after the base URL.
            body: JSON of a POST request; None sends a GET request.
            parse: converts what `read` returns; raises `MalformedAnswer` if it is not what it should be.
            url: the only server to ask; None chooses one.
            retry_seconds: see the class; None: that of the pool.
            read: reads the body of the response; None: as JSON.

        Raises:
            ServerFailure: no server answered correctly in time.
            RequestRefused: a server refused the request.
        """
        retry_seconds = self.retry_seconds if retry_seconds is None else retry_seconds
        session, first_failure, attempts = self._open(), 0.0, 0
        while True:
            server = session.acquire(url)
            attempts += 1
            problem, retry_after = self._send(session, server, path, body)
            if not isinstance(problem, str):
                try:
                    answer = parse((read or _read_json)(problem))
                except MalformedAnswer as error:
                    problem = f"a malformed answer: {error}"
                else:
                    session.release(server, is_failure=False)
                    return answer
            session.release(server, is_failure=True, retry_after=retry_after)
            if session.closed.is_set():  # its connections fail because they were closed
                raise ServerFailure(_CANCELLED)
            now = time.monotonic()
            first_failure = first_failure or now
            logger.warning(f"The teacher server {server.url} failed (attempt {attempts}): {problem}")
            if max(now, session.usable_at(url)) > first_failure + retry_seconds or not retry_seconds:
                count = "1 attempt" if attempts == 1 else f"{attempts} attempts in {now - first_failure:.0f} s"
                raise ServerFailure(f"The teacher server {server.url} failed after {count}: {problem}")

    def _send(
        self, session: _Session, server: _Server, path: str, body: dict[str, Any] | None
    ) -> tuple[httpx2.Response | str, float | None]:
        """Send one request; return the response or what went wrong, and the seconds of `Retry-After`.

        Raises:
            RequestRefused: the server refused it.
        """
        url = server.url + path
        try:
            response = server.client.get(url) if body is None else server.client.post(url, json=body)
        except httpx2.TimeoutException:
            return f"no answer within {self.timeout:g} s", None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return f"{type(error).__name__}: {self._shown(str(error))}", None
        except RuntimeError as error:  # the session was closed
            return f"the connection was closed: {error}", None
        if response.status_code == 200:
            return response, None
        text = self._shown(_error_text(response))
        if response.status_code in _RETRIED_STATUS or response.status_code >= 500:
            return f"HTTP {response.status_code}: {text}", _retry_after(response)
        session.release(server, is_failure=False)
        if response.status_code in _NOT_AUTHORIZED_STATUS:
            text = f"{text.rstrip('.')}. {self._key_remedy()}"
        raise RequestRefused(url, response.status_code, text)

    def _key_remedy(self) -> str:
        """Return what to do if a server refuses the API key, or the request without one."""
        variable = self._api_key_env or DEFAULT_KEY_VARIABLE
        started_with = "with which the server was started (--api-key; for hf-distill serve HF_DISTILL_SERVE_TOKEN)"
        if read_api_key(self._api_key_env) is None:
            return (
                f"No API key was sent: set the environment variable {variable} to the key {started_with}, or name "
                "another variable in api_key_env"
            )
        return (
            f"The server does not accept the API key of the environment variable {variable}: set it to the key "
            f"{started_with}"
        )

    def _shown(self, text: str) -> str:
        """Return the text of a server for a message: short, printable, and without the API key."""
        with suppress(DistillError):
            if key := read_api_key(self._api_key_env):
                text = text.replace(key, "***")
        text = " ".join(printable(text).split())
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_JITTER = random.SystemRandom()  # the seeded generator belongs to the training


def _read_json(response: httpx2.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswer(f"it is no JSON ({error})") from None


def _error_text(response: httpx2.Response) -> str:
    """Return the message of an error response: of vLLM and SGLang a field of a JSON object, else the text."""
    text = response.text[: 16 * _SHOWN_CHARACTERS]
    try:
        body = json.loads(text)
    except ValueError:
        return text
    for _ in range(2):  # {"error": {"message": ...}}, {"message": ...}, {"detail": ...}
        if isinstance(body, dict):
            body = next((body[key] for key in ("error", "message", "detail") if key in body), body)
    return body if isinstance(body, str) else text


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds of the header `Retry-After`, which holds seconds or a date; None if there is none."""
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    with suppress(ValueError):
        return max(float(value), 0.0) if math.isfinite(float(value)) else None
    with suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
