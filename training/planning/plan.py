"""The dry run of a phase: what it would train, need and take, and why it would fail; nothing is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.config import TokenizerConfig
from training.data.crops.cache import cache_spec
from training.errors import RecipeError
from training.phases.reconstruction import TRAINED_PARTS
from training.planning.checks import (
    Findings,
    ImageCheck,
    check_images,
    check_networks,
    check_output,
    check_recipe_fits,
    check_start,
    gib,
)
from training.planning.device import device_bytes, matrix_tflops
from training.planning.footprint import Footprint, measure_footprint
from training.planning.generators import GeneratorCost, check_stored, generator_cost
from training.planning.meter import Operations
from training.recipes.generator import GeneratorRecipe
from training.recipes.recipe import BaseRecipe, DistillationRecipe, PhaseRecipe, in_steps, load_recipe


@dataclass(frozen=True)
class PlanOptions:
    """Options of the estimate, from the command line.

    Attributes:
        num_checked: images of each listing to decode; None for all.
        matrix_tflops: of the device, by precision; the rest is known by the device's name, or measured.
        matrix_share: part of that rate that a training step reaches.
        num_processes: of the run, one per device.
    """

    num_checked: int | None = 256
    matrix_tflops: Mapping[str, float] = field(default_factory=dict)
    matrix_share: float = 0.4
    num_processes: int = 1


@dataclass
class Plan:
    """Findings of a dry run.

    Attributes:
        footprint: None for phase 0, which is small, and where the architecture is unknown.
        figures: by name with its unit: memory of the device, matrix rates, estimated seconds of a step with
            every loss and of the run, sizes on disk, and the bytes that are free there.
    """

    phase: str
    recipe: BaseRecipe
    num_processes: int
    train: ImageCheck
    validation: ImageCheck
    findings: Findings
    footprint: Footprint | None = None
    cost: GeneratorCost | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass."""
        return max(1, self.recipe.batch_size // (self.recipe.accumulation_steps * self.num_processes))

    @property
    def num_epochs(self) -> float | None:
        """Passes over the listed images."""
        seen = self.recipe.num_steps * self.recipe.batch_size
        return seen / self.train.num_listed if self.train.num_listed else None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = {
            name: getattr(self, name) for name in ("phase", "num_processes", "micro_batch", "num_epochs")
        }
        found |= {name: asdict(getattr(self, name)) for name in ("train", "validation", "findings")}
        found |= {"recipe": self.recipe.model_dump(mode="json"), **self.figures}
        if self.footprint is not None:
            footprint = self.footprint
            found |= {"parts": [asdict(part) for part in footprint.parts], "peak_bytes": footprint.peak_bytes}
        if self.cost is not None:
            found["peak_bytes"] = self.cost.peak_bytes
        return found


def plan_phase(
    phase: str,
    config_path: Path,
    overrides: Sequence[str],
    output: Path | None = None,
    resume: bool = False,
    options: PlanOptions = PlanOptions(),
) -> Plan:
    """Look at everything that a run of this recipe needs.

    Args:
        phase: one of `training.run.PHASES`.
        config_path: the recipe, YAML.
        overrides: ``section.field=value`` changes to it.
        output: run directory, instead of the recipe's.
        resume: whether the run is to be continued.
        options: of the estimate.

    Raises:
        RecipeError: the recipe cannot be read at all; all else is in the plan's findings.
    """
    changes = [*overrides, *([f"output={output}"] if output is not None else [])]
    findings, config = Findings(), None
    recipe: BaseRecipe
    if phase == "phase0":
        recipe = distillation = load_recipe(DistillationRecipe, config_path, changes)
        side = max(distillation.final_image_size, distillation.teacher_image_size)
    elif phase == "generator":
        recipe, side = load_recipe(GeneratorRecipe, config_path, changes), 256
    else:
        recipe = reconstruction = load_recipe(PhaseRecipe, config_path, changes)
        config = check_start(phase, reconstruction, findings)
        side = config.image_size if config else 256
    train, validation = _check_data(recipe, side, options.num_checked, findings)
    recipe = in_steps(recipe, train.num_listed)
    plan = Plan(phase, recipe, options.num_processes, train, validation, findings)
    device = check_recipe_fits(phase, recipe, options.num_processes, findings)
    if isinstance(recipe, PhaseRecipe) and config is not None:
        check_networks(recipe, config, findings)
        _add_footprint(plan, recipe, config, device)
        _add_phase_time(plan, recipe, device, options)
        _add_disk(plan, recipe, config, resume)
    elif isinstance(recipe, GeneratorRecipe):
        _add_generator(plan, recipe, device, options, resume)
    else:
        check_output("output", recipe.output, 0, findings, resume)
    return plan


def _check_data(
    recipe: BaseRecipe, side: int, num_checked: int | None, findings: Findings
) -> tuple[ImageCheck, ImageCheck]:
    """Look at the images, or the stored latents, of training and validation."""
    train = check_images("data.train", recipe.data, side, num_checked, findings)
    validation = check_images("data.validation", recipe.data, side, num_checked, findings)
    if isinstance(recipe, GeneratorRecipe):
        if recipe.data.latents is not None:
            train = check_stored(recipe, "latents", findings)
        if recipe.data.validation_latents is not None:
            validation = check_stored(recipe, "validation_latents", findings)
    return train, validation


def _add_footprint(plan: Plan, recipe: PhaseRecipe, config: TokenizerConfig, device: torch.device) -> None:
    trained = TRAINED_PARTS[plan.phase] | ({"encoder"} if recipe.train_encoder else set())
    recipe = recipe.model_copy(update={"device": str(device)})
    plan.footprint = measure_footprint(config, recipe, trained, plan.num_processes)
    size, peak = device_bytes(device), plan.footprint.peak_bytes
    if size is not None:
        plan.figures["device_bytes"] = size
    if size is not None and peak > size:
        plan.findings.problems.append(
            f"field 'accumulation_steps': a micro-batch of {plan.micro_batch} images needs {gib(peak)} and "
            f"{device} has {gib(size)}: use more micro-batches"
        )


def _add_phase_time(plan: Plan, recipe: PhaseRecipe, device: torch.device, options: PlanOptions) -> None:
    assert plan.footprint is not None
    per_image = plan.footprint.operations_per_image(recipe.num_steps, recipe)
    _add_time(plan, plan.footprint.run_operations(recipe), per_image, device, options)


def _add_generator(
    plan: Plan, recipe: GeneratorRecipe, device: torch.device, options: PlanOptions, resume: bool
) -> None:
    plan.cost = cost = generator_cost(recipe, plan.num_processes, plan.train.num_listed, plan.findings)
    figures = cost.figures if cost is not None else {}
    needed = figures.get("checkpoint_bytes", 0) + 3 * figures.get("state_bytes", 0)
    free = check_output("output", recipe.output, int(needed), plan.findings, resume)
    plan.figures |= figures | {"free_bytes": free}
    if cost is not None:
        seen = recipe.num_steps * recipe.batch_size
        run = Operations({dtype: count * seen for dtype, count in cost.per_image.items()})
        _add_time(plan, run, cost.per_image, device, options)


def _add_time(
    plan: Plan, run: Operations, per_image: Operations, device: torch.device, options: PlanOptions
) -> None:
    """Seconds of the run and of a step, from their operations."""
    recipe = plan.recipe
    names = ("bfloat16", "float32")
    rates = {n: options.matrix_tflops.get(n) or matrix_tflops(device, getattr(torch, n)) for n in names}

    def seconds(operations: Operations) -> float:
        ideal = sum(count / (1e12 * rates[str(dtype)[6:]]) for dtype, count in operations.items())
        return ideal / (options.matrix_share * options.num_processes)

    run_s, step_s = seconds(run), recipe.batch_size * seconds(per_image)
    plan.figures |= {f"tflops_{n}": rate for n, rate in rates.items()} | {"step_s": step_s, "run_s": run_s}
    if isinstance(recipe, GeneratorRecipe) and (recipe.hold_latents or recipe.data.latents is not None):
        return  # no image is decoded in the steps
    needed = recipe.num_steps * recipe.batch_size / run_s
    decoded = (plan.train.images_per_s or needed) * max(1, recipe.data.num_workers) * options.num_processes
    if decoded < needed:
        plan.findings.warnings.append(
            f"decoding would hold training up: {recipe.data.num_workers} workers per process decode about "
            f"{decoded:.0f} images/s, and the device takes {needed:.0f}: raise data.num_workers"
        )


def _add_disk(plan: Plan, recipe: PhaseRecipe, config: TokenizerConfig, resume: bool) -> None:
    assert plan.footprint is not None
    parts = plan.footprint.parts
    num_values = sum(part.num_parameters for part in parts if part.name in ("encoder", "fusion", "decoder"))
    checkpoint = num_values * getattr(torch, recipe.storage_dtype).itemsize
    if config.fusion is not None:
        checkpoint += 2 * 4 * torch.Size(config.latent_shape).numel()  # statistics
    state = sum(part.gradient_bytes + part.optimizer_bytes + part.ema_bytes for part in parts)
    plan.figures |= {"checkpoint_bytes": checkpoint, "state_bytes": state}
    # While a state is written there are three: the last two stay.
    free = check_output("output", recipe.output, checkpoint + 3 * state, plan.findings, resume)
    plan.figures["free_bytes"] = free
    if recipe.cache is not None:
        try:
            spec = cache_spec(plan.phase, recipe, config)
        except RecipeError as exc:
            plan.findings.problems.append(str(exc))
            return
        size = spec.num_bytes(plan.train.num_listed)
        missing = size - spec.existing_bytes()
        free = check_output("cache.directory", spec.directory, missing, plan.findings)
        plan.figures |= {"cache_bytes": size, "cache_free_bytes": free}


def render_plan(plan: Plan) -> str:
    """The plan as a page of text."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    recipe, figures = plan.recipe, plan.figures
    epochs = "" if plan.num_epochs is None else f" ({plan.num_epochs:.4g} epochs)"
    yield f"{plan.phase}: {recipe.name} -> {recipe.output}\n"
    yield (
        f"steps      {recipe.num_steps:,} of {recipe.batch_size} images{epochs}; "
        f"{plan.num_processes} x {recipe.accumulation_steps} micro-batches of {plan.micro_batch}"
    )
    yield f"train      {plan.train}"
    yield f"validation {plan.validation}"
    if plan.footprint is not None:
        yield from _part_lines(plan.footprint)
        assert isinstance(recipe, PhaseRecipe)
        per_image = plan.footprint.operations_per_image(recipe.num_steps, recipe)
        yield from _cost_lines(plan, plan.footprint.peak_bytes, per_image)
    if plan.cost is not None:
        yield from _cost_lines(plan, plan.cost.peak_bytes, plan.cost.per_image)
    sizes = [
        f"{name[:-6].replace('_', ' ')} {gib(v)}" for name, v in figures.items() if name.endswith("_bytes")
    ]
    yield f"sizes      {', '.join(sizes)}\n"
    yield from (f"warning: {warning}" for warning in plan.findings.warnings)
    yield from (f"problem: {problem}" for problem in plan.findings.problems)
    if not plan.findings.problems:
        yield "nothing stands against this run"


def _part_lines(footprint: Footprint) -> Iterator[str]:
    names = ("weights", "gradients", "AdamW", "average")
    yield f"\n{'part':14}{'parameters':>14}{'trained':>14}" + "".join(f"{name:>12}" for name in names)
    for part in footprint.parts:
        sizes = (part.weight_bytes, part.gradient_bytes, part.optimizer_bytes, part.ema_bytes)
        cells = "".join(f"{size / 2**20:8,.0f} MiB" for size in sizes)
        yield f"{part.name:14}{part.num_parameters:14,}{part.num_trained:14,}{cells}"


def _cost_lines(plan: Plan, peak_bytes: int, per_image: Operations) -> Iterator[str]:
    share, figures = per_image[torch.float32] / per_image.total(), plan.figures
    yield f"\nmemory     {gib(peak_bytes)} at the peak of a step"
    yield f"compute    {per_image.total() / 1e9:,.3g} GFLOP per image, {share:.0%} of them in float32"
    seconds = f"{figures['step_s']:.3g} s per step with all losses, {figures['run_s'] / 3600:,.2f} h in all"
    rates = f"{figures['tflops_bfloat16']:.4g} (bfloat16), {figures['tflops_float32']:.4g} (float32)"
    yield f"time       {seconds}, at {rates} TFLOP/s"
