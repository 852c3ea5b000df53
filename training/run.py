"""Entry point of ``drorae train``: a phase's name and recipe to a finished run."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.data.sources import Sample, list_samples
from training.distributed.ranks import is_launched, process_group
from training.errors import RankError
from training.phases.distillation import DistillationTask
from training.phases.states import check_run_directory, holds_state
from training.phases.trainer import Task, Trainer
from training.recipes.generator import GeneratorRecipe
from training.recipes.recipe import BaseRecipe, DistillationRecipe, PhaseRecipe, in_steps, load_recipe

logger = logging.getLogger(__name__)

PHASES = ("phase0", "phase1", "phase2", "phase3", "joint", "sweep", "generator")
RECIPES: dict[str, type[BaseRecipe]] = {"phase0": DistillationRecipe, "generator": GeneratorRecipe}


def run_phase(
    phase: str, config_path: Path, overrides: list[str], output: Path | None = None, resume: bool = False
) -> int:
    """Train one phase, or a sweep of phase 2; one phase together with the other ranks of ``torchrun``.

    Args:
        phase: one of `PHASES`.
        config_path: the recipe, YAML.
        overrides: ``section.field=value`` changes to it.
        output: run directory, instead of the recipe's.
        resume: continue the run that the directory holds.

    Returns:
        0.

    Raises:
        TrainingError, model.errors.ModelError: one sentence that names the file or field at fault.
    """
    if phase == "sweep":
        if is_launched():
            raise RankError("a sweep starts its own processes (num_processes): start it without torchrun")
        from training.studies.sweep import run_sweep

        return run_sweep(config_path, overrides, output, resume)
    if output is not None:
        overrides = [*overrides, f"output={output}"]
    recipe = load_recipe(RECIPES.get(phase, PhaseRecipe), config_path, overrides)
    check_run_directory(recipe.output, resume)
    with process_group(recipe.device, recipe.distributed.timeout_s) as ranks:
        logger.info("listing the training images")
        samples = list_samples(recipe.data.train, ranks) if recipe.data.train else []
        num_images = len(samples) or _num_stored(recipe)
        recipe = in_steps(recipe, num_images)
        logger.info("training on %d images", num_images)
        task = _make_task(phase, recipe, samples, resume and holds_state(recipe.output))
        figures = Trainer(task, task.recipe.output).run(resume)
    logger.info("%s finished: %s", phase, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return 0


def _num_stored(recipe: BaseRecipe) -> int:
    """Images whose latents the recipe trains on."""
    if not isinstance(recipe, GeneratorRecipe) or recipe.data.latents is None:
        return 0
    from training.phases.stored_latents import open_latents

    return len(open_latents(recipe, "latents"))


def _make_task(phase: str, recipe: BaseRecipe, samples: Sequence[Sample], is_resumed: bool) -> Task[Any]:
    if isinstance(recipe, GeneratorRecipe):
        from training.phases.generation import GenerationTask

        return GenerationTask(recipe, samples)
    if isinstance(recipe, DistillationRecipe):
        return DistillationTask(recipe, samples)
    from training.phases.reconstruction import ReconstructionTask

    assert isinstance(recipe, PhaseRecipe)
    return ReconstructionTask(phase, recipe, samples, is_resumed)
