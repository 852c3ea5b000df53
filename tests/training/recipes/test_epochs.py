"""Durations in epochs, and the full-size recipes that use them."""

from pathlib import Path

import pytest

from training.errors import DataError, RecipeError
from training.recipes.epochs import resolve_epochs
from training.recipes.generator import GeneratorRecipe
from training.recipes.recipe import DistillationRecipe, PhaseRecipe, load_recipe
from training.studies.sweep import SweepRecipe

RECIPES = Path(__file__).parents[3] / "training" / "recipes"
IMAGENET = 1_281_167


def test_epochs_become_steps_of_the_listed_images(recipe_file: Path) -> None:
    overrides = [
        "num_steps=5 epochs",
        "optimizer.warmup_steps=0.5 epoch",
        "discriminator.start_step=1 epochs",
    ]
    recipe = load_recipe(
        PhaseRecipe, recipe_file, [*overrides, "discriminator.adversarial_start_step=2 epochs"]
    )
    # Twelve images, four a step.
    assert (recipe.num_steps, recipe.optimizer.warmup_steps) == (15, 2)
    assert (recipe.discriminator.start_step, recipe.discriminator.adversarial_start_step) == (3, 6)


def test_stated_number_of_images_needs_no_data() -> None:
    fields = {"num_steps": "100 epochs", "data": {"train": ["/nowhere"], "num_images": IMAGENET}}
    assert resolve_epochs(fields, 512)["num_steps"] == 250_228
    assert fields["num_steps"] == "100 epochs"


def test_steps_stay_steps() -> None:
    assert resolve_epochs({"num_steps": 7, "name": "3 epochs"}, 512) == {"num_steps": 7, "name": "3 epochs"}


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("num_steps=2 eons", RecipeError, r"recipe\.yaml: field 'num_steps'"),
        ("num_steps=0 epochs", RecipeError, r"recipe\.yaml: field 'num_steps'"),
        ("data.num_images=0", RecipeError, r"recipe\.yaml: field 'data'"),
        ("batch_size=none", RecipeError, r"recipe\.yaml: field 'batch_size'"),
        ("data.train=[/nowhere]", DataError, "/nowhere does not exist"),
    ],
)
def test_what_cannot_be_counted(
    recipe_file: Path, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_recipe(PhaseRecipe, recipe_file, ["num_steps=2 epochs", override])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_valid(file: Path) -> None:
    kinds = {"phase0": DistillationRecipe, "sweep": SweepRecipe}
    kind = GeneratorRecipe if file.stem.startswith("dit-") else PhaseRecipe
    kind = kinds.get(file.stem.split("-")[-1], kind)
    assert load_recipe(kind, file, []).name == file.stem


def test_full_size_recipes_say_what_the_papers_say() -> None:
    one, two, three = (
        load_recipe(PhaseRecipe, RECIPES / f"dinov2-b-phase{number}.yaml", []) for number in (1, 2, 3)
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
