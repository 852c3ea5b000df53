"""``drorae serve`` as a process, and that its answers and the commands' files are interchangeable."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

READY_TIMEOUT_S = 60


@dataclass
class Service:
    """Where a service runs, and what it wrote to standard error once it has ended."""

    address: str
    log: str = ""


@contextmanager
def serving(drorae: str, *argv: str) -> Iterator[Service]:
    """A running service; ends it with SIGTERM, which must be an orderly end."""
    command = [drorae, "serve", "--port", "0", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            service = Service(process.stdout.readline().split()[-1])
            wait_until_ready(service.address)
            yield service
        finally:
            process.send_signal(signal.SIGTERM)
            service.log = process.communicate(timeout=60)[1]
    assert process.returncode == 0


@pytest.fixture(scope="module")
def server(drorae, checkpoint):
    """Address of the service that most tests share, with the pixels of the commands."""
    options = ["--exact-images", "--log-level", "error"]
    with serving(drorae, "--checkpoint", str(checkpoint), *options) as service:
        yield service.address
    assert service.log == ""


def wait_until_ready(address: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while httpx.get(f"{address}/readyz").status_code != 200:
        assert time.monotonic() < deadline, "the service did not become ready"
        time.sleep(0.05)


def post(address: str, path: Path, route: str) -> bytes:
    answer = httpx.post(f"{address}/{route}", content=path.read_bytes(), timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.content


def read(path: Path) -> tuple[dict[str, str], Tensor]:
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["latents"]
        return file.metadata(), file.get_tensor("latents")


def test_encode_writes_what_the_service_answers(server, run, checkpoint, photo, tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert run("encode", photo, "-o", ours, "--checkpoint", checkpoint).status == 0
    theirs.write_bytes(post(server, photo, "encode"))
    # Not bytes: safetensors writes metadata in no particular order.
    (metadata, latents), (their_metadata, their_latents) = read(ours), read(theirs)
    assert metadata == their_metadata
    assert latents.dtype == their_latents.dtype
    assert torch.equal(latents, their_latents)


def test_npy_files_are_equal_byte_for_byte(server, run, checkpoint, photo, tmp_path):
    assert run("encode", photo, "-o", tmp_path / "l.npy", "--checkpoint", checkpoint).status == 0
    assert (tmp_path / "l.npy").read_bytes() == post(server, photo, "encode?format=npy")


def test_the_service_decodes_the_commands_file(server, run, checkpoint, photo, tmp_path):
    latents, picture = tmp_path / "l.safetensors", tmp_path / "out.png"
    run("encode", photo, "-o", latents, "--normalize", "--checkpoint", checkpoint)
    run("decode", latents, picture, "--checkpoint", checkpoint)
    assert post(server, latents, "decode") == picture.read_bytes()


def test_the_command_decodes_the_services_answer(server, run, checkpoint, photo, tmp_path):
    answer, picture = tmp_path / "answer.safetensors", tmp_path / "out.png"
    answer.write_bytes(post(server, photo, "encode?latent=base&dtype=float32"))
    assert run("decode", answer, picture, "--checkpoint", checkpoint).status == 0
    assert post(server, answer, "decode") == picture.read_bytes()


def test_reconstruct_equals_the_service(server, run, checkpoint, photo, tmp_path):
    run("reconstruct", photo, tmp_path / "out.png", "--checkpoint", checkpoint)
    assert post(server, photo, "reconstruct") == (tmp_path / "out.png").read_bytes()


def test_a_broken_checkpoint_ends_it_with_status_2(drorae, tmp_path):
    argv = [drorae, "serve", "--port", "0", "--log-level", "error", "--checkpoint", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{tmp_path} is no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fusion_that_cannot_run_ends_it_with_status_2(drorae, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("DRORAE_FUSION", "triton")
    argv = [drorae, "serve", "--port", "0", "--log-level", "error", "--device", "cpu"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "drorae: fusion=triton cannot run: the device is cpu, the Triton kernels need CUDA\n"
    )


@pytest.mark.parametrize(("flags", "path"), [((), "folded"), (("--fusion", "reference"), "reference")])
def test_the_bundled_checkpoint_says_what_computes_its_fusion(drorae, flags, path):
    with serving(drorae, "--device", "cpu", "--batch-size", "1", *flags) as service:
        assert httpx.get(f"{service.address}/info").json()["kernel_path"] == path
        assert f'kernel_path="{path}"' in httpx.get(f"{service.address}/metrics").text
    assert f" INFO model.tokenizer: fusion path {path}: " in service.log
