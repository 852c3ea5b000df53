"""Running the application: one process, one socket, orderly ends."""

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from service.app import create_app
from service.engine import Load, load_tokenizer
from service.errors import UnavailableError
from service.pipeline import Pipeline
from service.settings import Settings, unknown_variables

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_ADDRESS = 1
EXIT_MODEL = 2
EXIT_ENGINE = 3

_DRAIN_INTERVAL_S = 0.02
_LAST_REQUESTS_S = 0.2
_LAST_ANSWERS_S = 5


class Server(uvicorn.Server):
    """Uvicorn, except that it stops in order, and that a signal ends in an exit.

    It is unready at once, and goes on listening while it works on what it accepted: new requests are
    refused with an answer instead of a reset. Then it closes what is idle, and ends.
    """

    def __init__(self, config: uvicorn.Config, pipeline: Pipeline, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._pipeline = pipeline
        self._drain_timeout_s = drain_timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, finish what was accepted, stop."""
        engine, admission = self._pipeline.engine, self._pipeline.admission
        engine.start_draining()
        accepted = admission.num_requests
        logger.info("draining: %d requests in flight", accepted)
        deadline_s = time.monotonic() + self._drain_timeout_s
        while admission.num_requests > 0 and time.monotonic() < deadline_s:
            await asyncio.sleep(_DRAIN_INTERVAL_S)
        if left := admission.num_requests:
            logger.error("the drain deadline passed: %d requests are answered 503", left)
            engine.fail_jobs(UnavailableError("The service stopped before this was done."))
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        await asyncio.sleep(_LAST_REQUESTS_S)  # what open connections still send is refused, and closes them
        await super().shutdown(sockets)
        logger.info("drained")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT for the time of the block."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()  # so that uvicorn does not raise them again once drained


def run(settings: Settings, load: Load = load_tokenizer) -> int:
    """Serve until SIGTERM or SIGINT, which drain requests in flight.

    The address goes to stdout, logs to stderr; what keeps the service from running is one sentence
    on stderr.

    Args:
        settings: everything that can be set.
        load: gives the tokenizer of one device.

    Returns:
        Exit status: 0 after an orderly end, 1 when the address cannot be had, 2 when the model
        cannot be loaded, 3 when the engine hung or died; after 3 a thread may still be stuck, so the
        process should end by `leave_if_stuck`.
    """
    _configure_logging(settings.log_level)
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

    app = create_app(settings, load=load, on_failure=stop)
    pipeline = app.state.pipeline
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    server = Server(config, pipeline, settings.drain_timeout_s)
    sys.stdout.write(f"DRoRAE {settings.checkpoint} on {_address(listener)}\n")
    sys.stdout.flush()
    server.run(sockets=[listener])
    engine = pipeline.engine
    if engine.failure is not None:
        return _fail(engine.failure, EXIT_ENGINE if engine.broken else EXIT_MODEL)
    return EXIT_OK


def leave_if_stuck(status: int) -> None:
    """End the process at once where a device may hang, which would keep the interpreter from ending."""
    if status == EXIT_ENGINE:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its lifecycle lines say what ours do
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients' mistakes, told to them


def _fail(reason: str, status: int) -> int:
    sys.stderr.write(f"drorae: {reason}\n")
    return status
