"""``drorae export-latents``, and ``drorae info`` of the folder that it reads."""

import json

import pytest

from model.tokenizer import Tokenizer
from tests.training.latents.folders import make_latents


@pytest.fixture
def latents(checkpoint, tmp_path):
    return make_latents(Tokenizer.load(checkpoint), tmp_path / "latents", count=5, per_shard=2, broken=1)


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("webdataset", ["export.json", *(f"latents-{n:06d}.tar" for n in range(3))]),
        ("npy", ["dataset.json", "export.json", *(f"img-mean-std-{n:08d}.npy" for n in range(4))]),
    ],
)
def test_the_layouts_are_written_and_written_again(latents, run, tmp_path, layout, files):
    output = tmp_path / "out"
    for _ in range(2):
        outcome = run("export-latents", latents, "--format", layout, "--output", output)
        assert (outcome.status, outcome.out.split(":")[0]) == (0, str(output))
        assert sorted(file.name for file in output.rglob("*") if file.is_file()) == sorted(files)


def test_what_cannot_be_exported_is_one_sentence(latents, refused, tmp_path):
    def export(source, output, status=2):
        return refused("export-latents", source, "--format", "npy", "--output", output, status=status)

    assert "manifest.json" in export(tmp_path / "nowhere", tmp_path / "out")
    assert "not empty" in export(latents, tmp_path)
    file = tmp_path / "file"
    file.touch()
    assert str(file) in export(latents, file, status=1)
    (latents / "latents-000001.safetensors").unlink()
    assert "latents-000001" in export(latents, tmp_path / "out")


def test_info_shows_the_manifest(latents, run, checkpoint):
    outcome = run("info", latents)
    assert outcome.status == 0
    assert "tiny" in outcome.out
    facts = json.loads(run("info", latents, "--json").out)
    assert facts["identity"]["checkpoint_sha256"] == Tokenizer.load(checkpoint).checkpoint.sha256
    assert facts["totals"]["images"] == 4
    assert facts["totals"]["broken"] == 1
    manifest = latents / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    assert "incomplete" in run("info", latents).out
    manifest.write_text("{")
    assert run("info", latents).status == 2
