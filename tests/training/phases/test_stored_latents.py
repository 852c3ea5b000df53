"""Stage 2 from a folder of latents: it learns from exactly these rows, goes on, and refuses other folders."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from model.generator import Generator
from model.tokenizer import Tokenizer
from tests.training.latents.folders import make_latents
from training.data.held_latents import hold_latents
from training.data.sources import list_samples
from training.errors import DataError, LatentsError, RecipeError
from training.latents.reading.folder import LatentFolder
from training.phases.generation import GenerationTask
from training.planning.plan import plan_phase, render_plan
from training.recipes.generator import GeneratorRecipe
from training.recipes.recipe import load_recipe
from training.run import run_phase


@pytest.fixture
def latents(encoder_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    tokenizer = Tokenizer.load(encoder_checkpoint)
    return lambda name, **options: make_latents(tokenizer, tmp_path / name, **options)


@pytest.fixture
def recipe_file(tmp_path: Path, encoder_checkpoint: Path, latents: Callable[..., Path]) -> Path:
    recipe = {
        "name": "tiny-generator",
        "tokenizer": str(encoder_checkpoint),
        "generator": {
            "num_classes": 3,
            "latent_channels": 32,
            "grid": 4,
            "trunk_width": 16,
            "trunk_depth": 2,
            "trunk_heads": 2,
            "head_width": 24,
            "head_depth": 1,
            "head_heads": 2,
        },
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "data": {
            "latents": str(latents("train", flip=True)),
            "validation_latents": str(latents("val", count=5)),
            "num_workers": 0,
        },
        "statistics": "data",
        "latents_dtype": "float32",
        "num_steps": 4,
        "batch_size": 4,
        "ema_decay": 0.9,
        "sample_points": 2,
        "samples_per_class": 0,
        "log_every_steps": 1,
        "evaluate_every_steps": 2,
        "checkpoint_every_steps": 2,
    }
    file = tmp_path / "generator.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def make_task(recipe_file: Path, *overrides: str) -> GenerationTask:
    return GenerationTask(load_recipe(GeneratorRecipe, recipe_file, list(overrides)), [])


@pytest.mark.parametrize("options", [["hold_latents=true"], ["hold_latents=false", "data.num_workers=1"]])
def test_a_run_needs_no_image(options: list[str], recipe_file: Path, tmp_path: Path) -> None:
    for folder in tmp_path.glob("*-pictures"):
        for file in folder.iterdir():
            file.unlink()
    run_phase("generator", recipe_file, options)
    generator = Generator.load(tmp_path / "run" / "checkpoint")
    assert generator.trained_on.class_names == ("ant", "bee", "cat")
    assert generator.config.num_classes == 3
    mean, var = LatentFolder(tmp_path / "train").statistics()
    assert torch.equal(generator.latent_mean, mean)
    assert torch.equal(generator.latent_var, var)


@pytest.mark.parametrize("held", [False, True])
def test_batches_are_the_rows_and_their_mirror_images(held: bool, recipe_file: Path, tmp_path: Path) -> None:
    task = make_task(recipe_file, f"hold_latents={held}", "batch_size=12", "accumulation_steps=2")
    folder = LatentFolder(tmp_path / "train")
    views = task.generator.normalize_latents(folder.rows(range(24)).latents)
    batches, seen = task.batches(0), []
    for _ in range(2):
        for batch in next(batches):
            distances = (batch.latents[:, None] - views).abs().amax(dim=(2, 3, 4))
            found = distances.argmin(dim=1)
            assert distances.amin(dim=1).max() < 1e-5
            assert (found % 3).tolist() == batch.labels.tolist()
            seen += found.tolist()
    if held:
        assert sorted(view % 12 for view in seen) == sorted([*range(12)] * 2)
    else:
        assert sorted(seen) == list(range(24))


def test_held_latents_are_those_that_the_images_would_give(recipe_file: Path, tmp_path: Path) -> None:
    task = make_task(recipe_file, "hold_latents=true")
    for held, name, flip in ((task.held, "train", True), (task.validation, "val", False)):
        assert held is not None
        samples = list_samples([tmp_path / f"{name}-pictures"])
        images = hold_latents(task.tokenizer, samples, "enriched", flip, torch.float32, progress=False)
        torch.testing.assert_close(held.latents, images.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("held", ["false", "true"])
def test_a_cut_run_resumes_bit_for_bit(held: str, recipe_file: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [f"hold_latents={held}", "accumulation_steps=2", "num_steps=8"]
    run_phase("generator", recipe_file, options, whole)
    train_step = GenerationTask.train_step

    def fail_at_7(self: GenerationTask, step: int, batches: Any) -> dict[str, float]:
        if step == 7:
            raise KeyboardInterrupt
        return train_step(self, step, batches)

    with patch.object(GenerationTask, "train_step", fail_at_7), pytest.raises(KeyboardInterrupt):
        run_phase("generator", recipe_file, options, cut)
    run_phase("generator", recipe_file, options, cut, resume=True)
    expected, resumed = (Generator.load(run / "checkpoint").state_dict() for run in (whole, cut))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_epochs_count_images_and_a_folder_without_mirror_images_does(recipe_file: Path, latents: Any) -> None:
    options = [f"data.latents={latents('plain')}", "num_steps=2 epochs"]
    run_phase("generator", recipe_file, options)
    task = make_task(recipe_file, options[0], "hold_latents=true")
    assert task.held is not None
    assert task.held.latents.shape[:2] == (12, 1)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"checkpoint_sha256": "0" * 64}, "another tokenizer"),
        ({"latent": "base"}, "base latents"),
        ({"normalized": True}, "normalised"),
    ],
)
def test_latents_of_something_else_are_refused_by_field(
    made: dict[str, Any], words: str, recipe_file: Path, latents: Any
) -> None:
    if made.get("normalized"):
        folder = latents("normal")
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"normalized": false', '"normalized": true'))
    else:
        folder = latents("other", **made)
    for field in ("latents", "validation_latents"):
        with pytest.raises(RecipeError, match=rf"data\.{field}.*{words}"):
            run_phase("generator", recipe_file, [f"data.{field}={folder}"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.latents=null"], "data.train"),
        (["data.validation_latents=null"], "data.validation"),
        (["data.latents=nowhere"], "data.latents"),
        (["correction=replace"], "correction"),
        (["batch_size=40"], "fewer than one batch"),
        (["class_names=[ant]"], "1 names of classes"),
    ],
)
def test_what_cannot_be_done_is_told(overrides: list[str], words: str, recipe_file: Path) -> None:
    with pytest.raises((RecipeError, DataError, LatentsError), match=words):
        run_phase("generator", recipe_file, overrides)


def test_images_and_latents_are_not_both_named(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.train"):
        run_phase("generator", recipe_file, [f"data.train=[{tmp_path / 'train-pictures'}]"])


def test_rows_without_a_class_are_told(recipe_file: Path, latents: Any) -> None:
    folder = latents("unlabelled", has_labels=False)
    with pytest.raises(DataError, match="12 of 12 images have no class"):
        make_task(recipe_file, f"data.latents={folder}")
    with pytest.raises(RecipeError, match=r"data\.validation_latents"):
        make_task(recipe_file, f"data.validation_latents={folder}")


def test_a_file_that_is_cut_in_a_worker_is_one_sentence(recipe_file: Path, tmp_path: Path) -> None:
    task = make_task(recipe_file, "data.num_workers=1", "hold_latents=false")
    batches = task.batches(0)
    (tmp_path / "train" / "latents-000000.safetensors").write_bytes(b"")
    with pytest.raises(LatentsError, match="latents-000000") as caught:
        list(islice(batches, 6))
    assert "\n" not in str(caught.value)


def test_a_dry_run_reads_the_folders(recipe_file: Path, latents: Any) -> None:
    plan = plan_phase("generator", recipe_file, ["hold_latents=true"])
    assert plan.findings.problems == []
    assert plan.figures["held_latents_bytes"] == 12 * 2 * 32 * 4 * 4 * 4
    assert "12 images of 3 classes" in render_plan(plan)
    other = latents("other", checkpoint_sha256="0" * 64)
    problems = plan_phase("generator", recipe_file, [f"data.latents={other}"]).findings.problems
    assert any("another tokenizer" in problem for problem in problems)
