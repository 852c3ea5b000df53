"""Settings: every field documented and bounded, the environment read with a prefix."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import OTHER_VARIABLES, Settings, environment_warnings, unknown_variables

ROOT = Path(__file__).parents[2]
# What the kubelet sets in every pod of a namespace with a Service called drorae, or drorae-decoder.
SERVICE_LINKS = {
    f"{service}_{name}": value
    for service in ("DRORAE", "DRORAE_DECODER")
    for name, value in {
        "PORT": "tcp://10.96.0.12:8000",
        "SERVICE_HOST": "10.96.0.12",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "PORT_8000_TCP": "tcp://10.96.0.12:8000",
        "PORT_8000_TCP_ADDR": "10.96.0.12",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_PROTO": "tcp",
    }.items()
}


def test_defaults_are_the_documented_ones() -> None:
    settings = Settings()
    assert (settings.checkpoint, settings.host, settings.port) == ("mini", "127.0.0.1", 8000)


def test_every_field_is_described_and_numbers_are_bounded() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            assert len(field.metadata) >= 2, f"{name} lacks a bound"


def test_environment_fills_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORAE_PORT", "9001")
    monkeypatch.setenv("DRORAE_CHECKPOINT", "/somewhere")
    assert Settings().port == 9001
    assert Settings(port=1).port == 1
    assert Settings().checkpoint == "/somewhere"


@pytest.mark.parametrize("fusion", ["auto", "triton", "folded", "reference"])
def test_the_fusion_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch, fusion: str) -> None:
    assert Settings().fusion == "auto"
    monkeypatch.setenv("DRORAE_FUSION", fusion)
    assert Settings().fusion == fusion


def test_settings_are_frozen_and_closed() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1
    with pytest.raises(ValidationError, match="Extra inputs"):
        Settings(prot=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("batch_size", range(1, 200))
def test_default_buckets_waste_at_most_a_third(batch_size: int) -> None:
    buckets = Settings(batch_size=batch_size).buckets
    assert buckets[0] == 1
    assert buckets[-1] == batch_size
    for smaller, larger in itertools.pairwise(buckets):
        assert smaller < larger
        assert larger - smaller - 1 <= larger / 3


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORAE_BATCH_BUCKETS", "1, 4,8")
    monkeypatch.setenv("DRORAE_CORS_ORIGINS", "https://a.example,")
    assert Settings().buckets == (1, 4, 8)
    assert Settings().cors_origins == ("https://a.example",)


def test_keys_do_not_show() -> None:
    assert "secret" not in repr(Settings(api_keys="secret"))


@pytest.mark.parametrize(
    "bad",
    [
        {"port": 70000},
        {"device": "tpu"},
        {"dtype": "int8"},
        {"fusion": "fast"},
        {"fusion": ""},
        {"batch_size": -1},
        {"checkpoint": " "},
        {"max_items_per_request": 100, "queue_limit_items": 99},
        {"max_body_bytes": 4096, "queue_limit_bytes": 4095},
        {"request_timeout_s": 301},
        {"batch_size": 8, "batch_buckets": "1,4"},
        {"batch_size": 8, "batch_buckets": "4,1,8"},
        {"batch_buckets": "4,1,8"},
        {"batch_buckets": "0,8"},
        {"otlp_endpoint": "collector:4317"},
    ],
)
def test_impossible_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**bad)  # type: ignore[arg-type]


def test_misspelt_variables_are_found() -> None:
    environment = {"DRORAE_PORT": "1", "drorae_host": "x", "DRORAE_CHEKPOINT": "x", "PATH": "/"}
    assert unknown_variables(environment) == ["DRORAE_CHEKPOINT"]
    assert list(environment_warnings({})) == []
    (sentence,) = environment_warnings(environment)
    assert "DRORAE_CHEKPOINT names no setting" in sentence
    assert sentence.endswith("did you mean 'DRORAE_CHECKPOINT'?")


def test_every_variable_of_the_repository_is_known() -> None:
    """Of recipes, scripts, compose files and docs."""
    listed = subprocess.run(
        [
            "git",
            "grep",
            "-hoE",
            r"\bDRORAE_[A-Z0-9_]+\b",
            "--",
            "deploy",
            "docs",
            "training",
            "cli",
            "*.md",
            "*file",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("the sources are not a git checkout")
    names = set(listed.stdout.split()) - {"DRORAE_NAME"}  # a placeholder
    assert names >= OTHER_VARIABLES
    assert unknown_variables(dict.fromkeys(names, "1")) == []


def test_links_of_kubernetes_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    assert Settings().port == 8000
    assert unknown_variables(SERVICE_LINKS) == []
    (sentence,) = environment_warnings(SERVICE_LINKS)
    assert "Kubernetes" in sentence
    assert all(re.search(rf"\b{name}\b", sentence) for name in SERVICE_LINKS)


def test_a_port_that_is_none_is_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORAE_PORT", "http")
    with pytest.raises(ValidationError, match="port"):
        Settings()


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_variables_are_as_good_as_unset(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"DRORAE_{name.upper()}", empty)
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert Settings().model_dump() == defaults
