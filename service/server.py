"""Running the application: one process, one socket, orderly ends."""

import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from service import logs
from service.app import create_app
from service.engine import Engine
from service.metrics import Metrics
from service.protocol import protocol_class
from service.settings import Settings, unknown_variables

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_ADDRESS = 1
EXIT_MODEL = 2


class Server(uvicorn.Server):
    """Uvicorn, except that a shutdown first closes the engine's door, and that a signal ends in an exit."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, answer what is in flight, stop."""
        self._engine.start_draining()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT for the time of the block."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()  # so that uvicorn does not raise them again once drained


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, which drain requests in flight.

    The address goes to stdout, logs to stderr; what keeps the service from running is one sentence
    on stderr.

    Returns:
        Exit status: 0 after an orderly end, 1 when the address cannot be had, 2 when the model
        cannot be loaded.
    """
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown_variables():
        logger.warning("the environment variable %s names no setting and is ignored", name)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        return _fail(f"cannot listen on {settings.host}:{settings.port}: {reason}", EXIT_ADDRESS)
    server: Server | None = None

    def stop() -> None:
        if server is not None:
            server.should_exit = True

    app = create_app(settings, on_failure=stop)
    engine = app.state.pipeline.engine
    config = uvicorn_config(app, settings, app.state.pipeline.metrics)
    server = Server(config, engine)
    sys.stdout.write(f"DRoRAE {settings.checkpoint} on {_address(listener)}\n")
    sys.stdout.flush()
    server.run(sockets=[listener])
    if engine.failure is not None:
        return _fail(engine.failure, EXIT_MODEL)
    return EXIT_OK


def uvicorn_config(app: FastAPI, settings: Settings, metrics: Metrics) -> uvicorn.Config:
    """How uvicorn serves the application: its loop, its parser with our bounds, its timeouts."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol_class(settings, metrics),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here uses the client's address
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one.

    Its connections send small writes at once: an answer's headers and body are two, and the second
    would otherwise wait some 40 ms for the first one's acknowledgement.

    Raises:
        OSError: the address cannot be had.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _fail(reason: str, status: int) -> int:
    sys.stderr.write(f"drorae: {reason}\n")
    return status
