"""The dry run: what it finds, and that it writes nothing."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import TINY, encode_png, make_image
from training.errors import RecipeError
from training.planning.plan import Plan, PlanOptions, plan_phase, render_plan
from training.run import run_phase

MakePlan = Callable[..., Plan]
STATED = PlanOptions(matrix_tflops={"bfloat16": 2.0, "float32": 1.0}, matrix_share=0.5)


@pytest.fixture
def plan(recipe_file: Path) -> MakePlan:
    def make(phase: str, *overrides: str, resume: bool = False, options: PlanOptions = STATED) -> Plan:
        return plan_phase(phase, recipe_file, list(overrides), resume=resume, options=options)

    return make


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_run_that_can_be_done(plan: MakePlan, tmp_path: Path) -> None:
    before = tree(tmp_path)
    found = plan("phase2")
    assert found.findings.problems == []
    assert tree(tmp_path) == before
    assert (found.train.num_listed, found.train.num_checked, found.train.broken) == (12, 12, [])
    assert found.micro_batch == 2
    assert found.num_epochs == 2
    assert found.footprint is not None
    operations = (found.footprint.generator[1] + found.footprint.discriminator).total()
    # Everything is float32 here: 4 images at half of 1 TFLOP/s.
    assert found.figures["step_s"] == pytest.approx(4 * operations / 0.5e12)
    page = render_plan(found)
    for text in ("6 of 4 images (2 epochs)", "fusion", "GFLOP per image", "nothing stands against this run"):
        assert text in page
    assert json.loads(json.dumps(found.as_dict()))["peak_bytes"] == found.footprint.peak_bytes


def test_disk_is_what_the_run_writes(plan: MakePlan, recipe_file: Path, tmp_path: Path) -> None:
    found = plan("phase1")
    run_phase("phase1", recipe_file, [])
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoint").iterdir())
    assert written == pytest.approx(found.figures["checkpoint_bytes"], rel=0.2)  # config.json and headers
    state = (tmp_path / "run" / "state.pt").stat().st_size
    assert state == pytest.approx(found.figures["state_bytes"], rel=0.35)  # many small tensors in a zip


def test_broken_images_are_warnings_until_all_are(plan: MakePlan, photos: Path) -> None:
    (photos / "broken.png").write_bytes(encode_png(make_image(99))[:500])
    found = plan("phase1")
    assert found.findings.problems == []
    assert any("1 of 13 images cannot be decoded" in text for text in found.findings.warnings)
    assert [key for key, _ in found.train.broken] == ["broken"]
    few = plan("phase1", options=PlanOptions(num_checked=2, matrix_tflops=STATED.matrix_tflops))
    assert few.train.num_checked == 2
    for file in photos.iterdir():
        file.write_bytes(b"no image")
    assert any("none of 13 images" in text for text in plan("phase1").findings.problems)


@pytest.mark.parametrize(
    ("phase", "overrides", "message"),
    [
        ("phase1", ["data.train=[/nowhere]"], "field 'data.train': .*/nowhere does not exist"),
        ("phase1", ["data.validation=[]"], "field 'data.validation'"),
        ("phase1", ["init=/nowhere"], "field 'init': no checkpoint directory at /nowhere"),
        ("phase3", [], "field 'init': .* has no fusion"),
        ("phase1", ["accumulation_steps=3"], "field 'accumulation_steps'"),
        ("phase1", ["data.num_images=13"], "recipe says 13 but data.train lists 12"),
        ("phase1", ["optimizer.warmup_steps=6"], "field 'optimizer.warmup_steps'"),
        ("phase1", ["device=cuda:7"], "there is no cuda:7 here"),
        ("phase1", ["device=gpu"], "no device 'gpu'"),
        ("phase1", ["loss={perceptual_network: lpips-vgg, vgg_weights: /no.pth}"], "field 'loss': .*"),
        ("phase1", ["discriminator.dino_weights=/no.pth"], "field 'discriminator': /no.pth: no such file"),
        ("phase1", ["cache.directory=/tmp/cache"], "field 'data.crops_per_image'"),
        ("phase1", ["output=/proc/version"], "field 'output': /proc/version is a file"),
    ],
)
def test_problems_name_the_field(
    plan: MakePlan, phase: str, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.planning.device._measured_tflops", lambda *_: 1.0)
    problems = plan(phase, *overrides).findings.problems
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems


def test_a_run_that_is_there_needs_resume(plan: MakePlan, recipe_file: Path) -> None:
    run_phase("phase1", recipe_file, ["num_steps=1", "discriminator={start_step: 0}"])
    assert any("holds a run" in text for text in plan("phase1").findings.problems)
    assert plan("phase1", resume=True).findings.problems == []


def test_a_full_disk_is_foreseen(plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})()
    monkeypatch.setattr("training.planning.checks.shutil.disk_usage", lambda _: usage)
    cache = ["data.crops_per_image=4", f"cache={{directory: {tmp_path / 'cache'}, dtype: float32}}"]
    found = plan("phase1", *cache)
    assert [text.split(":")[0] for text in found.findings.problems] == [
        "field 'output'",
        "field 'cache.directory'",
    ]
    values = 12 * 4 * (TINY.encoder.grid**2 * TINY.encoder.width * 4 + 3 * TINY.image_size**2)
    assert found.figures["cache_bytes"] == pytest.approx(values, rel=0.01)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written(plan: MakePlan, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert any(
        "is not writable" in text for text in plan("phase1", f"output={locked / 'run'}").findings.problems
    )


def test_too_little_memory_is_foreseen(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.planning.plan.device_bytes", lambda *_: 2**20)
    (problem,) = plan("phase1").findings.problems
    assert "a micro-batch of 2 images needs" in problem
    assert "use more micro-batches" in problem


def test_cached_encoder_is_not_counted(plan: MakePlan, tmp_path: Path) -> None:
    cached = plan("phase1", "data.crops_per_image=1", f"cache.directory={tmp_path / 'cache'}").footprint
    plain = plan("phase1").footprint
    assert cached is not None
    assert plain is not None
    assert cached.generator[0].total() < plain.generator[0].total()
    assert cached.discriminator == plain.discriminator


def test_epochs_are_of_the_listed_images(plan: MakePlan) -> None:
    assert plan("phase1", "num_steps=3 epochs").recipe.num_steps == 9
    with pytest.raises(RecipeError, match="field 'data'"):
        plan("phase1", "num_steps=3 epochs", "data.train=[/nowhere]")


def test_phase_0_is_checked_without_a_footprint(plan: MakePlan, recipe_file: Path, photos: Path) -> None:
    data = {"train": [str(photos)], "validation": [str(photos)]}
    recipe_file.write_text(json.dumps({"output": "out", "data": data, "num_steps": 2, "preset": "mini"}))
    found = plan("phase0")
    assert (found.findings.problems, found.footprint) == ([], None)
    assert "nothing stands against this run" in render_plan(found)
