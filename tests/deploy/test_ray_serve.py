"""The service on Ray Serve: two replicas on this machine, one killed, and one taken away under load."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings

pytest.importorskip("ray", reason="needs the package ray[serve]")
pytest.importorskip("ray.serve", reason="needs the package ray[serve]", exc_type=ImportError)
pytest.importorskip("ray.serve.schema", reason="needs the package ray[serve]", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
ATTEMPTS = 100
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from deploy.ray_serve.cluster import local_cluster

    with local_cluster() as running:
        yield running


PHOTO = {"content": (ROOT / "samples/bridge.jpg").read_bytes(), "headers": {"Content-Type": "image/jpeg"}}


def encode_until_it_works(address: str) -> httpx.Response:
    """As clients do: a replica that is killed loses what it had, and Serve does not send it again."""
    for _ in range(ATTEMPTS):
        try:
            with httpx.Client(base_url=address, timeout=120) as client:
                response = client.post("/encode", **PHOTO)
        except httpx.TransportError:
            continue
        if response.status_code == 200:
            return response
        assert response.status_code in (500, 503), response.text
    raise AssertionError("no answer")


def check_same(response: httpx.Response, expected: httpx.Response) -> None:
    found, wanted = load(response.content), load(expected.content)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)  # batches of other sizes round otherwise


def test_replicas_answer_as_the_service_does_and_bear_a_kill_and_a_removal(cluster: Any) -> None:
    from deploy.ray_serve.cluster import replica_processes as replicas

    address = cluster.url
    cluster.scale(2)
    assert len(replicas()) == 2
    app = create_app(Settings(checkpoint="mini"))
    with TestClient(app) as alone:
        assert app.state.parts.engine.wait_until_settled(300)
        expected = alone.post("/encode", **PHOTO)
        assert expected.status_code == 200, expected.text
    with ThreadPoolExecutor(4) as threads:
        for response in threads.map(encode_until_it_works, [address] * 8):
            check_same(response, expected)
        victim = min(replicas())
        waiting = [threads.submit(encode_until_it_works, address) for _ in range(12)]
        os.kill(victim, signal.SIGKILL)
        for one in waiting:
            check_same(one.result(), expected)
        cluster.scale(2)
        before = replicas()
        waiting = [threads.submit(httpx.post, f"{address}/encode", **PHOTO, timeout=120) for _ in range(12)]
        cluster.scale(1)
        assert {one.result().status_code for one in waiting} == {200}
    assert len(replicas()) == 1
    assert replicas() < before  # the one that stays was not started anew


def test_pauses_count_from_the_begin_to_the_end_of_a_span() -> None:
    from deploy.ray_serve.scale_down import Answer, pauses

    answers = [Answer(0, 1), Answer(0.5, 2), Answer(1, 6), Answer(9, 11)]
    assert pauses(answers, 0, 10) == (3, 4, 5)
    assert pauses(answers, 6.5, 10) == (0, 3.5, 0)
