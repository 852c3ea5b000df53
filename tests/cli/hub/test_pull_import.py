"""From a repository to a checkpoint that works, by the commands that are printed."""

import shlex
from pathlib import Path

import pytest
import torch

from model.tokenizer import Tokenizer
from tests.cli.hub.conftest import Repository


def publish(folder: Path) -> Repository:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Repository(files, frozenset(name for name in files if name.endswith(".safetensors")))


def test_an_autoencoder_is_pulled_imported_and_equal(
    hub, run, autoencoder_folder, photo, tmp_path, monkeypatch
):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    hub.repositories["nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"] = publish(autoencoder_folder)
    pulled = run("pull", "rae-dinov2-b")
    assert pulled.status == 0, pulled.err
    command = shlex.split(pulled.err.strip().splitlines()[-1].removeprefix("next: "))
    assert command[:2] == ["drorae", "import"]
    imported = run(*command[1:])
    assert imported.status == 0, imported.err
    output = command[command.index("--output") + 1]
    assert run("reconstruct", photo, "out.png", "--checkpoint", output).status == 0
    model = diffusers.AutoencoderRAE.from_pretrained(autoencoder_folder).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.encode(images).latent
    latents = Tokenizer.load(output).encode(images, normalize=True)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
