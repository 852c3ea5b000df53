"""The application as a whole: loading, overload, deadlines, the end, the unexpected."""

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from model.errors import CheckpointError
from model.tokenizer import Tokenizer
from service.app import create_app
from service.engine import operations
from service.engine.operations import BatchKey
from service.engine.queue import Job
from service.settings import Settings

Check = Callable[..., dict[str, Any]]
FAR_S = float("inf")


def occupy(running: Any, num_items: int = 1) -> Job:
    """Give the engine work that no request waits for."""
    job = Job(BatchKey(operations.ENCODE), [torch.zeros(3, 64, 64)] * num_items, FAR_S)
    running.engine.submit(job)
    return job


def waiting_items(running: Any) -> float:
    return running.app.state.parts.metrics.registry.get_sample_value("drorae_pending_items")


def pending_bytes(running: Any) -> float:
    return running.app.state.parts.metrics.registry.get_sample_value("drorae_pending_bytes")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_loading(serve: Any, tokenizer: Tokenizer, png: bytes, check_problem: Check) -> None:
    go = threading.Event()

    def load(_: Settings) -> Tokenizer:
        assert go.wait(30)
        return tokenizer

    with serve(create_app(Settings(retry_after_s=2), load=load), wait_ready=False) as running:
        try:
            assert running.client.get("/livez").json() == {"status": "alive"}
            for response in (
                running.client.get("/readyz"),
                running.client.get("/info"),
                running.client.post("/encode", content=png),
                running.client.post("/decode", content=b"x"),
            ):
                check_problem(response, 503, "unavailable", "still loading")
                assert response.headers["retry-after"] == "2"
            assert "drorae_ready 0.0" in running.client.get("/metrics").text
        finally:
            go.set()
        assert running.engine.wait_until_settled(30)
        assert running.client.get("/readyz").json() == {"status": "ready"}
        assert running.client.post("/encode", content=png).status_code == 200


def test_broken_checkpoint(serve: Any, png: bytes, check_problem: Check) -> None:
    def load(_: Settings) -> Tokenizer:
        raise CheckpointError("decoder.safetensors: tensor 'x' is missing")

    with serve(create_app(Settings(), load=load), wait_ready=False) as running:
        assert running.engine.wait_until_settled(30)
        check_problem(running.client.get("/readyz"), 503, "unavailable", "could not be loaded")
        check_problem(running.client.post("/encode", content=png), 503, "unavailable", "log says why")
        assert "tensor 'x' is missing" in running.engine.failure
        assert running.client.get("/livez").status_code == 200


def test_full_queue(serve: Any, gated: Any, png: bytes, check_problem: Check) -> None:
    settings = Settings(
        queue_limit_items=3, max_items_per_request=3, batch_size=1, cpu_workers=1, retry_after_s=4
    )
    with serve(create_app(settings, gated)) as running, ThreadPoolExecutor(2) as pool:
        accepted = pool.submit(running.client.post, "/encode", files=[("images", png)] * 2)
        assert gated.entered.acquire(timeout=30)
        assert waiting_items(running) == 2
        for options in ({"files": [("images", png)] * 2}, {"json": {"images": [base64_of(png)] * 2}}):
            response = running.client.post("/encode", **options)
            check_problem(response, 429, "queue-full", "at most 3 items", "not yet answered")
            assert int(response.headers["retry-after"]) >= 4
        assert waiting_items(running) == 2
        raw = running.client.post("/encode?shape=2&shape=3&shape=64&shape=64&dtype=uint8", content=b"x")
        check_problem(raw, 429, "queue-full", "2 of at most 3 items", "and 2 more came")
        one = pool.submit(running.client.post, "/encode", content=png)
        eventually(lambda: waiting_items(running) == 3)
        check_problem(running.client.post("/decode", content=b"x"), 429, "queue-full", "and 1 more came")
        assert running.client.get("/readyz").status_code == 200
        gated.gate.set()
        assert accepted.result(30).status_code == one.result(30).status_code == 200
        eventually(lambda: waiting_items(running) == 0)
        assert running.client.post("/encode", content=png).status_code == 200
        assert 'rejected_requests_total{reason="items"} 4.0' in running.client.get("/metrics").text


def test_full_of_bytes(serve: Any, gated: Any, png: bytes, check_problem: Check) -> None:
    limit = max(1024, int(1.5 * len(png)))
    settings = Settings(queue_limit_bytes=limit, max_body_bytes=limit, cpu_workers=1)
    with serve(create_app(settings, gated)) as running:
        address = running.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=30) as slow:
            head = f"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: {len(png)}\r\n\r\n"
            slow.sendall(head.encode() + png[:10])  # so many bytes are held, and no more
            eventually(lambda: pending_bytes(running) == 10)
            check_problem(running.client.post("/encode", content=png), 429, "queue-full", f"{limit} bytes")
        eventually(lambda: pending_bytes(running) == 0)
        gated.gate.set()
        assert running.client.post("/encode", content=png).status_code == 200
        metrics = running.client.get("/metrics").text
        assert 'rejected_requests_total{reason="bytes"} 1.0' in metrics
        assert "drorae_disconnects_total 1.0" in metrics
        assert "drorae_pending_bytes 0.0" in metrics


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(
    serve: Any, gated: Any, png: bytes, check_problem: Check
) -> None:
    with serve(create_app(Settings(cpu_workers=1), gated)) as running, ThreadPoolExecutor(1) as pool:
        running.engine.rates._item_s[operations.OPERATIONS.index(operations.ENCODE)] = 100.0
        accepted = pool.submit(running.client.post, "/encode", content=png)
        assert gated.entered.acquire(timeout=30)
        response = running.client.post("/encode", content=png)
        check_problem(response, 429, "queue-full", "takes about 100.0 s", "deadline")
        assert response.headers["retry-after"] == "100"
        gated.gate.set()
        assert accepted.result(30).status_code == 200


def test_deadline(serve: Any, gated: Any, png: bytes, check_problem: Check) -> None:
    with serve(create_app(Settings(request_timeout_s=0.3, batch_size=1, cpu_workers=1), gated)) as running:
        busy = occupy(running)
        assert gated.entered.acquire(timeout=30)
        check_problem(running.client.post("/encode", content=png), 504, "deadline-passed", "within 0.3 s")
        gated.gate.set()
        busy.future.result(30)
        assert running.client.post("/encode", content=png).status_code == 200
        assert gated.batch_sizes == [1, 1], "the item of the late request was taken back"
        assert 'items_total{operation="encode",outcome="expired"} 1.0' in running.client.get("/metrics").text


def test_requests_share_batches(serve: Any, gated: Any, png: bytes) -> None:
    with (
        serve(create_app(Settings(batch_size=8, cpu_workers=1), gated)) as running,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = [pool.submit(running.client.post, "/encode", content=png)]
        assert gated.entered.acquire(timeout=30)
        answers += [pool.submit(running.client.post, "/encode", content=png) for _ in range(3)]
        eventually(lambda: len(running.engine._queue) == 3)
        gated.gate.set()
        contents = {answer.result(30).content for answer in answers}
        assert gated.batch_sizes == [1, 3]
        assert {len(content) for content in contents} == {len(next(iter(contents)))}


def test_the_event_loop_stays_free(serve: Any, gated: Any, png: bytes) -> None:
    with serve(create_app(Settings(), gated)) as running, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.client.post, "/encode", content=png)
        assert gated.entered.acquire(timeout=30)
        assert running.client.get("/livez").status_code == 200
        assert "drorae_requests_in_flight 2.0" in running.client.get("/metrics").text
        gated.gate.set()
        assert answer.result(30).status_code == 200


def test_items_of_a_client_that_went_away_are_taken_back(serve: Any, gated: Any, png: bytes) -> None:
    with serve(create_app(Settings(batch_size=1, cpu_workers=1), gated)) as running:
        busy = occupy(running)
        assert gated.entered.acquire(timeout=30)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/encode", content=png, timeout=0.3)
        eventually(lambda: waiting_items(running) == 0)
        assert len(running.engine._queue) == 0
        gated.gate.set()
        busy.future.result(30)
        assert running.client.post("/encode", content=png).status_code == 200
        assert gated.batch_sizes == [1, 1]
        metrics = running.client.get("/metrics").text
        assert "drorae_disconnects_total 1.0" in metrics
        assert 'items_total{operation="encode",outcome="cancelled"} 1.0' in metrics
        assert 'requests_total{outcome="disconnected",route="/encode"} 1.0' in metrics


def test_unexpected_errors_are_problems_and_leak_nothing(
    serve: Any, tokenizer: Tokenizer, png: bytes, check_problem: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    with serve(create_app(Settings(), tokenizer)) as running:
        monkeypatch.setattr("service.api.steps.split_images", fail)
        problem = check_problem(running.client.post("/encode", content=png), 500, "internal", "request_id")
        assert "secret" not in problem["detail"]
        monkeypatch.undo()
        assert running.client.post("/encode", content=png).status_code == 200
        assert 'outcome="internal",route="/encode"} 1.0' in running.client.get("/metrics").text


def test_draining(serve: Any, gated: Any, png: bytes, check_problem: Check) -> None:
    with serve(create_app(Settings(), gated)) as running, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.client.post, "/encode", content=png)
        assert gated.entered.acquire(timeout=30)
        running.engine.start_draining()
        for response in (running.client.get("/readyz"), running.client.post("/encode", content=png)):
            check_problem(response, 503, "unavailable", "draining")
            assert response.headers["retry-after"]
        assert running.client.get("/info").status_code == 200
        gated.gate.set()
        assert answer.result(30).status_code == 200


def test_applications_do_not_share_metrics(tokenizer: Tokenizer) -> None:
    first, second = (create_app(Settings(), tokenizer) for _ in range(2))
    first.state.parts.metrics.requests.labels("/encode", "ok").inc()
    assert 'route="/encode"' not in second.state.parts.metrics.render().decode()


def test_works_without_lifespan_state(tokenizer: Tokenizer) -> None:
    """Through ASGI alone, with nothing started: an orderly refusal."""
    app = create_app(Settings(), tokenizer)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.get("/readyz")

    assert asyncio.run(ask()).status_code == 503
