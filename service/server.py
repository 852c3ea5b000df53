"""Running the application: one socket, one process or several, orderly ends."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from starlette.applications import Starlette

from service.api.parts import Parts
from service.api.routes import service_version
from service.app import create_app
from service.engine.devices import load_tokenizer
from service.engine.engine import Engine, Load
from service.errors import StartError, UnavailableError
from service.http.keys import ApiKeys
from service.http.protocol import BoundedHttpProtocol, protocol_class
from service.processes.fronts.memory import Arena, Ledger
from service.processes.fronts.pool import Fronts
from service.processes.fronts.remote import RemoteEngine
from service.settings import Settings, environment_warnings
from service.telemetry import logs
from service.telemetry.files import count_in_files
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import find_tracing

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_ADDRESS = 1
EXIT_MODEL = 2
EXIT_ENGINE = 3

_DRAIN_INTERVAL_S = 0.02
_LAST_REQUESTS_S = 0.2
_LAST_ANSWERS_S = 0.5
_OTHER_FILES = 256
_left_behind: list[threading.Thread] = []  # threads that had not ended when the server had


class Server(uvicorn.Server):
    """Uvicorn, except that it stops in order, and that a signal ends in an exit.

    It is unready at once, and goes on listening while it works on accepted requests: new ones are
    refused with an answer instead of a reset. Then it closes idle connections, and ends.
    """

    def __init__(self, config: uvicorn.Config, parts: Parts, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._parts = parts
        self._drain_timeout_s = drain_timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, finish what was accepted, stop."""
        engine, admission = self._parts.engine, self._parts.admission
        engine.start_draining()
        logger.info("draining: %d requests in flight", admission.num_requests)
        deadline_s = time.monotonic() + self._drain_timeout_s
        while admission.num_requests > 0 and time.monotonic() < deadline_s and not self.force_exit:
            await asyncio.sleep(_DRAIN_INTERVAL_S)
        if admission.num_requests > 0:
            await self._give_up()
        self.force_exit = False  # what is left is short, and in order
        # New connections are turned away by the system, those that wait are accepted, and what open ones
        # still send is refused by an answer that closes them. Closing the listener would reset both.
        for listener in sockets or []:
            listener.listen(0)
        await asyncio.sleep(_LAST_REQUESTS_S)
        abort = asyncio.get_running_loop().call_later(_LAST_ANSWERS_S, self._abort_connections)
        await super().shutdown(sockets)
        abort.cancel()
        logger.info("drained")

    async def _give_up(self) -> None:
        """Answer 503 to requests that are not done, and end answers that are not read in time."""
        stopped = UnavailableError(
            "The service stopped before this was done.", self._parts.engine.unavailable().headers
        )
        logger.error(
            "the drain deadline passed: %d requests are given up", self._parts.admission.num_requests
        )
        self._parts.engine.fail_jobs(stopped)
        await asyncio.sleep(_DRAIN_INTERVAL_S)
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedHttpProtocol):
                connection.give_up()
        await asyncio.sleep(_DRAIN_INTERVAL_S)  # whose connection was closed ends by itself
        for task in list(self.server_state.tasks):
            task.cancel()

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT for the time of the block."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()  # so that uvicorn does not raise them again once drained


class FrontServer(Server):
    """A server whose signals are taken by another process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def run(settings: Settings, load: Load = load_tokenizer) -> int:
    """Serve until SIGTERM or SIGINT, which drain requests in flight.

    The address goes to stdout, logs to stderr; what keeps the service from running is one sentence
    on stderr.

    Args:
        settings: everything that can be set.
        load: gives the tokenizer of one device.

    Returns:
        Exit status: 0 after an orderly end, 1 when the address cannot be had, 2 when the model
        cannot be loaded or the settings cannot be met, 3 when the engine hung or died. The process should
        end by `leave_if_stuck`: a thread may still be stuck, or loading.
    """
    logs.configure(settings.log_level, settings.log_format)
    _allow_connections(settings.max_connections)
    for sentence in environment_warnings():
        logger.warning("%s", sentence)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        return _fail(f"cannot listen on {settings.host}:{settings.port}: {reason}", EXIT_ADDRESS)
    others = set(threading.enumerate())
    try:
        engine = (_serve_alone if settings.frontends == 1 else _serve_by_fronts)(settings, listener, load)
    except StartError as exc:
        listener.close()
        return _fail(str(exc), EXIT_MODEL)
    _left_behind.extend(set(threading.enumerate()) - others)
    if engine.failure is not None:
        return _fail(engine.failure, EXIT_ENGINE if engine.broken else EXIT_MODEL)
    return EXIT_OK


def _serve_alone(settings: Settings, listener: socket.socket, load: Load) -> Engine:
    """Serve from this process, which has the engine too."""
    server: Server | None = None

    def stop() -> None:
        if server is not None:
            server.should_exit = True

    app = create_app(settings, load=load, on_failure=stop, on_ready=_set_aside)
    parts: Parts = app.state.parts
    server = Server(uvicorn_config(app, settings, parts.metrics), parts, settings.drain_timeout_s)
    _tell_address(settings, listener)
    server.run(sockets=[listener])
    assert isinstance(parts.engine, Engine)
    return parts.engine


def _serve_by_fronts(settings: Settings, listener: socket.socket, load: Load) -> Engine:
    """Serve from further processes; this one has the engine."""
    ApiKeys(settings)  # what keeps a front from starting is told once, here
    if (tracing := find_tracing(settings.otlp_endpoint, service_version())) is not None:
        tracing.close()
    _tell_address(settings, listener)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        fronts = Fronts(settings, listener, load, _set_aside)
        runner.run(fronts.run())
    return fronts.engine


def run_front(socket_fd: int, arena_fd: int, listener_fd: int, ledger_fd: int, index: int) -> int:
    """Serve as one of several fronts, until the engine's process says that it is time to stop.

    Args:
        socket_fd: the socket to the engine's process.
        arena_fd: memory that this front shares with it.
        listener_fd: the listening socket.
        ledger_fd: memory that all of them share.
        index: of this front.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # whoever signals means the whole service
    settings = Settings()
    logs.configure(settings.log_level, settings.log_format)
    count_in_files(str(index))
    ledger, arena = Ledger(ledger_fd, settings.frontends), Arena(arena_fd)

    async def serve() -> None:
        engine = RemoteEngine(
            ledger.rates,
            arena,
            settings.retry_after_s,
            on_stop=lambda number: server.handle_exit(number, None),
            on_lost=lambda: os._exit(EXIT_ENGINE),
        )
        app = create_app(settings, engine=engine, tally=ledger.tally(index))
        parts: Parts = app.state.parts
        server = FrontServer(uvicorn_config(app, settings, parts.metrics), parts, settings.drain_timeout_s)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: engine, sock=socket.socket(fileno=socket_fd))
        _set_aside()
        await server.serve(sockets=[socket.socket(fileno=listener_fd)])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
    return EXIT_OK


def _tell_address(settings: Settings, listener: socket.socket) -> None:
    sys.stdout.write(f"DRoRAE {settings.checkpoint} on {_address(listener)}\n")
    sys.stdout.flush()


def _set_aside() -> None:
    """Keep the objects of the start out of garbage collections, which stop every thread.

    PyTorch and pydantic alone are some hundred thousand objects: a full collection takes 0.1 s and more.
    """
    gc.collect()
    gc.freeze()


def _allow_connections(num_connections: int) -> None:
    """Raise the limit of open files, often 1024, to the number that the connections need."""
    needed = num_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            logger.warning(
                "max_connections=%d needs %d open files, the system allows %d",
                *(num_connections, needed, allowed),
            )


def leave_if_stuck(status: int) -> None:
    """End the process at once where one of the service's threads is still busy.

    Nobody waits for its batch or answer, but the interpreter would, or would take away what it uses.
    """
    if status == EXIT_ENGINE or any(thread.is_alive() for thread in _left_behind):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def uvicorn_config(app: Starlette, settings: Settings, metrics: Metrics) -> uvicorn.Config:
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
        timeout_graceful_shutdown=1,
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
