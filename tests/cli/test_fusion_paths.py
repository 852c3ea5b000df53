"""``--fusion`` of the commands on files: which paths can be had, and that all give the same latents."""

import importlib.util
import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

SAMPLES = sorted((Path(__file__).parents[2] / "samples").glob("*.jpg"))
CANNOT_RUN = "drorae: fusion=triton cannot run: the device is cpu, the Triton kernels need CUDA\n"
USERS = ["encode", "reconstruct", "evaluate"]


@pytest.fixture(autouse=True)
def _compiled_kernels(monkeypatch):
    """No interpreter that would run the Triton kernels on a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def argv(checkpoint, photo, photos, tmp_path):
    """Arguments of each command, on the CPU."""
    latents, picture = tmp_path / "latents.npy", tmp_path / "out.png"
    what = {
        "encode": ("encode", photo, "-o", latents),
        "reconstruct": ("reconstruct", photo, picture),
        "evaluate": ("evaluate", "--data", photos),
        "decode": ("decode", latents, picture),
    }
    return {name: (*words, "--checkpoint", checkpoint, "--device", "cpu") for name, words in what.items()}


@pytest.mark.parametrize("command", USERS)
def test_the_flag_and_the_variable_choose_the_path(run, argv, caplog, monkeypatch, command):
    def chosen(*flags):
        caplog.clear()
        with caplog.at_level(logging.INFO, "model.tokenizer"):
            assert run(*argv[command], *flags).status == 0
        return [record.getMessage() for record in caplog.records if record.name == "model.tokenizer"]

    assert chosen("--fusion", "folded") == ["fusion path folded: forced by the setting"]
    monkeypatch.setenv("DRORAE_FUSION", "folded")
    assert chosen() == ["fusion path folded: forced by the setting"]
    assert chosen("--fusion", "reference") == ["fusion path reference: forced by the setting"]


@pytest.mark.parametrize("command", USERS)
def test_a_path_that_cannot_run_is_one_sentence(refused, argv, monkeypatch, tmp_path, command):
    assert refused(*argv[command], "--fusion", "triton") == CANNOT_RUN
    monkeypatch.setenv("DRORAE_FUSION", "triton")
    assert refused(*argv[command]) == CANNOT_RUN
    assert not (tmp_path / "latents.npy").exists()
    assert not (tmp_path / "out.png").exists()


def test_decoding_prepares_no_fusion(run, argv, caplog, monkeypatch):
    run(*argv["encode"])
    monkeypatch.setenv("DRORAE_FUSION", "triton")
    with caplog.at_level(logging.INFO, "model.tokenizer"):
        assert run(*argv["decode"]).status == 0
    assert "fusion path reference: " in caplog.text
    outcome = run(*argv["decode"], "--fusion", "reference")
    assert outcome.status == 2
    assert "unrecognized arguments: --fusion" in outcome.err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_path_gives_the_latents_of_real_photos(run, drorae, tmp_path):
    """The kernels, interpreted in a process of their own, on one photo; the other paths on all of them."""

    def words(photos, output, *flags):
        return ["encode", *photos, "-o", output, "--dtype", "float32", "--device", "cpu", *flags]

    def interpreted(*flags):
        environment = {
            **os.environ,
            "DRORAE_FUSION": "triton",
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        command = [drorae, *map(str, words(SAMPLES[:1], tmp_path / "triton.npy", *flags))]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return np.load(tmp_path / "triton.npy")

    def encoded(photos, fusion, *flags):
        output = tmp_path / f"{fusion}.npy"
        assert run(*words(photos, output, "--fusion", fusion, *flags)).status == 0
        return np.load(output)

    folded, reference = encoded(SAMPLES, "folded"), encoded(SAMPLES, "reference")
    assert reference.shape == (3, 192, 16, 16)
    np.testing.assert_allclose(folded, reference, rtol=0, atol=1e-4)
    kernels = interpreted()
    np.testing.assert_allclose(kernels, reference[:1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(kernels, folded[:1], rtol=0, atol=1e-4)

    base = encoded(SAMPLES[:1], "reference", "--latent", "base")
    assert np.abs(base - reference[:1]).max() > 1e-2
    assert np.array_equal(encoded(SAMPLES[:1], "folded", "--latent", "base"), base)
    assert np.array_equal(interpreted("--latent", "base"), base)
