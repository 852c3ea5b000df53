"""Settings: every field documented and bounded, the environment read with a prefix."""

import pytest
from pydantic import ValidationError

from service.settings import Settings, unknown_variables


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


@pytest.mark.parametrize(
    "bad",
    [
        {"port": 70000},
        {"device": "tpu"},
        {"dtype": "int8"},
        {"fusion": "fast"},
        {"fusion": ""},
        {"batch_size": 0},
        {"checkpoint": " "},
        {"max_items_per_request": 100, "queue_limit_items": 99},
    ],
)
def test_impossible_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**bad)  # type: ignore[arg-type]


def test_misspelt_variables_are_found() -> None:
    environment = {"DRORAE_PORT": "1", "drorae_host": "x", "DRORAE_CHEKPOINT": "x", "PATH": "/"}
    assert unknown_variables(environment) == ["DRORAE_CHEKPOINT"]
