"""Durations in epochs, and the full-size recipes that use them."""

from pathlib import Path

import pytest

import training.data.sources
from training.errors import RecipeError
from training.recipes.generator import GeneratorRecipe
from training.recipes.recipe import DistillationRecipe, Epochs, PhaseRecipe, in_steps, load_recipe
from training.run import run_phase
from training.studies.sweep import SweepRecipe

RECIPES = Path(__file__).parents[3] / "training" / "recipes"
IMAGENET = 1_281_167


def test_epochs_become_steps_of_the_listed_images(recipe_file: Path) -> None:
    overrides = [
        "num_steps=5 epochs",
        "optimizer.warmup_steps=0.5 epoch",
        "discriminator.start_step=1 epochs",
        "discriminator.adversarial_start_step=2 epochs",
    ]
    read = load_recipe(PhaseRecipe, recipe_file, overrides)
    assert read.num_steps == Epochs(5)
    assert read.optimizer.warmup_steps == Epochs(0.5)
    recipe = in_steps(read, 12)  # four images per step
    assert (recipe.num_steps, recipe.optimizer.warmup_steps) == (15, 2)
    assert (recipe.discriminator.start_step, recipe.discriminator.adversarial_start_step) == (3, 6)
    assert in_steps(recipe, 1000) is recipe


def test_reading_a_recipe_lists_nothing(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.sources._walk", lambda *_: pytest.fail("a folder was listed"))
    load_recipe(PhaseRecipe, recipe_file, ["num_steps=2 epochs"])


def test_a_run_lists_its_training_images_once(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, walk = [], training.data.sources._walk
    monkeypatch.setattr(
        "training.data.sources._walk", lambda folder, *rest: listed.append(folder) or walk(folder, *rest)
    )
    changes = ["num_steps=1 epochs", "data.crops_per_image=1", f"cache.directory={recipe_file.parent / 'c'}"]
    run_phase("phase1", recipe_file, changes)
    assert len(listed) == 2  # for training, and for validation


def test_the_stated_number_of_images_counts(recipe_file: Path) -> None:
    overrides = ["num_steps=100 epochs", f"data.num_images={IMAGENET}", "batch_size=512"]
    assert in_steps(load_recipe(PhaseRecipe, recipe_file, overrides), 12).num_steps == 250_228


def test_names_stay_names(recipe_file: Path) -> None:
    recipe = in_steps(load_recipe(PhaseRecipe, recipe_file, ["num_steps=7", "name=3 epochs"]), 12)
    assert (recipe.num_steps, recipe.name) == (7, "3 epochs")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps=2 eons", r"recipe\.yaml: field 'num_steps'"),
        ("num_steps=0 epochs", r"recipe\.yaml: field 'num_steps'"),
        ("data.num_images=0", r"recipe\.yaml: field 'data.num_images'"),
        ("batch_size=none", r"recipe\.yaml: field 'batch_size'"),
        ("num_steps=0.001 epochs", "field 'num_steps'"),
        ("discriminator.start_step=-1", "field 'discriminator.start_step'"),
    ],
)
def test_what_cannot_be_counted(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        in_steps(load_recipe(PhaseRecipe, recipe_file, ["num_steps=2 epochs", override]), 12)
    with pytest.raises(RecipeError, match="field 'data'"):
        in_steps(load_recipe(PhaseRecipe, recipe_file, ["num_steps=2 epochs"]), 0)


@pytest.mark.parametrize(
    "file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(RECIPES))
)
def test_recipes_are_valid(file: Path) -> None:
    kinds = {"phase0": DistillationRecipe, "sweep": SweepRecipe}
    kinds |= {"generator": GeneratorRecipe, "latent-space": GeneratorRecipe}
    kind = GeneratorRecipe if file.stem.startswith("dit-") else kinds.get(file.stem, PhaseRecipe)
    recipe = in_steps(load_recipe(kind, file, []), 1000)
    if file.parent == RECIPES:
        assert recipe.name == file.stem
    else:
        assert recipe.output == Path("runs") / file.parent.name / file.stem


def test_full_size_recipes_say_what_the_papers_say() -> None:
    one, two, three = (
        in_steps(load_recipe(PhaseRecipe, RECIPES / f"dinov2-b-phase{number}.yaml", []), 12)
        for number in (1, 2, 3)
    )
    for recipe in (one, two, three):
        assert (recipe.batch_size, recipe.ema_decay, recipe.preset) == (512, 0.9978, "dinov2-b")
        rates = recipe.optimizer
        assert (rates.learning_rate, rates.final_learning_rate, rates.betas) == (2e-4, 2e-5, (0.9, 0.95))
        assert (rates.weight_decay, rates.clip_norm, rates.warmup_steps) == (0, None, 2502)
        assert (recipe.loss.l1, recipe.loss.perceptual, recipe.loss.adversarial) == (1, 1, 0.75)
        assert (recipe.loss.perceptual_network, recipe.discriminator.backbone) == ("lpips-vgg", "dino-vits8")
        assert recipe.data.resize_short_side == (384, 384)
        assert recipe.data.num_images == IMAGENET
    assert [recipe.num_steps for recipe in (one, three)] == [250_228, 50_046]
    starts = [recipe.discriminator.adversarial_start_step for recipe in (one, two, three)]
    assert starts == [30_000, 10_000, 30_000]
    assert [recipe.noise_tau for recipe in (one, two, three)] == [0.8, 0, 0]
