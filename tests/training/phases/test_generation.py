"""Stage 2 end to end on a tiny tokenizer: what it learns, what it writes, kill and resume."""

import csv
import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from model.config import TokenizerConfig
from model.generator import Generator
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION, encode_png, make_image, write_shard
from training.data.classes import find_classes
from training.data.held_latents import HeldLatents, hold_latents, shuffled
from training.data.sources import list_samples
from training.distributed.ranks import Ranks
from training.errors import DataError, RecipeError
from training.phases.generation import GenerationTask, draw_times
from training.planning.plan import plan_phase, render_plan
from training.recipes.generator import GeneratorRecipe
from training.recipes.recipe import load_recipe
from training.run import run_phase

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Twelve labelled pictures, with names of the classes beside them."""
    (tmp_path / "data").mkdir()
    members: dict[str, bytes] = {}
    for index in range(12):
        members[f"{index:02d}.png"] = encode_png(make_image(index))
        members[f"{index:02d}.cls"] = str(index % 3).encode()
    names = "".join(f"{number}\t{name}\n" for number, name in enumerate(NAMES))
    (tmp_path / "data" / "classes.txt").write_text(names)
    return write_shard(tmp_path / "data" / "photos.tar", members)


@pytest.fixture
def recipe_file(tmp_path: Path, shard: Path, encoder_checkpoint: Path) -> Path:
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
        "data": {"train": [str(shard)], "validation": [str(shard)], "num_workers": 0},
        "statistics": "data",
        "num_steps": 6,
        "batch_size": 4,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "clip_norm": 1.0},
        "ema_decay": 0.9,
        "sample_points": 3,
        "samples_per_class": 1,
        "log_every_steps": 1,
        "evaluate_every_steps": 3,
        "checkpoint_every_steps": 2,
    }
    file = tmp_path / "generator.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(Generator.load(checkpoint).state_dict())


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def make_task(recipe_file: Path, *overrides: str) -> GenerationTask:
    recipe = load_recipe(GeneratorRecipe, recipe_file, list(overrides))
    return GenerationTask(recipe, list_samples(recipe.data.train))


@pytest.mark.parametrize("held", ["false", "true"])
def test_a_run_leaves_a_generator_pictures_and_tables(held: str, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_phase("generator", recipe_file, [f"hold_latents={held}", "keep_snapshots=true"])
    generator = Generator.load(run / "checkpoint")
    assert generator.config.name == "tiny-generator"
    assert generator.trained_on.class_names == NAMES
    assert generator.trained_on.time_law == "logit-normal"
    assert generator.trained_on.shift == 1.0  # 512 numbers are fewer than 4096
    tokenizer = Tokenizer.load(tmp_path / "phase0")
    generator.check_tokenizer(tokenizer)
    assert generator.info is not None
    assert generator.info.provenance["recipe"]["num_steps"] == 6
    assert [row["step"] for row in rows_of(run / "train.csv")] == ["1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in rows_of(run / "validation.csv")] == ["3", "6"]
    assert sorted(file.name for file in (run / "grids").iterdir()) == ["000003.png", "000006.png"]
    assert sorted(folder.name for folder in (run / "snapshots").iterdir()) == ["000003", "000006"]
    last, snapshot = weights_of(run / "checkpoint"), weights_of(run / "snapshots" / "000006")
    assert all(torch.equal(last[name], snapshot[name]) for name in last)


def test_the_first_loss_is_that_of_predicting_nothing(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("generator", recipe_file, ["num_steps=1", "batch_size=12", "hold_latents=true"])
    first = float(rows_of(tmp_path / "run" / "train.csv")[0]["loss"])
    assert first == pytest.approx(2, abs=0.15)  # 1 + the latents' variance


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_it_learns(matrices: str, recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["num_steps=150", "evaluate_every_steps=150", "hold_latents=true"]
    overrides.append(f"optimizer.matrices={matrices}")
    run_phase("generator", recipe_file, [*overrides, "optimizer.learning_rate=1e-2", "batch_size=12"])
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "run" / "train.csv")]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(("held", "matrices"), [("false", "adamw"), ("true", "adamw"), ("true", "muon")])
def test_a_cut_run_resumes_bit_for_bit(held: str, matrices: str, recipe_file: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [f"hold_latents={held}", f"optimizer.matrices={matrices}", "accumulation_steps=2"]
    run_phase("generator", recipe_file, options, whole)
    train_step = GenerationTask.train_step

    def fail_at_5(self: GenerationTask, step: int, batches: Any) -> dict[str, float]:
        if step == 5:
            raise KeyboardInterrupt
        return train_step(self, step, batches)

    with patch.object(GenerationTask, "train_step", fail_at_5), pytest.raises(KeyboardInterrupt):
        run_phase("generator", recipe_file, options, cut)
    run_phase("generator", recipe_file, options, cut, resume=True)
    expected, resumed = weights_of(whole / "checkpoint"), weights_of(cut / "checkpoint")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    for table in ("train.csv", "validation.csv"):
        kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(whole / table)]
        assert [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(cut / table)] == kept


def test_another_tokenizer_does_not_resume(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("generator", recipe_file, [])
    torch.manual_seed(8)
    Tokenizer(Tokenizer.load(tmp_path / "phase0").config).save(tmp_path / "other")
    with pytest.raises(Exception, match="tokenizer is not the one"):
        run_phase("generator", recipe_file, [f"tokenizer={tmp_path / 'other'}"], resume=True)


@pytest.mark.usefixtures("exact")
def test_micro_batches_do_not_change_a_step(recipe_file: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        options = ["hold_latents=true", f"accumulation_steps={count}"]
        run_phase("generator", recipe_file, options, tmp_path / str(count))
    one, two = (rows_of(tmp_path / count / "train.csv") for count in "12")
    for first, second in zip(one, two, strict=True):
        assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=1e-5)


def test_steps_between_reports_do_not_wait_for_figures(recipe_file: Path) -> None:
    task = make_task(
        recipe_file, "hold_latents=true", "log_every_steps=3", "checkpoint_every_steps=4", "num_steps=9"
    )
    batches = task.batches(0)
    reported = [bool(task.train_step(step, next(batches))) for step in range(9)]
    assert reported == [False, False, True, True, False, True, False, True, True]


def test_muon_updates_the_matrices_of_blocks_alone(recipe_file: Path) -> None:
    task = make_task(recipe_file, "optimizer.matrices=muon")
    muon, adamw = ({p for group in one.param_groups for p in group["params"]} for one in task.optimizers)
    named = dict(task.network.named_parameters())
    assert muon == {p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    assert muon | adamw == {p for p in named.values() if p.requires_grad}
    assert not muon & adamw
    with pytest.raises(RecipeError, match=r"optimizer\.matrices"):
        make_task(recipe_file, "optimizer.matrices=muon", "distributed.strategy=fsdp")


def test_labels_are_dropped_at_their_rate(recipe_file: Path) -> None:
    task = make_task(recipe_file, "hold_latents=true", "class_dropout=0.25", "batch_size=512")
    seen: list[torch.Tensor] = []
    task.model = lambda latents, time, labels: seen.append(labels) or latents * 0  # type: ignore[assignment]
    batch = next(task.batches(0))[0]
    task._loss(0, 0, batch)
    dropped = seen[0] == 3
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.06)
    assert torch.equal(seen[0][~dropped], batch.labels[~dropped])


def test_held_batches_are_the_images_and_their_mirror_images(recipe_file: Path, tmp_path: Path) -> None:
    task = make_task(recipe_file, "hold_latents=true", "latents_dtype=float32", "batch_size=12")
    tokenizer = Tokenizer.load(tmp_path / "phase0")
    held = hold_latents(tokenizer, task.samples, "enriched", True, torch.float32, progress=False)
    mean, var = held.statistics()
    assert torch.allclose(mean, held.latents.double().mean(dim=(0, 1)).float(), atol=1e-6)
    assert torch.allclose(var, held.latents.double().var(dim=(0, 1), correction=0).float(), atol=1e-6)
    views = (held.latents - mean) / torch.sqrt(var + 1e-5)
    batches = task.batches(0)
    sides = []
    for _ in range(3):
        batch = next(batches)[0]
        distances = (batch.latents[:, None, None] - views).abs().amax(dim=(3, 4, 5))  # [B, images, F]
        found = distances.flatten(1).argmin(dim=1)
        assert distances.flatten(1).amin(dim=1).max() < 1e-4
        assert sorted((found // 2).tolist()) == list(range(12))  # an epoch is every image once
        assert torch.equal(held.labels[found // 2], batch.labels)
        sides += (found % 2).tolist()
    assert 0.2 < sum(sides) / len(sides) < 0.8


def test_numbers_of_a_batch_are_those_of_its_position() -> None:
    def take(start: int, ranks: Ranks, count: int = 3) -> list[list[int]]:
        stream = shuffled(range(5), 4, seed=1, start_batch=start, ranks=ranks)
        return [next(stream) for _ in range(count)]

    whole = take(0, Ranks())
    assert take(1, Ranks(), 2) == whole[1:]
    halves = [take(0, Ranks(rank, 2, rank)) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_small_classes_come_as_often_as_large_ones() -> None:
    labels = [0] * 10 + [1] * 5 + [2] * 3
    held = HeldLatents(torch.zeros(18, 1, 1, 1, 1), torch.tensor(labels), 0)
    rows = held.balanced_rows()
    epoch = next(shuffled(rows, len(rows), seed=1, start_batch=0, ranks=Ranks()))
    assert set(epoch) == set(range(18))  # every image is there
    assert Counter(labels[row] for row in epoch) == {0: 10, 1: 10, 2: 9}


def test_classes_are_balanced_where_latents_are_held(recipe_file: Path) -> None:
    task = make_task(recipe_file, "hold_latents=true", "balance_classes=true", "batch_size=12")
    [batch] = next(task.batches(0))
    assert batch.labels.shape == (12,)
    with pytest.raises(RecipeError, match="balance_classes"):
        make_task(recipe_file, "balance_classes=true")


@pytest.mark.parametrize("shift", [1.0, 6.9282])
def test_times_follow_their_law(shift: float) -> None:
    uniform = (torch.arange(1000) + 0.5) / 1000
    normal, limit = NormalDist(), NormalDist().cdf(math.log(0.999 / 0.001))
    logit_normal = [1 / (1 + math.exp(-normal.inv_cdf(u * limit))) for u in uniform.tolist()]
    for law, base in (("uniform", (0.999 * uniform).tolist()), ("logit-normal", logit_normal)):
        expected = torch.tensor([shift * t / (1 + (shift - 1) * t) for t in base])
        found = draw_times(uniform, law, shift)  # type: ignore[arg-type]
        assert torch.allclose(found, expected, atol=1e-5)
    ends = draw_times(torch.tensor([0.0, 1 - 2**-24]), "logit-normal", shift)
    assert ends[0] == 0
    assert ends[1] <= 1


def test_folders_are_classes(tmp_path: Path) -> None:
    for name in ("dog", "ant"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        make_image(1).save(tmp_path / "photos" / name / "1.png")
    samples = list_samples([tmp_path / "photos"])
    classes = find_classes(samples, [tmp_path / "photos"])
    assert classes.names == ("ant", "dog")
    assert [sample.label for sample in classes.label(samples)] == [0, 1]
    (tmp_path / "val" / "eel").mkdir(parents=True)
    make_image(1).save(tmp_path / "val" / "eel" / "1.png")
    with pytest.raises(DataError, match="'eel' is none of the 2 classes"):
        classes.label(list_samples([tmp_path / "val"]))


def test_images_without_a_class_are_told(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "photos.tar", {"1.png": encode_png(make_image(1))})
    with pytest.raises(DataError, match=r"1 of 1 images have no class"):
        find_classes(list_samples([shard]), [shard])


def test_more_labels_than_names_are_told(shard: Path) -> None:
    with pytest.raises(DataError, match="up to 2, and 2 classes have names"):
        find_classes(list_samples([shard]), [shard], ("ant", "bee"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["generator=null"], "name one of preset, generator and init"),
        (["preset=dit-dh-mini"], "name one of preset, generator and init"),
        (["generator=null", "preset=dit-dh-mimi"], "did you mean 'dit-dh-mini'"),
        (["generator.latent_channels=16"], "made for latents"),
        (["generator.num_classes=4"], "made for classes 4"),
        (["data.validation=[]"], "data.validation"),
        (["statistics=tokenizer"], "field 'statistics'"),
        (["tokenizer=nowhere"], "field 'tokenizer'"),
        (["generator=null", "init=nowhere"], "field 'init'"),
        (["batch_size=5", "accumulation_steps=2"], "accumulation_steps"),
        (["class_dropout=1"], "class_dropout"),
        (["shift=0.5"], "shift"),
        (["optimizer.decay=step"], "optimizer.decay"),
    ],
)
def test_what_cannot_be_done_is_told_by_field(overrides: list[str], words: str, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        run_phase("generator", recipe_file, overrides)


def test_a_preset_is_fitted_to_latents_and_classes(recipe_file: Path) -> None:
    task = make_task(recipe_file, "generator=null", "preset=dit-dh-mini", "hold_latents=true")
    assert task.generator.config.latent_shape == (32, 4, 4)
    assert task.generator.config.num_classes == 3
    assert task.generator.config.trunk_width == 192


def test_a_generator_goes_on_from_another(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("generator", recipe_file, [], tmp_path / "first")
    task = make_task(recipe_file, "generator=null", f"init={tmp_path / 'first' / 'checkpoint'}")
    source = Generator.load(tmp_path / "first" / "checkpoint")
    for name, tensor in source.network.state_dict().items():
        assert torch.equal(task.network.state_dict()[name], tensor)
    trained = {name for name, p in task.network.named_parameters() if not p.requires_grad}
    assert trained == {"pos_embed", "t_embedder.W"}


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """A random tokenizer with a fusion."""
    torch.manual_seed(3)
    config = TokenizerConfig(**{**TINY.model_dump(), "fusion": TINY_FUSION.model_dump()})
    Tokenizer(config).save(tmp_path / "fused")
    return tmp_path / "fused"


def test_another_correction_gives_other_latents_of_the_same_weights(fused: Path, recipe_file: Path) -> None:
    common = [f"tokenizer={fused}", "hold_latents=true", "samples_per_class=0", "latents_dtype=float32"]
    own = make_task(recipe_file, *common)
    replaced = make_task(recipe_file, *common, "correction=replace")
    base = make_task(recipe_file, *common, "latent=base")
    assert own.held is not None
    assert replaced.held is not None
    assert base.held is not None
    z_base, z_fuse = base.held.latents, replaced.held.latents
    mixed = z_base + 0.2 * (z_fuse - z_base)
    centred = mixed - mixed.mean(dim=2, keepdim=True)
    expected = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(own.held.latents, expected, atol=1e-4)
    assert not torch.allclose(own.held.latents, z_fuse, atol=0.1)


@pytest.mark.parametrize(
    "overrides",
    [["hold_latents=true"], ["samples_per_class=0"], ["hold_latents=true", "samples_per_class=1"]],
)
def test_another_correction_is_for_studies_alone(
    overrides: list[str], fused: Path, recipe_file: Path
) -> None:
    with pytest.raises(RecipeError, match="field 'correction'"):
        make_task(recipe_file, f"tokenizer={fused}", "correction=replace", *overrides)


def test_a_dry_run_tells_sizes_and_what_is_wrong(recipe_file: Path, tmp_path: Path) -> None:
    plan = plan_phase("generator", recipe_file, ["hold_latents=true"])
    assert plan.findings.problems == []
    assert plan.figures["num_parameters"] == sum(
        p.numel() for p in make_task(recipe_file).network.parameters()
    )
    assert plan.figures["held_latents_bytes"] == 12 * 2 * 32 * 4 * 4 * 2
    page = render_plan(plan)
    assert all(words in page for words in ("12 images of 3 classes", "at the peak of a step", "s per step"))
    assert plan.cost is not None
    assert plan.cost.peak_bytes > plan.figures["weights_bytes"]
    assert plan.figures["run_s"] == pytest.approx(6 * plan.figures["step_s"])
    from_images = plan_phase("generator", recipe_file, []).cost
    assert from_images is not None
    assert from_images.per_image.total() > plan.cost.per_image.total()  # the encoder runs in the step
    assert not (tmp_path / "run").exists()
    for override, words in (
        ("generator.num_classes=4", "made for classes 4"),
        ("tokenizer=nowhere", "field 'tokenizer'"),
        ("optimizer.warmup_steps=9", "warmup_steps"),
        ("data.validation=[]", "data.validation"),
    ):
        problems = plan_phase("generator", recipe_file, [override]).findings.problems
        assert any(words in problem for problem in problems), (override, problems)
