from pathlib import Path

import pytest

from training.errors import RecipeError
from training.recipes.recipe import PhaseRecipe, load_recipe

RECIPES = sorted((Path(__file__).parents[3] / "training" / "recipes").rglob("*.yaml"))


def test_overrides_reach_nested_fields(recipe_file: Path) -> None:
    recipe = load_recipe(PhaseRecipe, recipe_file, ["loss.l1=2.5", "optimizer.clip_norm=1", "name=other"])
    assert (recipe.loss.l1, recipe.optimizer.clip_norm, recipe.name) == (2.5, 1.0, "other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.l3=1", r"recipe\.yaml: field 'loss\.l3'"),
        ("batch_size=0", r"recipe\.yaml: field 'batch_size'"),
        ("name", "not of the form field=value"),
        ("name.x=1", "'name' is not a section"),
    ],
)
def test_bad_overrides_name_the_field(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(PhaseRecipe, recipe_file, [override])


@pytest.mark.parametrize("text", ["- a list", "a: [1", "\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(PhaseRecipe, file, [])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(PhaseRecipe, tmp_path / "none.yaml", [])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("loss.l2x", "loss.l2"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.learning_rte", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer"),
        ("batchsize", "batch_size"),
        ("data.num_worker", "data.num_workers"),
        ("fusion.hiden_width", "fusion.hidden_width"),
    ],
)
def test_unknown_fields_suggest_the_nearest(recipe_file: Path, name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"no such field; did you mean '{nearest}'\?"):
        load_recipe(PhaseRecipe, recipe_file, [f"{name}=1"])


def test_a_misspelt_field_comes_before_the_one_that_is_missing_for_it(recipe_file: Path) -> None:
    text = recipe_file.read_text().replace("num_steps:", "nmu_steps:")
    recipe_file.write_text(text)
    with pytest.raises(RecipeError, match=r"field 'nmu_steps': .* did you mean 'num_steps'\?"):
        load_recipe(PhaseRecipe, recipe_file, [])


def test_unknown_presets_suggest_the_nearest(recipe_file: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"field 'preset': 'dino-b' is none of .* did you mean 'dinov2-b'\?"
    ):
        load_recipe(PhaseRecipe, recipe_file, ["preset=dino-b"])
