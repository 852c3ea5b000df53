"""``drorae train`` hands over to training, ``drorae evaluate`` to its evaluation."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from training.errors import DivergenceError, RecipeError


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("num_steps: 1\n")
    return path


@pytest.fixture
def training_run(monkeypatch):
    """Stands in for training.run; collects what it is called with."""
    module, calls = ModuleType("training.run"), []

    def run_phase(*args):
        calls.append(args)
        return 5

    module.run_phase = run_phase
    monkeypatch.setitem(sys.modules, "training.run", module)
    module.calls = calls
    return module


@pytest.mark.parametrize("phase", ["phase0", "phase1", "phase2", "phase3", "joint", "sweep"])
def test_train_passes_everything_on(run, training_run, recipe, phase):
    argv = ["--set", "a.b=1", "--set", "c=x=y", "--output", "runs/x", "--resume"]
    assert run("train", phase, "--config", recipe, *argv).status == 5
    assert training_run.calls == [(phase, recipe, ["a.b=1", "c=x=y"], Path("runs/x"), True)]


def test_train_defaults(run, training_run, recipe):
    run("train", "phase1", "--config", recipe)
    assert training_run.calls == [("phase1", recipe, [], None, False)]


def test_an_unknown_phase_suggests_the_nearest(run):
    assert "did you mean 'phase2'?" in run("train", "fase2").err


def test_train_refuses_before_it_loads_anything(refused, training_run, recipe, tmp_path):
    missing = tmp_path / "none.yaml"
    assert f"{missing}: there is no such recipe file" in refused("train", "phase1", "--config", missing)
    for override in ("novalue", "=3"):
        message = refused("train", "phase1", "--config", recipe, "--set", override)
        assert f"--set {override}: expected KEY=VALUE" in message
    assert training_run.calls == []


@pytest.mark.parametrize(("error", "status"), [(RecipeError("bad field"), 2), (DivergenceError("NaN"), 1)])
def test_errors_of_training(refused, training_run, recipe, error, status):
    def fail(*_):
        raise error

    training_run.run_phase = fail
    assert str(error) in refused("train", "phase2", "--config", recipe, status=status)


@pytest.mark.parametrize(
    ("command", "module"), [("train", "training.run"), ("evaluate", "training.evaluation.evaluate")]
)
def test_missing_extras_say_what_to_install(refused, command, module, recipe, monkeypatch, tmp_path):
    class Absent:
        def find_spec(self, name, *_):
            if name == module:
                raise ModuleNotFoundError("no module", name="matplotlib")

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    argv = ["phase1", "--config", recipe] if command == "train" else ["--data", tmp_path]
    message = refused(command, *argv, status=1)
    assert "needs the package 'matplotlib': pip install 'drorae[training]'" in message


def test_broken_recipe_is_named_with_its_field(refused, recipe):
    message = refused("train", "phase1", "--config", recipe)
    assert message.startswith(f"drorae: {recipe}: field '")


def test_evaluate_prints_means_and_writes_a_report(run, checkpoint, photos, tmp_path):
    argv = ["--checkpoint", checkpoint, "--data", photos, "--output", tmp_path / "report", "--device", "cpu"]
    outcome = run("evaluate", *argv, "--batch-size", 2)
    assert outcome.status == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["num_images"] == 3
    assert summary["results"]["enriched"]["psnr_db"] > 0
    assert (tmp_path / "report" / "evaluation.json").is_file()


def test_evaluate_refuses(refused, checkpoint, photos, photo, tmp_path):
    use = ("--checkpoint", checkpoint)
    assert "no such folder or tar file" in refused("evaluate", "--data", tmp_path / "none", *use)
    assert "is a file" in refused("evaluate", "--data", photos, "--output", photo, *use)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused("evaluate", "--data", empty, *use)


@pytest.mark.slow
def test_dry_run_is_planned_and_not_trained(run, training_run, photos, checkpoint, tmp_path):
    recipe = tmp_path / "plan.yaml"
    fields = {
        "init": str(checkpoint),
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"train": [str(photos)], "validation": [str(photos)], "num_workers": 0},
        "num_steps": "2 epochs",
        "batch_size": 3,
    }
    recipe.write_text(json.dumps(fields))  # JSON is YAML
    argv = ("train", "phase3", "--config", recipe, "--dry-run", "--matrix-tflops", 1, "--float32-tflops", 1)
    outcome = run(*argv)
    assert outcome.status == 0, outcome.err
    assert "2 of 3 images (2 epochs)" in outcome.out
    assert not (tmp_path / "run").exists()
    assert training_run.calls == []
    plan = json.loads(run(*argv, "--json", "--check-images", "all").out)
    assert plan["train"]["num_checked"] == 3
    sweep = run("train", "sweep", *argv[2:])
    assert sweep.status == 2
    assert sweep.err.startswith("drorae: --dry-run plans one phase")
    refused = run(*argv, "--set", "accumulation_steps=2")
    assert refused.status == 2
    assert refused.err.startswith("drorae: this run would fail: field 'accumulation_steps'")
