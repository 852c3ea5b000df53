"""Ranks: helpers alone, and two processes that train as one does.

The launched runs are one torchrun of two ranks on gloo that does all of the jobs in turn, since starting
Python twice takes longer than any of them. They train in float64, where equal runs are equal (`in_float64`).
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.config import PRESETS
from model.generator import Generator
from model.tokenizer import Tokenizer
from tests.training.conftest import LOG_ERROR, TINY, TINY_FUSION, in_float64, make_image
from tests.training.latents.folders import make_latents
from training.data.batches import random_crop, share_of_batch, training_batches
from training.data.sources import list_samples
from training.distributed.ranks import Ranks, current, process_group
from training.recipes.recipe import DataConfig
from training.run import run_phase

ROOT = Path(__file__).parents[3]
# Absolute, of weights and moments, which are below 10. Two sums of 1e4 terms may be 1e4 eps = 2e-12 apart in
# float64. Observed: 5e-15. Exported weights are rounded to float32, where 1e-6 is a step of the largest.
STATE_TOLERANCE, EXPORT_TOLERANCE = 1e-11, 1e-6
CLIP = "optimizer.clip_norm=2"  # below some steps' norms, above others'


@dataclass
class Job:
    """A run of `tests/training/ranks.py`."""

    phase: str
    recipe: str
    output: str
    overrides: list[str]
    resume: bool = False
    fault: str = "none"


def launch(file: Path, jobs: list[Job], script: Path = ROOT / "tests" / "training" / "ranks.py") -> Any:
    file.write_text(json.dumps([asdict(job) for job in jobs]))
    return torchrun(str(script), str(file))


def torchrun(*command: str) -> "subprocess.CompletedProcess[str]":
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        env={**os.environ, **threads},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_recipes(folder: Path) -> dict[str, str]:
    """Recipes of phases 1 to 3 with every loss on, and of phase 0."""
    photos = folder / "photos"
    photos.mkdir()
    for index in range(12):
        make_image(index).save(photos / f"{index:02d}.png")
    (photos / "11.png").write_bytes((photos / "11.png").read_bytes()[:200])  # counted by whichever rank
    torch.manual_seed(7)
    Tokenizer(TINY).save(folder / "phase0")
    common = {
        "device": "cpu",
        "output": str(folder / "unused"),
        "data": {
            "train": [str(photos)],
            "validation": [str(photos)],
            "resize_short_side": [32, 40],
            "num_workers": 0,
        },
        "num_steps": 6,
        "batch_size": 4,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "log_every_steps": 1,
        "evaluate_every_steps": 3,
        "checkpoint_every_steps": 2,
    }
    reconstruction = {
        **common,
        "init": str(folder / "phase0"),
        "fusion": TINY_FUSION.model_dump(),
        "noise_tau": 0.1,
        "ema_decay": 0.9,
        "loss": {"perceptual_network": "efficientnet-lite0"},
        "discriminator": {"start_step": 1, "adversarial_start_step": 2},
    }
    for index in range(10):
        folder.joinpath("classes", "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        make_image(index).save(folder / "classes" / "ab"[index % 2] / f"{index}.png")
    sizes_of_generator = {"trunk_width": 16, "trunk_depth": 2, "trunk_heads": 2, "head_width": 24}
    labelled = str(folder / "classes")
    generation = {
        **common,
        "data": {"train": [labelled], "validation": [labelled], "num_workers": 0},
        "tokenizer": str(folder / "phase0"),
        "statistics": "data",
        "generator": {
            **sizes_of_generator,
            "head_depth": 1,
            "head_heads": 2,
            "num_classes": 2,
            "latent_channels": 32,
            "grid": 4,
        },
        "ema_decay": 0.9,
        "sample_points": 3,
        "samples_per_class": 1,
        "latents_dtype": "float32",
    }
    sizes = {"image_size": 14, "teacher_image_size": 32, "final_image_size": 28}
    distillation = {**common, **sizes, "preset": "tiny", "final_steps": 2, "final_batch_size": 2}
    files = {}
    recipes = {"reconstruction": reconstruction, "phase0": distillation, "generator": generation}
    for name, recipe in recipes.items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        files[name] = str(file)
    return files


@dataclass(frozen=True)
class Runs:
    """Run directories, by name; ``two-...`` ran on two ranks, ``one-...`` on one."""

    folder: Path

    def state(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / name / "state.pt", weights_only=True)

    def rows(self, name: str, table: str = "train.csv") -> list[dict[str, float]]:
        with (self.folder / name / table).open() as stream:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        checkpoint = self.folder / name / "checkpoint"
        if "generator" in name:
            return dict(Generator.load(checkpoint).state_dict())
        return dict(Tokenizer.load(checkpoint, fusion="reference").state_dict())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run that the tests below compare."""
    folder = tmp_path_factory.mktemp("ranks")
    recipes = write_recipes(folder)
    main, phase0, generator = recipes["reconstruction"], recipes["phase0"], recipes["generator"]
    held = "hold_latents=true"
    make_latents(Tokenizer.load(folder / "phase0"), folder / "latents", flip=True)
    stored = [f"data.{name}={folder / 'latents'}" for name in ("latents", "validation_latents")]
    stored += ["data.train=[]", "data.validation=[]", "generator.num_classes=3"]
    fsdp = "distributed.strategy=fsdp"
    alone = [
        Job("joint", main, "one-joint", [CLIP]),
        Job("phase2", main, "one-phase2", ["accumulation_steps=2"]),
        Job("phase0", phase0, "one-phase0", []),
        Job("joint", main, "from-one", [CLIP], fault="cut"),
        Job("generator", generator, "one-generator", ["accumulation_steps=2"]),
        Job("generator", generator, "one-generator-held", [held, "optimizer.clip_norm=0.1"]),
        Job("generator", generator, "one-generator-stored", stored),
        Job("generator", generator, "generator-from-one", ["accumulation_steps=2"], fault="cut"),
    ]
    together = [
        Job("joint", main, "two-joint", [CLIP]),
        Job("phase2", main, "two-phase2", ["accumulation_steps=2"]),
        Job("phase0", phase0, "two-phase0", []),
        Job("joint", main, "two-joint-fsdp", [CLIP, fsdp]),
        Job(
            "phase2", main, "two-phase2-fsdp", ["accumulation_steps=2", fsdp, "activation_checkpointing=true"]
        ),
        Job("joint", main, "from-one", [CLIP, fsdp], resume=True),
        Job("generator", generator, "two-generator", ["accumulation_steps=2"]),
        Job("generator", generator, "two-generator-held", [held, "optimizer.clip_norm=0.1", fsdp]),
        Job("generator", generator, "two-generator-stored", stored),
        Job("generator", generator, "generator-from-one", ["accumulation_steps=2", fsdp], resume=True),
        Job("joint", main, "from-two", [CLIP], fault="cut"),
        Job("joint", main, "from-two-fsdp", [CLIP, fsdp], fault="cut"),
    ]
    for job in (*alone, *together):
        job.output = str(folder / job.output)
    with pytest.MonkeyPatch.context() as patch, in_float64():
        patch.setitem(PRESETS, "tiny", TINY)
        from tests.training.ranks import run_job

        for job in alone:
            assert run_job(job.__dict__) == 0
    result = launch(folder / "jobs.json", together)
    assert result.returncode == 0, result.stderr[-4000:]
    for name in ("from-two", "from-two-fsdp"):
        assert not (folder / name / "checkpoint").exists()
        with in_float64():
            run_phase("joint", Path(main), [CLIP], folder / name, resume=True)
    return Runs(folder)


def differences(expected: Any, found: Any, path: str = "") -> Iterator[tuple[float, str]]:
    """Largest absolute difference of every tensor of two nested states, which must have the same names."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), path
        for key in expected:
            yield from differences(expected[key], found[key], f"{path}/{key}")
    elif isinstance(expected, torch.Tensor) and expected.numel():
        yield float((expected.double() - found.double()).abs().max()), path


EQUAL_RUNS = [
    ("one-joint", "two-joint"),
    ("one-joint", "two-joint-fsdp"),
    ("one-phase2", "two-phase2"),
    ("one-phase2", "two-phase2-fsdp"),
    ("one-phase0", "two-phase0"),
    ("one-generator", "two-generator"),
    ("one-generator", "generator-from-one"),
    ("one-generator-held", "two-generator-held"),
    ("one-generator-stored", "two-generator-stored"),
    ("one-joint", "from-one"),
    ("one-joint", "from-two"),
    ("one-joint", "from-two-fsdp"),
]


@pytest.mark.parametrize(("one", "other"), EQUAL_RUNS)
def test_number_of_ranks_changes_neither_state_nor_checkpoint(runs: Runs, one: str, other: str) -> None:
    worst = max(differences(runs.state(one)["task"], runs.state(other)["task"]))
    assert worst[0] < STATE_TOLERANCE, worst
    worst = max(differences(runs.weights(one), runs.weights(other)))
    assert worst[0] < EXPORT_TOLERANCE, worst


@pytest.mark.parametrize(("one", "other"), EQUAL_RUNS)
def test_number_of_ranks_does_not_change_the_logs(runs: Runs, one: str, other: str) -> None:
    for table in ("train.csv", "validation.csv"):
        expected, found = runs.rows(one, table), runs.rows(other, table)
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            a.pop("seconds", None)
            assert {name: b[name] for name in a} == pytest.approx(a, rel=LOG_ERROR)


def test_the_runs_went_through_what_they_should(runs: Runs) -> None:
    log = runs.rows("two-joint")
    assert log[-1]["adversarial_weight"] > 0
    assert log[-1]["num_broken"] >= 1
    norms = [row["gradient_norm"] for row in log]
    assert min(norms) < 2 < max(norms)
    provenance = json.loads((runs.folder / "two-joint" / "run.json").read_text())
    assert provenance["num_ranks"] == 2


def test_killed_rank_ends_the_run_with_an_error(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path)["reconstruction"]
    output = tmp_path / "run"
    result = launch(tmp_path / "jobs.json", [Job("phase1", recipe, str(output), [], fault="killed")])
    assert result.returncode != 0
    assert "rank 0 of 2 gave up: another rank ended" in result.stderr
    assert torch.load(output / "state.pt", weights_only=True)["step"] == 3  # as saved before the validation
    assert not (output / "checkpoint").exists()


def test_a_signal_to_one_ranks_group_saves_the_step_of_all(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path)["reconstruction"]
    output = tmp_path / "run"
    job = Job("phase1", recipe, str(output), ["data.num_workers=1"], fault="terminated")
    result = launch(tmp_path / "jobs.json", [job])
    assert "stopped after step 4, which is saved" in result.stderr
    assert torch.load(output / "state.pt", weights_only=True)["step"] == 4


def test_command_line_under_torchrun_names_the_field(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path)["reconstruction"]
    command = ["-m", "cli.main", "train", "phase2", "--config", recipe, "--set", "batch_size=3"]
    result = torchrun(*command)
    assert result.returncode != 0
    assert "drorae: field 'accumulation_steps': batch_size=3 does not divide" in result.stderr
    assert "on 2 ranks" in result.stderr


def test_one_process_is_a_world_of_one() -> None:
    with process_group() as ranks:
        assert ranks == current() == Ranks(rank=0, size=1, local_rank=0)
    tensor = torch.arange(3.0)
    assert ranks.is_main
    assert ranks.all_gather_object("x") == ["x"]
    assert ranks.broadcast_object("x") == "x"
    assert ranks.all_reduce_mean(tensor) is tensor
    assert ranks.mean_figures({"loss": 2.0}) == {"loss": 2.0}
    assert ranks.any(True)
    assert ranks.shard([1, 2, 3]) == [1, 2, 3]


def test_shards_cover_everything_once() -> None:
    items = list(range(7))
    shards = [Ranks(rank, 3).shard(items) for rank in range(3)]
    assert sorted(item for shard in shards for item in shard) == items
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_ranks_batches_laid_end_to_end_are_the_global_batch(tmp_path: Path) -> None:
    write_recipes(tmp_path)
    data = DataConfig(train=[tmp_path / "photos"], resize_short_side=(32, 40), num_workers=0)

    def third_and_fourth(ranks: Ranks) -> list[torch.Tensor]:
        stream = training_batches(
            list_samples(data.train), data, random_crop(data, 32), 4, seed=3, start_batch=2, ranks=ranks
        )
        return [batch.images for batch in islice(stream, 2)]

    shares = [third_and_fourth(Ranks(rank, 2)) for rank in range(2)]
    for whole, parts in zip(third_and_fourth(Ranks()), zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="5 images does not divide among 2 ranks"):
        share_of_batch(5, Ranks(0, 2))
