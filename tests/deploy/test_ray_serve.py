"""The service on Ray Serve: two replicas on this machine, one killed, and one taken away under load."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings

ray = pytest.importorskip("ray", reason="needs the package ray[serve]")
serve = pytest.importorskip("ray.serve", reason="needs the package ray[serve]", exc_type=ImportError)
pytest.importorskip("ray.serve.schema", reason="needs the package ray[serve]", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
ATTEMPTS = 100
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def scale() -> Iterator[Callable[[int], str]]:
    """Sets the number of replicas as ``serve deploy`` does; gives the address."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config: dict[str, Any] = yaml.safe_load(
        (ROOT / "deploy/ray_serve/config.yaml").read_text(encoding="utf-8")
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config["http_options"]["port"] = probe.getsockname()[1]
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={name: config["http_options"][name] for name in ("host", "port")})

    def deploy(num_replicas: int) -> str:
        config["applications"][0]["deployments"][0]["num_replicas"] = num_replicas
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        while not is_running(num_replicas):
            time.sleep(0.2)
        return f"http://127.0.0.1:{config['http_options']['port']}"

    try:
        yield deploy
    finally:
        serve.shutdown()
        ray.shutdown()


def is_running(num_replicas: int) -> bool:
    """Whether Serve has as many replicas as it should, and no other process."""
    found = serve.status().applications.get("drorae")
    if found is None or found.status != "RUNNING":
        return False
    states = found.deployments["Replica"].replica_states
    return states == {"RUNNING": num_replicas} and len(replicas()) == num_replicas


def replicas() -> set[int]:
    """Processes of the replicas."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:drorae" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
        except OSError:
            continue
    return found


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


def test_replicas_answer_as_the_service_does_and_bear_a_kill_and_a_removal(scale):
    address = scale(2)
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
        scale(2)
        before = replicas()
        waiting = [threads.submit(httpx.post, f"{address}/encode", **PHOTO, timeout=120) for _ in range(12)]
        scale(1)
        assert {one.result().status_code for one in waiting} == {200}
    assert len(replicas()) == 1
    assert replicas() < before  # the one that stays was not started anew
