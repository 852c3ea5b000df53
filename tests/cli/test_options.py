"""A flag for each setting, and where values come from."""

import pytest

from service.settings import Settings


@pytest.fixture
def served(monkeypatch):
    """The settings that ``serve`` hands to the server, which answers with status 7."""
    received = []

    def pretend(settings):
        received.append(settings)
        return 7

    monkeypatch.setattr("service.server.run", pretend)
    return received


def test_serve_has_a_flag_for_every_setting_with_its_variable_and_default(run):
    words = " ".join(run("serve", "--help").out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in words
        default = field.default if field.default or field.default == 0 else "none"
        assert f"(default {default}; DRORAE_{name.upper()})" in words
        assert field.description in words


def test_defaults_and_status_pass_through(run, served):
    assert run("serve").status == 7
    assert served == [Settings()]


def test_every_flag_reaches_its_setting(run, served):
    given = {
        "checkpoint": "somewhere",
        "device": "cuda:1",
        "dtype": "bfloat16",
        "fusion": "folded",
        "cpu_workers": 2,
        "cpu_threads": 3,
        "frontends": 4,
        "batch_size": 2,
        "batch_buckets": "1,2",
        "host": "0.0.0.0",
        "port": 9,
        "max_connections": 10,
        "keep_alive_timeout_s": 11,
        "header_timeout_s": 1.25,
        "body_timeout_s": 1.75,
        "body_bytes_per_s": 13,
        "answer_timeout_s": 2.25,
        "max_body_bytes": 4096,
        "max_image_pixels": 5,
        "max_request_pixels": 6,
        "max_aspect_ratio": 2.5,
        "max_frames": 12,
        "compile_blocks": True,
        "exact_images": True,
        "page": "off",
        "png_compression": "small",
        "max_items_per_request": 3,
        "queue_limit_items": 4,
        "queue_limit_bytes": 5000,
        "queue_limit_pixels": 7,
        "request_timeout_s": 1.5,
        "max_request_timeout_s": 2.5,
        "num_io_threads": 6,
        "num_decoders": 7,
        "drain_timeout_s": 0.5,
        "hang_timeout_s": 3.5,
        "start_timeout_s": 120.5,
        "retry_after_s": 8,
        "api_keys": "one,two",
        "api_keys_file": "/keys",
        "cors_origins": "https://a.example,https://b.example",
        "log_level": "debug",
        "log_format": "json",
        "otlp_endpoint": "http://collector:4318",
    }
    assert set(given) == set(Settings.model_fields)
    flags: list[str] = []
    for name, value in given.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    run("serve", *flags)
    received = served[0].model_dump(mode="json") | {"api_keys": served[0].api_keys.get_secret_value()}
    assert {
        name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in received.items()
    } == given


def test_flags_win_over_the_environment(run, served, monkeypatch):
    monkeypatch.setenv("DRORAE_PORT", "1234")
    monkeypatch.setenv("DRORAE_HOST", "::1")
    run("serve", "--port", "4321")
    assert (served[0].port, served[0].host) == (4321, "::1")


def test_wrong_flag_is_named(refused, served):
    assert refused("serve", "--port", "70000").startswith("drorae: --port: Input should be less than")
    assert "--batch-size" in refused("serve", "--batch-size", "many")
    assert served == []


def test_wrong_variable_is_named(refused, served, monkeypatch):
    monkeypatch.setenv("DRORAE_QUEUE_LIMIT_ITEMS", "-1")
    assert refused("serve").startswith("drorae: DRORAE_QUEUE_LIMIT_ITEMS: ")


@pytest.mark.parametrize(
    ("flag", "wrong", "right"), [("dtype", "int4", "bfloat16"), ("fusion", "fast", "folded")]
)
def test_wrong_choice_lists_the_choices(run, refused, served, monkeypatch, flag, wrong, right):
    outcome = run("serve", f"--{flag}", wrong)
    assert outcome.status == 2
    assert right in outcome.err
    variable = f"DRORAE_{flag.upper()}"
    monkeypatch.setenv(variable, wrong)
    message = refused("serve")
    assert message.startswith(f"drorae: {variable}: ")
    assert right in message
    assert served == []


def test_contradicting_settings_name_both(refused, served):
    message = refused("serve", "--queue-limit-items", "5")
    assert "max_items_per_request=64 exceeds queue_limit_items=5" in message


def test_file_commands_take_the_model_from_the_environment(run, monkeypatch, checkpoint):
    monkeypatch.setenv("DRORAE_CHECKPOINT", str(checkpoint))
    assert "tiny" in run("info").out


def test_commands_that_open_no_port_read_none(run, refused, monkeypatch, checkpoint, photo, tmp_path):
    """Nor anything else that only the service needs; what they do read is judged."""
    monkeypatch.setenv("DRORAE_PORT", "http")
    monkeypatch.setenv("DRORAE_QUEUE_LIMIT_ITEMS", "1")
    use = ("--checkpoint", checkpoint)
    assert run("info", checkpoint).status == 0
    assert run("encode", photo, "-o", tmp_path / "latents.safetensors", *use).status == 0
    assert run("decode", tmp_path / "latents.safetensors", tmp_path / "out.png", *use).status == 0
    assert refused("serve").startswith("drorae: DRORAE_")
    monkeypatch.setenv("DRORAE_MAX_IMAGE_PIXELS", "none")
    message = refused("encode", photo, "-o", tmp_path / "other.safetensors", *use)
    assert message.startswith("drorae: DRORAE_MAX_IMAGE_PIXELS: ")


def test_commands_name_variables_that_nothing_reads(run, monkeypatch, checkpoint):
    monkeypatch.setenv("DRORAE_CHEKPOINT", "x")
    monkeypatch.setenv("DRORAE_DATA", "x")
    outcome = run("info", checkpoint)
    assert outcome.status == 0
    assert "did you mean 'DRORAE_CHECKPOINT'" in outcome.err
    assert outcome.err.count("\n") == 1
