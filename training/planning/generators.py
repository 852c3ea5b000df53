"""The dry run of stage 2: whether tokenizer, classes and architecture go together, and what they take."""

import torch

from model.errors import ModelError
from model.networks.dit import DiT
from model.tokenizer import Tokenizer
from training.data.classes import Classes, find_classes
from training.data.sources import list_samples
from training.errors import TrainingError
from training.phases.new_generator import check_recipe, load_tokenizer, planned_config
from training.phases.stored_latents import open_latents, stored_classes
from training.planning.checks import Findings, ImageCheck
from training.recipes.generator import GeneratorRecipe


def check_stored(recipe: GeneratorRecipe, field: str, findings: Findings) -> ImageCheck:
    """Look at a folder of latents that a field of ``data`` names.

    Args:
        recipe: of the run.
        field: ``latents`` or ``validation_latents``.
        findings: gets what is wrong.
    """
    try:
        folder = open_latents(recipe, field)
        return ImageCheck(len(folder), len(set(folder.labels())))
    except TrainingError as exc:
        findings.problems.append(str(exc))
        return ImageCheck()


def generator_sizes(
    recipe: GeneratorRecipe, num_processes: int, num_images: int, findings: Findings
) -> dict[str, float]:
    """Number of parameters, and bytes of weights, state, checkpoint and held latents, by name.

    Args:
        recipe: of the run.
        num_processes: of the run.
        num_images: in data.train or data.latents.
        findings: gets what is wrong; then nothing is known.
    """
    try:
        check_recipe(recipe, num_processes)
        tokenizer = load_tokenizer(recipe, torch.device("cpu"))
        classes = _find_classes(recipe, tokenizer)
        config = planned_config(recipe, tokenizer, classes)
    except (ModelError, TrainingError) as exc:
        findings.problems.append(str(exc))
        return {}
    with torch.device("meta"):
        network = DiT(config)
    trained = sum(4 * p.numel() for p in network.parameters() if p.requires_grad)
    weights = sum(4 * p.numel() for p in network.parameters())
    sizes: dict[str, float] = {
        "num_parameters": weights // 4,
        "weights_bytes": weights,
        "state_bytes": weights + 3 * trained,  # with AdamW's two moments and the average
        "checkpoint_bytes": weights // 4 * getattr(torch, recipe.storage_dtype).itemsize,
    }
    if recipe.hold_latents:
        views = 1 + recipe.data.flip
        values = num_images * views * torch.Size(config.latent_shape).numel()
        sizes["held_latents_bytes"] = values * getattr(torch, recipe.latents_dtype).itemsize
    return sizes


def _find_classes(recipe: GeneratorRecipe, tokenizer: Tokenizer) -> Classes:
    """The classes of the data; of stored latents after a check that they are the tokenizer's."""
    if recipe.data.latents is not None:
        return stored_classes(open_latents(recipe, "latents", tokenizer), recipe.class_names)
    return find_classes(list_samples(recipe.data.train), recipe.data.train, recipe.class_names)
