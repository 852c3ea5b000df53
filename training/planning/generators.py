"""The dry run of stage 2: whether tokenizer, classes and architecture go together, and what they take."""

import torch

from model.errors import ModelError
from model.networks.dit import DiT
from training.data.classes import find_classes
from training.data.sources import list_samples
from training.errors import TrainingError
from training.phases.new_generator import check_recipe, load_tokenizer, planned_config
from training.planning.checks import Findings
from training.recipes.generator import GeneratorRecipe


def generator_sizes(
    recipe: GeneratorRecipe, num_processes: int, num_images: int, findings: Findings
) -> dict[str, float]:
    """Number of parameters, and bytes of weights, state, checkpoint and held latents, by name.

    Args:
        recipe: of the run.
        num_processes: of the run.
        num_images: in data.train.
        findings: gets what is wrong; then nothing is known.
    """
    try:
        check_recipe(recipe, num_processes)
        tokenizer = load_tokenizer(recipe, torch.device("cpu"))
        classes = find_classes(list_samples(recipe.data.train), recipe.data.train, recipe.class_names)
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
