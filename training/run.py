"""Entry point of ``drorae train``: a phase's name and recipe to a finished run."""

import logging
from pathlib import Path

from training.distillation import DistillationTask
from training.recipe import DistillationRecipe, PhaseRecipe, load_recipe
from training.trainer import Task, Trainer

logger = logging.getLogger(__name__)

PHASES = ("phase0", "phase1", "phase2", "phase3", "joint", "sweep")


def run_phase(
    phase: str, config_path: Path, overrides: list[str], output: Path | None = None, resume: bool = False
) -> int:
    """Train one phase, or a sweep of phase 2.

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
        from training.sweep import run_sweep

        return run_sweep(config_path, overrides, output, resume)
    if output is not None:
        overrides = [*overrides, f"output={output}"]
    task = _make_task(phase, config_path, overrides)
    figures = Trainer(task, task.recipe.output).run(resume)
    logger.info("%s finished: %s", phase, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return 0


def _make_task(phase: str, config_path: Path, overrides: list[str]) -> Task:
    if phase == "phase0":
        return DistillationTask(load_recipe(DistillationRecipe, config_path, overrides))
    from training.phases import ReconstructionTask

    return ReconstructionTask(phase, load_recipe(PhaseRecipe, config_path, overrides))
