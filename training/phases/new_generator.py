"""What stage 2 starts from: a recipe that can be done, the tokenizer, and the generator."""

from pathlib import Path

import torch
from pydantic import ValidationError

from model.errors import CheckpointError
from model.generator import GENERATOR_PRESETS, Generator, GeneratorConfig, TrainedOn, default_shift
from model.tokenizer import Tokenizer
from training.data.classes import Classes
from training.errors import RecipeError
from training.phases.starting_point import check_batches
from training.recipes.generator import GeneratorRecipe


def check_recipe(recipe: GeneratorRecipe, num_ranks: int) -> None:
    """Whether the recipe can be done.

    Raises:
        RecipeError: names the field.
    """
    check_batches(recipe, num_ranks)
    for images, latents in (("train", "latents"), ("validation", "validation_latents")):
        if bool(getattr(recipe.data, images)) == (getattr(recipe.data, latents) is not None):
            raise RecipeError(f"field 'data.{images}': name images there or a folder in data.{latents}")
    if recipe.correction is not None and recipe.data.latents is not None:
        raise RecipeError("field 'correction': stored latents are corrected already; train from images")
    if recipe.optimizer.matrices == "muon" and recipe.distributed.strategy == "fsdp":
        raise RecipeError(
            "field 'optimizer.matrices': muon needs whole matrices, so distributed.strategy: ddp"
        )
    if recipe.balance_classes and not recipe.hold_latents:
        raise RecipeError("field 'balance_classes': needs hold_latents: true")
    named = [name for name in ("preset", "generator", "init") if getattr(recipe, name) is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise RecipeError(f"field 'preset': name one of preset, generator and init, not {found}")


def load_tokenizer(recipe: GeneratorRecipe, device: torch.device) -> Tokenizer:
    """The frozen tokenizer.

    Raises:
        RecipeError: it is not there, or has no statistics that the recipe can use.
    """
    try:
        tokenizer = Tokenizer.load(recipe.tokenizer, device)
    except CheckpointError as exc:
        raise RecipeError(f"field 'tokenizer': {exc}") from exc
    if recipe.correction is not None:
        return _with_correction(recipe, tokenizer)
    if recipe.statistics == "tokenizer":
        if not tokenizer.has_statistics:
            raise RecipeError(
                f"field 'statistics': tokenizer {recipe.tokenizer} has none: use 'data', or drorae stats"
            )
        if recipe.latent == "base" and tokenizer.fusion is not None:
            raise RecipeError("field 'statistics': the tokenizer's are of enriched latents: use 'data'")
    elif recipe.latent == "base" and not recipe.hold_latents and recipe.data.latents is None:
        raise RecipeError("field 'hold_latents': statistics of base latents are taken of those that are held")
    return tokenizer


def _with_correction(recipe: GeneratorRecipe, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with z_fuse corrected in another way, its weights as they are."""
    fusion = tokenizer.config.fusion
    if fusion is None:
        raise RecipeError(f"field 'correction': tokenizer {recipe.tokenizer} has no fusion")
    if recipe.statistics == "tokenizer" or not recipe.hold_latents or recipe.samples_per_class:
        raise RecipeError(
            "field 'correction': needs statistics: data, hold_latents: true and samples_per_class: 0, since "
            "the tokenizer's statistics and decoder are of other latents"
        )
    changed = fusion.model_copy(update={"correction": recipe.correction})
    name = f"{tokenizer.config.name}, correction={recipe.correction}"
    config = tokenizer.config.model_copy(update={"fusion": changed, "name": name})
    parts = {name: part for name, part in tokenizer.parts().items() if name != "statistics"}
    copied = Tokenizer.from_parts(config, parts, Path(recipe.tokenizer)).to(tokenizer.device)
    return copied.requires_grad_(False).eval()


def make_generator(recipe: GeneratorRecipe, tokenizer: Tokenizer, classes: Classes) -> Generator:
    """A new generator of the recipe's architecture, or the one that it goes on from.

    Raises:
        RecipeError: it does not fit the latents or the classes.
    """
    source = _load_source(recipe)
    config = planned_config(recipe, tokenizer, classes, source)
    generator = Generator(config, _trained_on(recipe, tokenizer, classes, config))
    if source is not None:
        generator.network.load_state_dict(source.network.state_dict())
    return generator


def planned_config(
    recipe: GeneratorRecipe, tokenizer: Tokenizer, classes: Classes, source: Generator | None = None
) -> GeneratorConfig:
    """The architecture that would be trained: that of ``source``, which is loaded where it is not given.

    Raises:
        RecipeError: it does not fit the latents or the classes.
    """
    source = source or _load_source(recipe)
    if source is None:
        config = _new_config(recipe, tokenizer, classes)
    else:
        config = source.config.model_copy(update={"name": recipe.name})
    _check_fit(recipe, config, tokenizer, classes)
    return config


def _load_source(recipe: GeneratorRecipe) -> Generator | None:
    """The generator that the recipe goes on from."""
    if recipe.init is None:
        return None
    try:
        return Generator.load(recipe.init)
    except CheckpointError as exc:
        raise RecipeError(f"field 'init': {exc}") from exc


def _new_config(recipe: GeneratorRecipe, tokenizer: Tokenizer, classes: Classes) -> GeneratorConfig:
    """The given architecture, or the preset fitted to the latents and the classes."""
    if recipe.generator is not None:
        return recipe.generator.model_copy(update={"name": recipe.name})
    assert recipe.preset is not None
    channels, grid, _ = tokenizer.config.latent_shape
    fitted = {
        "name": recipe.name,
        "latent_channels": channels,
        "grid": grid,
        "num_classes": classes.count,
    }
    try:
        return GeneratorConfig(**GENERATOR_PRESETS[recipe.preset].model_dump() | fitted)
    except ValidationError as exc:
        raise RecipeError(f"field 'preset': {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from exc


def _check_fit(
    recipe: GeneratorRecipe, config: GeneratorConfig, tokenizer: Tokenizer, classes: Classes
) -> None:
    field = "init" if recipe.init is not None else "generator"
    for what, found, wanted in (
        ("latents", config.latent_shape, tokenizer.config.latent_shape),
        ("classes", config.num_classes, classes.count),
    ):
        if found != wanted:
            raise RecipeError(f"field {field!r}: made for {what} {found}, and here are {wanted}")


def _trained_on(
    recipe: GeneratorRecipe, tokenizer: Tokenizer, classes: Classes, config: GeneratorConfig
) -> TrainedOn:
    return TrainedOn(
        tokenizer_name=tokenizer.config.name,
        tokenizer_sha256=tokenizer.checkpoint.sha256 if tokenizer.checkpoint else None,
        latent=recipe.latent,
        class_names=classes.names,
        time_law=recipe.time_law,
        shift=recipe.shift or default_shift(config.latent_shape),
    )
