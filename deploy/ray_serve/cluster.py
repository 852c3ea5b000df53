"""A Ray cluster of this machine with the service on it, for checks. It deploys as ``serve deploy`` does."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

CONFIGURATION = Path(__file__).with_name("config.yaml")
_MANY_CPUS = 4  # a number for Ray's scheduler alone
_PROCESS = b"ServeReplica:drorae"


class Cluster:
    """Deploys the committed configuration with other numbers of replicas.

    Args:
        port: of Serve.
        variables: further ``DRORAE_*`` variables of the replicas.
    """

    def __init__(self, port: int, variables: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._config: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
        self._config["http_options"]["port"] = port
        (application,) = self._config["applications"]
        application["runtime_env"]["env_vars"] |= variables
        (self._deployment,) = application["deployments"]
        options = {name: self._config["http_options"][name] for name in ("host", "port")}
        serve.start(http_options=options)

    def scale(self, num_replicas: int) -> None:
        """Deploy, and wait until Serve has so many replicas and no other process."""
        self._deployment["num_replicas"] = num_replicas
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate(self._config))
        while not self._is_running(num_replicas):
            time.sleep(0.2)

    def _is_running(self, num_replicas: int) -> bool:
        found = serve.status().applications.get("drorae")
        if found is None or found.status != "RUNNING":
            return False
        states = found.deployments["Replica"].replica_states
        return states == {"RUNNING": num_replicas} and len(replica_processes()) == num_replicas


@contextmanager
def local_cluster(**variables: str) -> Iterator[Cluster]:
    """Ray and Serve on this machine, on free ports, ended with the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init("local", num_cpus=_MANY_CPUS, include_dashboard=False, log_to_driver=False)
    try:
        yield Cluster(port, variables)
    finally:
        serve.shutdown()
        ray.shutdown()


def replica_processes() -> set[int]:
    """Processes of the replicas on this machine."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if _PROCESS in (process / "cmdline").read_bytes():
                found.add(int(process.name))
        except OSError:
            continue
    return found
