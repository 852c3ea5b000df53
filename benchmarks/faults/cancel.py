"""Cancelled connections: requests without a client must free their place and never be computed."""

import asyncio
import random
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.faults.fuzz.campaign import inputs_for
from benchmarks.harness.service import Service, launch
from benchmarks.probes.checks import Check, Findings, Options
from benchmarks.probes.inputs import encode_request
from benchmarks.probes.wire import Answer, Connection, exchange

NUM_CONNECTIONS, QUICK_CONNECTIONS = 500, 20
_SETTLE_S = 30.0
_POLL_S = 0.05
_AT_ONCE = 50
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def run_cancel(options: Options) -> list[Check]:
    """The scenario: the device is busy, requests wait for it, their clients close, the device goes on."""
    findings = Findings("cancel")
    with tempfile.TemporaryDirectory(prefix="drorae-gate-") as folder:
        gate = Path(folder, "shut")
        settings = {
            "cpu_workers": "1",
            "queue_limit_items": "1024",
            "hang_timeout_s": "600",
            "request_timeout_s": "3600",  # so that none is refused for a deadline that it might miss
            "max_request_timeout_s": "3600",
            "log_level": "error",
            **options.settings,
        }
        with launch(settings, "benchmarks.faults.faulty_service", ["gate", "--file", str(gate)]) as service:
            asyncio.run(_cancel(service, gate, options, findings))
    return findings.checks


async def _cancel(service: Service, gate: Path, options: Options, findings: Findings) -> None:
    count = QUICK_CONNECTIONS if options.quick else NUM_CONNECTIONS
    inputs = inputs_for(service, options)
    photos = [encode_request(photo) for photo in inputs.photos]
    await exchange(service.url, photos[0])
    gate.touch()
    busy = asyncio.create_task(exchange(service.url, photos[0], timeout_s=300))
    await asyncio.sleep(0.5)  # the device takes it; nothing outside shows when
    before = _work(service)
    disconnects = service.metric("drorae_disconnects_total")
    connections = await _send_all(service, photos, count)
    waiting = await _eventually(lambda: _waiting(service) >= count)
    findings.report("connections", len(connections))
    findings.exactly("requests that wait for the busy device", waiting, 1)
    rng, started_s = random.Random(options.seed), time.monotonic()
    for connection in connections:
        _leave(connection, rng)
    freed = await _eventually(lambda: service.metric("drorae_pending_items") <= 1)
    findings.exactly("places freed while the device is busy", freed, 1)
    findings.at_most("seconds until all are free", time.monotonic() - started_s, _SETTLE_S)
    await _eventually(lambda: service.metric("drorae_disconnects_total") >= disconnects + count)
    gate.unlink()
    answer: Answer = await busy
    findings.exactly("status of the request that the device was busy with", answer.status, 200)
    findings.exactly("status of a request afterwards", (await exchange(service.url, photos[0])).status, 200)
    batches, items = (now - then for now, then in zip(_work(service), before, strict=True))
    disconnects = service.metric("drorae_disconnects_total") - disconnects
    findings.exactly("disconnects counted", disconnects, count)
    findings.at_most("batches computed for nobody", batches - 2, 0)  # the busy one, and the one afterwards
    findings.at_most("items computed for nobody", items - 2, 0)
    findings.exactly("pending items afterwards", service.metric("drorae_pending_items"), 0)
    findings.exactly("queued items afterwards", service.metric("drorae_queue_items"), 0)


async def _send_all(service: Service, photos: list[bytes], count: int) -> list[Connection]:
    """Whole requests on connections of their own; none is answered."""

    async def send(number: int) -> Connection:
        async with gate:
            connection = await Connection.open(service.url)
            await connection.send(photos[number % len(photos)])
            return connection

    gate = asyncio.Semaphore(_AT_ONCE)
    return await asyncio.gather(*(send(number) for number in range(count)))


def _leave(connection: Connection, rng: random.Random) -> None:
    """Close as clients do: in order, or with a reset."""
    if rng.random() < 0.5:
        with suppress(OSError):
            raw: socket.socket = connection.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        connection.abort()
    else:
        connection.close()


def _work(service: Service) -> tuple[float, float]:
    """Batches and items that went through the device."""
    return service.metric("drorae_batch_items_count"), service.metric("drorae_batch_items_sum")


def _waiting(service: Service) -> float:
    """Requests past their admission; the busy one is another."""
    return max(service.metric("drorae_pending_items") - 1, service.metric("drorae_queue_items"))


async def _eventually(condition: Callable[[], bool]) -> bool:
    """Whether it holds before `_SETTLE_S` are over."""
    limit_s = time.monotonic() + _SETTLE_S
    while not await asyncio.to_thread(condition):
        if time.monotonic() > limit_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True
