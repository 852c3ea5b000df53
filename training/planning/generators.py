"""The dry run of stage 2: whether tokenizer, classes and architecture go together, and what they take."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import TokenizerConfig
from model.errors import ModelError
from model.networks.dit import DiT
from model.tokenizer import LatentKind, Tokenizer
from training.data.classes import Classes, find_classes
from training.data.sources import list_samples
from training.distributed.device import autocast, products_dtype, resolve_device
from training.errors import TrainingError
from training.phases.new_generator import check_recipe, load_tokenizer, planned_config
from training.phases.stored_latents import open_latents, stored_classes
from training.planning.checks import Findings, ImageCheck
from training.planning.meter import Meter, Operations, forget_values
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


@dataclass(frozen=True)
class GeneratorCost:
    """What a run of stage 2 takes.

    Attributes:
        figures: number of parameters, and bytes of weights, state, checkpoint and held latents, by name.
        peak_bytes: the most that one process has allocated in a step; held latents on top.
        per_image: operations of the generator's step, and of the encoder where it runs in the step.
    """

    figures: dict[str, float]
    peak_bytes: int
    per_image: Operations


def generator_cost(
    recipe: GeneratorRecipe, num_processes: int, num_images: int, findings: Findings
) -> GeneratorCost | None:
    """Count a step, on networks without values.

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
        return None
    with torch.device("meta"):
        network = DiT(config)
    trained = sum(4 * p.numel() for p in network.parameters() if p.requires_grad)
    weights = sum(4 * p.numel() for p in network.parameters())
    figures: dict[str, float] = {
        "num_parameters": weights // 4,
        "weights_bytes": weights,
        "state_bytes": weights + 3 * trained,  # with AdamW's two moments and the average; Muon has one
        "checkpoint_bytes": weights // 4 * getattr(torch, recipe.storage_dtype).itemsize,
    }
    if recipe.hold_latents:
        views = 1 + recipe.data.flip
        values = num_images * views * torch.Size(config.latent_shape).numel()
        figures["held_latents_bytes"] = values * getattr(torch, recipe.latents_dtype).itemsize
    micro_batch = max(1, recipe.batch_size // (recipe.accumulation_steps * num_processes))
    meter = _count_step(recipe, network, micro_batch)
    peak = weights + 4 * trained + meter.num_bytes + 2 * meter.largest_bytes
    per_image = Operations({dtype: count // micro_batch for dtype, count in meter.total.items()})
    if not recipe.hold_latents and recipe.data.latents is None:
        per_image += _encoder_operations(tokenizer.config, recipe.latent)
    return GeneratorCost(figures, peak, per_image)


def _count_step(recipe: GeneratorRecipe, network: DiT, micro_batch: int) -> Meter:
    """Forward and backward pass of one micro-batch; recomputed blocks count as they are."""
    device = torch.device("cpu")
    precision = str(products_dtype(resolve_device(recipe.device), recipe.precision)).removeprefix("torch.")
    with FakeTensorMode():
        forget_values(network)
        meter = Meter([*network.parameters(), *network.buffers()])
        latents = torch.empty(micro_batch, *network.config.latent_shape)
        labels = torch.zeros(micro_batch, dtype=torch.int64)
        with meter.modes():
            with autocast(device, precision):
                velocity = network(latents, torch.empty(micro_batch), labels)
            (velocity - latents).square().mean().backward()
    return meter


def _encoder_operations(config: TokenizerConfig, latent: LatentKind) -> Operations:
    """Of one image; the fusion as it is defined."""
    tokenizer = Tokenizer.on_meta(config)
    with FakeTensorMode(), torch.no_grad():
        forget_values(tokenizer)
        meter = Meter([])
        with meter.modes():
            tokenizer.tokens(torch.empty(1, 3, config.image_size, config.image_size), latent)
    return meter.total


def _find_classes(recipe: GeneratorRecipe, tokenizer: Tokenizer) -> Classes:
    """The classes of the data; of stored latents after a check that they are the tokenizer's."""
    if recipe.data.latents is not None:
        return stored_classes(open_latents(recipe, "latents", tokenizer), recipe.class_names)
    return find_classes(list_samples(recipe.data.train), recipe.data.train, recipe.class_names)
