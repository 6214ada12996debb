"""Runs the app of a teacher on uvicorn until a signal ends it; accepted requests are finished first."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from ..core.locks import temporary_folder
from ..core.server_urls import is_loopback_host, is_token
from ..errors import DistillError
from .app import create_app
from .metrics import Metrics
from .teacher import ServedTeacher

TOKEN_VARIABLE = "HF_DISTILL_SERVE_TOKEN"  # noqa: S105  the name of the variable  # nosec B105
_KEEP_ALIVE_SECONDS = 75  # longer than the 5 s of clients, so that a client never sends into a closed connection


def read_token(host: str) -> str | None:
    """Return the token of the environment, or None.

    Args:
        host: the address on which the server listens.

    Raises:
        DistillError: there is none, and the address can be reached from other machines.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not is_token(token):
        raise DistillError(f"The token in {TOKEN_VARIABLE} must consist of printable ASCII characters without spaces.")
    if not token and not is_loopback_host(host):
        raise DistillError(
            f"--host {host} can be reached from other machines, so a token is needed: set the environment variable "
            f"{TOKEN_VARIABLE} to a long random text (for example of `openssl rand -hex 32`), and on the machine of "
            "the student HF_DISTILL_TEACHER_API_KEY to the same text. Or use --host 127.0.0.1."
        )
    return token or None


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address and does not listen yet.

    Args:
        host: name or address.
        port: port; 0 chooses a free one.

    Raises:
        DistillError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise DistillError(
            f"The server cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}. Choose "
            "another --host or --port; --port 0 chooses a free port."
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """A server that ends with success after SIGINT or SIGTERM; a second SIGINT ends it without finishing requests."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], on_stop: Callable[[], None]):
        super().__init__(config)
        self._on_start, self._on_stop = on_start, on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and call `on_start`."""
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call `on_stop`, finish the accepted requests and close all connections."""
        self._on_stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, but do not raise them again at the end."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def serve(
    teacher: ServedTeacher,
    bound: socket.socket,
    *,
    token: str | None,
    max_queued_tokens: int,
    on_start: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> Metrics:
    """Serve a teacher until SIGINT or SIGTERM, and return the metrics.

    Args:
        teacher: the teacher.
        bound: result of `bind`.
        token: see `create_app`.
        max_queued_tokens: see `Batcher`.
        on_start: called when the server listens.
        on_stop: called when it no longer does; accepted requests are finished afterwards.
    """
    metrics = Metrics()
    with temporary_folder("hf-distill-serve-") as folder:
        app = create_app(
            teacher,
            head_file=folder / "head.safetensors",
            token=token,
            max_queued_tokens=max_queued_tokens,
            metrics=metrics,
        )
        config = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        _Server(config, on_start, on_stop).run(sockets=[bound])
    return metrics
