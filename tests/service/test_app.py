"""The application as a whole: loading, overload, deadlines, the end, the unexpected."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from model.errors import CheckpointError
from model.tokenizer import Tokenizer
from service.app import create_app
from service.batching import BatchKey, Item, Operation
from service.settings import Settings

Check = Callable[..., dict[str, Any]]
FAR_S = float("inf")


def image_items(num_items: int) -> list[Item]:
    return [Item(BatchKey(Operation.ENCODE), torch.zeros(3, 64, 64)) for _ in range(num_items)]


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
    settings = Settings(queue_limit_items=2, max_items_per_request=2, batch_size=1, retry_after_s=4)
    with serve(create_app(settings, gated)) as running:
        busy = running.engine.submit(image_items(1), FAR_S)
        assert gated.entered.acquire(timeout=30)
        one = running.engine.submit(image_items(1), FAR_S)
        response = running.client.post("/encode", files=[("images", png)] * 2)
        check_problem(response, 429, "queue-full", "1 of at most 2 items wait, and 2 more came")
        assert response.headers["retry-after"] == "4"
        two = running.engine.submit(image_items(1), FAR_S)
        check_problem(running.client.post("/encode", content=png), 429, "queue-full")
        assert running.client.get("/readyz").status_code == 200
        gated.gate.set()
        for future in busy + one + two:
            future.result(30)
        assert running.client.post("/encode", content=png).status_code == 200


def test_deadline(serve: Any, gated: Any, png: bytes, check_problem: Check) -> None:
    with serve(create_app(Settings(request_timeout_s=0.3, batch_size=1), gated)) as running:
        busy = running.engine.submit(image_items(1), FAR_S)
        assert gated.entered.acquire(timeout=30)
        check_problem(running.client.post("/encode", content=png), 504, "deadline-passed", "within 0.3 s")
        gated.gate.set()
        busy[0].result(30)
        assert running.client.post("/encode", content=png).status_code == 200
        assert gated.batch_sizes == [1, 1], "the item of the late request was taken back"


def test_requests_share_batches(serve: Any, gated: Any, png: bytes) -> None:
    with serve(create_app(Settings(batch_size=8), gated)) as running:
        submitted = threading.Semaphore(0)
        submit = running.engine.submit

        def counting_submit(*args: Any) -> Any:
            futures = submit(*args)
            submitted.release()
            return futures

        running.engine.submit = counting_submit
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(running.client.post, "/encode", content=png)]
            assert gated.entered.acquire(timeout=30)
            assert submitted.acquire(timeout=30)
            answers += [pool.submit(running.client.post, "/encode", content=png) for _ in range(3)]
            for _ in range(3):
                assert submitted.acquire(timeout=30)
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
    with serve(create_app(Settings(batch_size=1), gated)) as running:
        busy = running.engine.submit(image_items(1), FAR_S)
        assert gated.entered.acquire(timeout=30)
        cancelled = threading.Event()
        submit = running.engine.submit

        def watching_submit(*args: Any) -> Any:
            futures = submit(*args)
            futures[0].add_done_callback(lambda _: cancelled.set())
            return futures

        running.engine.submit = watching_submit
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/encode", content=png, timeout=0.3)
        assert cancelled.wait(30)
        gated.gate.set()
        busy[0].result(30)
        running.engine.submit = submit
        assert running.client.post("/encode", content=png).status_code == 200
        assert gated.batch_sizes == [1, 1]


def test_unexpected_errors_are_problems_and_leak_nothing(
    serve: Any, tokenizer: Tokenizer, png: bytes, check_problem: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    with serve(create_app(Settings(), tokenizer)) as running:
        monkeypatch.setattr("service.routes.read_images", fail)
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
    first.state.pipeline.metrics.requests.labels("/encode", "ok").inc()
    assert 'route="/encode"' not in second.state.pipeline.metrics.render().decode()


def test_works_without_lifespan_state(tokenizer: Tokenizer) -> None:
    """Through ASGI alone, with nothing started: an orderly refusal."""
    app = create_app(Settings(), tokenizer)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.get("/readyz")

    assert asyncio.run(ask()).status_code == 503
