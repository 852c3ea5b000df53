"""``drorae analyze``: what it prints and writes, and what it refuses."""

import json
import sys

import pytest


@pytest.mark.slow
def test_analyze_prints_the_main_numbers_and_writes_figures(run, checkpoint, photos, tmp_path):
    output = tmp_path / "analysis"
    outcome = run("analyze", checkpoint, "--data", photos, "--output", output, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    printed = json.loads(outcome.out)
    assert printed["num_images"] == 3
    assert set(printed["spectrum_deviation"]) == {"base", "enriched"}
    assert json.loads((output / "analysis.json").read_text())["num_images"] == 3
    assert (output / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_analyze_refuses(run, refused, checkpoint, other_checkpoint, photos, photo, tmp_path):
    use = ("analyze", checkpoint, "--device", "cpu")
    to = ("--output", tmp_path / "out")
    assert "no such folder or tar file" in refused(*use, *to, "--data", tmp_path / "none")
    assert "is a file" in refused(*use, "--data", photos, "--output", photo)
    assert "--limit: expected a whole number from 1" in run(*use, *to, "--data", photos, "--limit", 0).err
    assert "named twice" in refused(*use, *to, "--data", photos, "--checkpoint", checkpoint)
    message = refused(*use, *to, "--data", photos, "--base-checkpoint", other_checkpoint)
    assert f"{other_checkpoint}: encoder tensor" in message
    assert not (tmp_path / "out").exists()


def test_missing_extras_say_what_to_install(refused, checkpoint, photos, monkeypatch, tmp_path):
    class Absent:
        def find_spec(self, name, *_):
            if name == "training.studies.analysis":
                raise ModuleNotFoundError("no module", name="matplotlib")

    monkeypatch.delitem(sys.modules, "training.studies.analysis", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    argv = (checkpoint, "--data", photos, "--output", tmp_path / "out")
    assert "pip install 'drorae[training]'" in refused("analyze", *argv, status=1)
