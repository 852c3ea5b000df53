"""The dry run of a phase: what it would train, need and take, and why it would fail, without training.

Nothing is written. A problem is whatever would end the run, at once or after hours; a warning is not.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.config import PRESETS, TokenizerConfig
from training.data.cache import cache_spec
from training.distributed.device import resolve_device
from training.errors import RecipeError
from training.phases.reconstruction import TRAINED_PARTS
from training.phases.starting_point import check_recipe
from training.planning.device_rates import MatrixRate, find_matrix_rate
from training.planning.footprint import Footprint, build_networks, measure_footprint
from training.planning.operations import Operations
from training.planning.preflight import (
    Findings,
    ImageCheck,
    check_networks,
    check_output,
    check_schedule,
    check_start,
    check_training_images,
    check_validation_images,
    gib,
)
from training.recipes.recipe import BaseRecipe, DistillationRecipe, PhaseRecipe, in_steps, load_recipe

DEFAULT_NUM_CHECKED = 256
DEFAULT_SHARE = 0.4
STATISTICS_TENSORS = 2


@dataclass(frozen=True)
class PlanOptions:
    """What the user states for the estimate.

    Attributes:
        num_checked: images of each listing to decode; None for all.
        matrix_tflops: of the device, by precision; what is not stated is known by its name, or measured.
        matrix_share: part of that rate that a training step reaches.
        num_processes: of the run, one a device.
    """

    num_checked: int | None = DEFAULT_NUM_CHECKED
    matrix_tflops: Mapping[str, float] = field(default_factory=dict)
    matrix_share: float = DEFAULT_SHARE
    num_processes: int = 1


@dataclass(frozen=True)
class Timing:
    """Estimated from operations, the device's rate and the share of it that is reached."""

    step_s: float
    """With every loss in use."""
    run_s: float
    """Evaluation and export aside."""
    images_per_s: float


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: the exported checkpoint, the state of a run, the cache of the frozen parts."""

    checkpoint_bytes: int
    state_bytes: int
    """One state; while it is replaced there are two."""
    output_free_bytes: int
    cache_bytes: int | None
    cache_free_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that a dry run finds."""

    phase: str
    recipe: BaseRecipe
    device: str
    num_processes: int
    micro_batch: int
    train: ImageCheck
    validation: ImageCheck
    footprint: Footprint | None
    device_bytes: int | None
    rate: MatrixRate | None
    timing: Timing | None
    disk: Disk | None
    findings: Findings

    @property
    def num_epochs(self) -> float | None:
        """Of the images that are there."""
        if not self.train.num_listed:
            return None
        return self.recipe.num_steps * self.recipe.batch_size / self.train.num_listed

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = {name: value for name, value in vars(self).items() if name != "recipe"}
        fields = {
            name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
            for name, value in found.items()
        }
        fields |= {"recipe": self.recipe.model_dump(mode="json"), "num_epochs": self.num_epochs}
        if self.footprint is not None:
            fields["peak_bytes"] = self.footprint.peak_bytes
        return fields


def plan_phase(
    phase: str,
    config_path: Path,
    overrides: Sequence[str],
    output: Path | None = None,
    resume: bool = False,
    options: PlanOptions | None = None,
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
    options = options or PlanOptions()
    if phase == "phase0":
        return _plan_distillation(load_recipe(DistillationRecipe, config_path, changes), resume, options)
    return _plan_reconstruction(phase, load_recipe(PhaseRecipe, config_path, changes), resume, options)


def _plan_distillation(recipe: DistillationRecipe, resume: bool, options: PlanOptions) -> Plan:
    """Phase 0 is small: only its data and its output are looked at."""
    findings = Findings()
    side = max(recipe.final_image_size, recipe.teacher_image_size)
    train = check_training_images(recipe.data, side, options.num_checked, findings)
    recipe = in_steps(recipe, train.num_listed)
    check_schedule(recipe, findings)
    if recipe.preset not in PRESETS:
        findings.problems.append(f"field 'preset': {recipe.preset!r} is none of {', '.join(PRESETS)}")
    validation = check_validation_images(recipe.data, side, options.num_checked, findings)
    check_output("output", recipe.output, 0, findings, resume)
    device = str(resolve_device(recipe.device))
    nothing = {name: None for name in ("footprint", "device_bytes", "rate", "timing", "disk")}
    return Plan(
        "phase0", recipe, device, 1, recipe.batch_size, train, validation, findings=findings, **nothing
    )


def _plan_reconstruction(phase: str, recipe: PhaseRecipe, resume: bool, options: PlanOptions) -> Plan:
    findings = Findings()
    device = _check_device(recipe, findings)
    config = check_start(phase, recipe, findings)
    side = config.image_size if config else 256
    train = check_training_images(recipe.data, side, options.num_checked, findings)
    recipe = in_steps(recipe, train.num_listed)
    check_schedule(recipe, findings)
    micro_batch = _check_batches(phase, recipe, options.num_processes, findings)
    validation = check_validation_images(recipe.data, side, options.num_checked, findings)
    if config is None:
        return Plan(
            phase, recipe, str(device), options.num_processes, micro_batch, train, validation,
            None, None, None, None, None, findings,
        )  # fmt: skip
    check_networks(recipe, config, findings)
    footprint = _footprint(phase, recipe, config, micro_batch, options.num_processes)
    device_bytes = _device_bytes(recipe, device)
    if device_bytes is not None and footprint.peak_bytes > device_bytes:
        findings.problems.append(
            f"field 'accumulation_steps': a micro-batch of {micro_batch} images needs "
            f"{gib(footprint.peak_bytes)} and {device} has {gib(device_bytes)}: use more micro-batches"
        )
    rate = find_matrix_rate(device, options.matrix_tflops)
    timing = _timing(recipe, footprint, rate, options)
    _compare_decoding(recipe, train, timing, options.num_processes, findings)
    disk = _disk(phase, recipe, config, footprint, train.num_listed, resume, findings)
    return Plan(
        phase, recipe, str(device), options.num_processes, micro_batch, train, validation,
        footprint, device_bytes, rate, timing, disk, findings,
    )  # fmt: skip


def _check_device(recipe: BaseRecipe, findings: Findings) -> torch.device:
    try:
        device = resolve_device(recipe.device)
    except RuntimeError:
        findings.problems.append(f"field 'device': torch knows no device {recipe.device!r}")
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        findings.problems.append(f"field 'device': there is no {device} here")
    return device


def _check_batches(phase: str, recipe: PhaseRecipe, num_processes: int, findings: Findings) -> int:
    """Images of one forward pass."""
    try:
        check_recipe(phase, recipe, num_processes)
    except RecipeError as exc:
        findings.problems.append(str(exc))
    return max(1, recipe.batch_size // (recipe.accumulation_steps * num_processes))


def _footprint(
    phase: str, recipe: PhaseRecipe, config: TokenizerConfig, micro_batch: int, num_processes: int
) -> Footprint:
    trained = TRAINED_PARTS[phase] | ({"encoder"} if recipe.train_encoder else set())
    networks = build_networks(config, recipe, trained)
    return measure_footprint(networks, recipe, micro_batch, recipe.accumulation_steps, num_processes)


def _device_bytes(recipe: PhaseRecipe, device: torch.device) -> int | None:
    """Memory of the device, where it is here."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (device.index or 0) < torch.cuda.device_count():
        return torch.cuda.get_device_properties(device).total_memory
    return None


def _timing(recipe: PhaseRecipe, footprint: Footprint, rate: MatrixRate, options: PlanOptions) -> Timing:
    def seconds(operations: Operations) -> float:
        needed = rate.seconds(operations.bfloat16, operations.float32)
        return needed / (options.matrix_share * options.num_processes)

    cost = footprint.adversarial or footprint.plain
    run_s = seconds(footprint.run_operations(recipe))
    return Timing(
        step_s=seconds(cost.operations_per_image.times(recipe.batch_size)),
        run_s=run_s,
        images_per_s=recipe.num_steps * recipe.batch_size / run_s,
    )


def _compare_decoding(
    recipe: PhaseRecipe, train: ImageCheck, timing: Timing, num_processes: int, findings: Findings
) -> None:
    if train.images_per_s is None:
        return
    decoded = train.images_per_s * max(1, recipe.data.num_workers) * num_processes
    if decoded < timing.images_per_s:
        findings.warnings.append(
            f"decoding would hold training up: {recipe.data.num_workers} workers a process decode about "
            f"{decoded:.0f} images/s where the device takes {timing.images_per_s:.0f}; raise data.num_workers"
        )


def _disk(
    phase: str,
    recipe: PhaseRecipe,
    config: TokenizerConfig,
    footprint: Footprint,
    num_images: int,
    resume: bool,
    findings: Findings,
) -> Disk:
    tokenizer = [part for part in footprint.parts if part.name in ("encoder", "fusion", "decoder")]
    width = 2 if recipe.storage_dtype == "float16" else 4
    checkpoint_bytes = width * sum(part.num_parameters for part in tokenizer)
    if config.fusion is not None:
        channels, rows, columns = config.latent_shape
        checkpoint_bytes += STATISTICS_TENSORS * 4 * channels * rows * columns
    state_bytes = sum(part.gradient_bytes + part.optimizer_bytes + part.ema_bytes for part in footprint.parts)
    free = check_output("output", recipe.output, checkpoint_bytes + 3 * state_bytes, findings, resume)
    cache_bytes = cache_free = None
    if recipe.cache is not None:
        try:
            spec = cache_spec(phase, recipe, config)
        except RecipeError as exc:
            findings.problems.append(str(exc))
        else:
            cache_bytes = spec.num_bytes(num_images)
            missing = cache_bytes - spec.existing_bytes()
            cache_free = check_output("cache.directory", spec.directory, missing, findings)
    return Disk(checkpoint_bytes, state_bytes, free, cache_bytes, cache_free)


def render_plan(plan: Plan) -> str:
    """The plan as a page of text."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    recipe = plan.recipe
    epochs = "" if plan.num_epochs is None else f" ({plan.num_epochs:.4g} epochs)"
    yield f"{plan.phase}: {recipe.name} -> {recipe.output}"
    yield ""
    yield (
        f"steps      {recipe.num_steps:,} of {recipe.batch_size} images{epochs}; "
        f"{plan.num_processes} x {recipe.accumulation_steps} micro-batches of {plan.micro_batch}"
    )
    yield f"train      {_image_line(plan.train)}"
    yield f"validation {_image_line(plan.validation)}"
    if plan.footprint is not None:
        yield ""
        yield from _footprint_lines(plan, plan.footprint)
    if plan.disk is not None:
        yield ""
        yield from _disk_lines(plan.disk)
    yield ""
    for warning in plan.findings.warnings:
        yield f"warning: {warning}"
    for problem in plan.findings.problems:
        yield f"problem: {problem}"
    if not plan.findings.problems:
        yield "nothing stands against this run"


def _image_line(check: ImageCheck) -> str:
    if not check.num_listed:
        return "no images"
    labels = f" of {check.num_labels} classes" if check.num_labels else ""
    speed = "" if check.images_per_s is None else f", {check.images_per_s:.0f}/s a process"
    good = check.num_checked - len(check.broken)
    return f"{check.num_listed:,} images{labels}; {good:,} of {check.num_checked:,} decoded{speed}"


def _footprint_lines(plan: Plan, footprint: Footprint) -> Iterator[str]:
    cost = footprint.adversarial or footprint.plain
    header = ("part", "parameters", "trained", "weights", "gradients", "AdamW", "average", "activations")
    rows: list[tuple[str, ...]] = [header]
    stages = {"perceptual": "losses", "discriminator": "adversarial"}
    for part in footprint.parts:
        activations = cost.activation_bytes.get(stages.get(part.name, part.name), 0)
        sizes = (part.weight_bytes, part.gradient_bytes, part.optimizer_bytes, part.ema_bytes, activations)
        counts = (f"{part.num_parameters:,}", f"{part.num_trained:,}")
        rows.append((part.name, *counts, *(f"{size / 2**20:,.0f} MiB" for size in sizes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells])
    of = "" if plan.device_bytes is None else f" of {gib(plan.device_bytes)}"
    yield ""
    yield (
        f"memory     {gib(footprint.peak_bytes)}{of} on {plan.device} at the peak of a step, "
        f"{footprint.micro_batch} images at a time"
    )
    shown = ", ".join(
        f"{name} {count.total / 1e9:,.0f}" for name, count in cost.operations.items() if count.total
    )
    yield f"compute    {cost.operations_per_image.total / 1e9:,.0f} GFLOP an image ({shown})"
    if plan.rate is not None and plan.timing is not None:
        wide = cost.operations_per_image.float32 / cost.operations_per_image.total
        yield (
            f"rate       {plan.rate.bfloat16_tflops:,.4g} TFLOP/s in bfloat16, "
            f"{plan.rate.float32_tflops:,.4g} in float32 ({plan.rate.source}); "
            f"{wide:.0%} of the operations are float32"
        )
        yield (
            f"time       {plan.timing.step_s:.3g} s a step with all losses, "
            f"{plan.timing.images_per_s:,.0f} images/s, {_duration(plan.timing.run_s)} in all"
        )


def _disk_lines(disk: Disk) -> Iterator[str]:
    yield (
        f"disk       checkpoint {gib(disk.checkpoint_bytes)}, state {gib(disk.state_bytes)} "
        f"(the last two, and a third while it is written); {gib(disk.output_free_bytes)} free"
    )
    if disk.cache_bytes is not None and disk.cache_free_bytes is not None:
        yield f"cache      {gib(disk.cache_bytes)}; {gib(disk.cache_free_bytes)} free"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
