"""Several fronts before one engine: real processes on one port, whose answers are those of a single process.

The model waits as long as a file exists, so that tests decide when requests are under way.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from benchmarks.harness.service import Service, launch
from benchmarks.probes.inputs import MARK_RGB

QUEUE_LIMIT = 8
NUM_FRONTS = 2
_WAIT_S = 60.0


@dataclass(frozen=True)
class Gated:
    """A service with fronts, and the file that shuts its model's gate."""

    service: Service
    gate: Path

    def send(self, pool: ThreadPoolExecutor, photo: bytes, number: int) -> list[Future[httpx.Response]]:
        """Send photos over as many connections, each with an id; the answers come later."""
        url = f"{self.service.url}/encode?format=raw"
        return [
            pool.submit(
                httpx.post, url, content=photo, headers={"X-Request-ID": f"r{index}"}, timeout=_WAIT_S
            )
            for index in range(number)
        ]


@pytest.fixture(scope="module")
def fronts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    gate = tmp_path_factory.mktemp("gate") / "shut"
    settings = {
        "checkpoint": str(checkpoint),
        "frontends": str(NUM_FRONTS),
        "num_decoders": "2",
        "cpu_workers": "1",
        "queue_limit_items": str(QUEUE_LIMIT),
        "max_items_per_request": str(QUEUE_LIMIT),
        "hang_timeout_s": "600",
    }
    arguments = ("gate", "--file", str(gate))
    with launch(settings, "benchmarks.faults.faulty_service", arguments) as service:
        yield Gated(service, gate)


def eventually(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    limit_s = time.monotonic() + _WAIT_S
    while not holds():
        assert time.monotonic() < limit_s
        time.sleep(0.05)


def pending(service: Service) -> float:
    return service.metric("drorae_pending_items")


def requests_of(png: bytes, latents: torch.Tensor) -> list[dict[str, Any]]:
    """Requests of every kind, good and bad."""
    tensor = {"shape": list(latents.shape), "dtype": "float32"}
    raw = latents.numpy().tobytes()
    return [
        {"url": "/encode", "params": {"format": "raw"}, "content": png},
        {"url": "/encode", "params": {"format": "raw"}, "files": [("images", png)] * 3},
        {"url": "/encode", "params": {"format": "json", "normalize": "true"}, "content": png},
        {"url": "/decode", "params": {**tensor, "format": "raw"}, "content": raw},
        {
            "url": "/decode",
            "params": {**tensor, "shape": [1, *tensor["shape"][1:]]},
            "content": raw[: len(raw) // 3],
        },
        {"url": "/reconstruct", "params": {"format": "json", "router": "values"}, "content": png},
        {"url": "/reconstruct", "content": png},
        {"url": "/encode", "content": b"no image"},
        {"url": "/decode", "params": tensor, "content": raw[4:]},
        {"url": "/encode", "params": {"latent": "none"}, "content": png},
        {"url": "/nowhere", "content": png},
    ]


def test_answers_are_those_of_one_process(
    fronts: Gated, client: httpx.Client, png: bytes, latents: torch.Tensor
) -> None:
    headers = {"X-Request-ID": "the-same"}
    for request in requests_of(png, latents):
        expected = client.post(**request, headers=headers)
        for _ in range(NUM_FRONTS):
            with httpx.Client(base_url=fronts.service.url, timeout=_WAIT_S) as own:
                answer = own.post(**request, headers=headers)
            assert (answer.status_code, answer.content) == (expected.status_code, expected.content), request
            for name in ("content-type", "shape", "dtype", "x-request-id"):
                assert answer.headers.get(name) == expected.headers.get(name)
    ours, theirs = (httpx.get(f"{base}/info").json() for base in (fronts.service.url, client.base_url))
    assert ours["limits"].pop("queue_limit_items") == QUEUE_LIMIT
    theirs["limits"].pop("queue_limit_items")
    assert ours == theirs


def test_the_queue_is_bounded_for_all_together(
    fronts: Gated, png: bytes, check_problem: Callable[..., Any]
) -> None:
    service = fronts.service
    fronts.gate.touch()
    with ThreadPoolExecutor(QUEUE_LIMIT) as pool:
        accepted = fronts.send(pool, png, QUEUE_LIMIT)
        eventually(lambda: pending(service) == QUEUE_LIMIT)
        for _ in range(4):
            refused = httpx.post(f"{service.url}/encode", content=png, timeout=_WAIT_S)
            check_problem(refused, 429, "queue-full", f"{QUEUE_LIMIT} of at most {QUEUE_LIMIT} items")
            assert int(refused.headers["retry-after"]) >= 1
        fronts.gate.unlink()
        assert [answer.result().status_code for answer in accepted] == [200] * QUEUE_LIMIT
    eventually(lambda: pending(service) == 0)
    assert service.metric("drorae_pending_bytes") == 0
    assert service.metric("drorae_rejected_requests_total", reason="items") >= 4
    assert service.metric("drorae_batch_items_sum") >= QUEUE_LIMIT


def test_a_front_that_is_killed_loses_its_own_requests_alone(fronts: Gated, png: bytes) -> None:
    service = fronts.service
    before = service.children()
    answered = service.metric("drorae_requests_total", route="/encode", outcome="ok")
    fronts.gate.touch()
    with ThreadPoolExecutor(QUEUE_LIMIT) as pool:
        sent = fronts.send(pool, png, QUEUE_LIMIT)
        eventually(lambda: pending(service) == QUEUE_LIMIT)
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: len(set(service.children()) - set(before)) == 1)
        eventually(lambda: pending(service) == sum(not answer.done() for answer in sent))
        lost = [answer for answer in sent if answer.done()]
        kept = [answer for answer in sent if answer not in lost]
        fronts.gate.unlink()
        assert [answer.result().status_code for answer in kept] == [200] * len(kept)
    assert all(isinstance(answer.exception(), httpx.TransportError) for answer in lost)
    eventually(lambda: pending(service) == 0)
    assert service.metric("drorae_requests_total", route="/encode", outcome="ok") == answered + len(kept)
    assert service.metric("drorae_queue_items") == 0
    assert "is started again" in service.log_tail()


def test_a_signal_drains_all_fronts(fronts: Gated, png: bytes) -> None:
    """It ends the service, so it comes last."""
    service = fronts.service
    fronts.gate.touch()
    with ThreadPoolExecutor(QUEUE_LIMIT) as pool:
        accepted = fronts.send(pool, png, QUEUE_LIMIT)
        eventually(lambda: pending(service) == QUEUE_LIMIT)
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: service.status_of("/readyz") == 503)
        fronts.gate.unlink()
        answers = [answer.result() for answer in accepted]
    assert [answer.status_code for answer in answers] == [200] * QUEUE_LIMIT
    assert {answer.headers["x-request-id"] for answer in answers} == {f"r{i}" for i in range(QUEUE_LIMIT)}
    assert service.wait(_WAIT_S) == 0
    assert all(f"id=r{index}" in service.log.read_text() for index in range(QUEUE_LIMIT))


def test_an_engine_that_dies_ends_the_service(checkpoint: Path, to_file: Callable[..., bytes]) -> None:
    photo = to_file(Image.new("RGB", (64, 64), MARK_RGB), "PNG")
    settings = {"checkpoint": str(checkpoint), "frontends": "2", "cpu_workers": "1"}
    with launch(settings, "benchmarks.faults.faulty_service", ("die",)) as service:
        answer = httpx.post(f"{service.url}/encode", content=photo, timeout=_WAIT_S)
        assert answer.status_code == 503
        assert service.wait(_WAIT_S) == 3
        assert "the engine failed" in service.log_tail()
