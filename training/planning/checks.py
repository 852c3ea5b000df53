"""Checks before a run starts: images, weights, schedule, and room to write."""

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from model.config import PRESETS, TokenizerConfig
from model.errors import ModelError
from model.networks.encoder import Encoder
from training.data.batches import decode_image, random_crop
from training.data.sources import list_samples, spread_samples
from training.distributed.device import resolve_device
from training.errors import DataError, RecipeError, TrainingError, WeightsError
from training.losses.adversarial import make_backbone
from training.losses.perceptual import make_perceptual
from training.output.progress import log_progress
from training.phases.starting_point import check_recipe, make_tokenizer
from training.phases.states import holds_state
from training.recipes.generator import GeneratorRecipe
from training.recipes.recipe import BaseRecipe, DataConfig, PhaseRecipe

MAX_SHOWN = 5


@dataclass
class Findings:
    """Sentences: why the run would fail, and what would only disappoint."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImageCheck:
    """One listing, and the part of it that was decoded.

    Attributes:
        num_listed: images; 0 where the listing failed.
        num_labels: different classes that the source names.
        num_checked: images that were decoded and cropped.
        broken: (key, reason) of each that could not be.
        images_per_s: decoded and cropped per second by one process.
    """

    num_listed: int = 0
    num_labels: int = 0
    num_checked: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    images_per_s: float | None = None

    def __str__(self) -> str:
        labels = f" of {self.num_labels} classes" if self.num_labels else ""
        good = self.num_checked - len(self.broken)
        decoded = f"; {good:,} of {self.num_checked:,} decoded, {self.images_per_s or 0:.0f}/s per process"
        return f"{self.num_listed:,} images{labels}{decoded}" if self.num_listed else "no images"


def check_images(
    name: str, data: DataConfig, side: int, num_checked: int | None, findings: Findings
) -> ImageCheck:
    """List images and decode some of them, as training will.

    Args:
        name: ``data.train`` or ``data.validation``.
        data: of the recipe.
        side: of the crops, pixels.
        num_checked: images to decode, spread evenly over the listing; None for all.
        findings: gets what is wrong.
    """
    paths = data.train if name == "data.train" else data.validation
    if not paths:
        return ImageCheck()
    try:
        samples = list_samples(paths)
    except (DataError, OSError) as exc:
        findings.problems.append(f"field {name!r}: {exc}")
        return ImageCheck()
    if name == "data.train" and data.num_images not in (None, len(samples)):
        findings.problems.append(
            f"field 'data.num_images': the recipe says {data.num_images} but data.train lists {len(samples)} "
            "images, so its epochs would be of the wrong length"
        )
    checked, transform = spread_samples(samples, num_checked), random_crop(data, side)
    broken, begin = [], time.perf_counter()
    for sample in log_progress(checked, len(checked), f"decoding {name}"):
        try:
            transform(decode_image(sample.read()), np.random.default_rng(0))
        except (DataError, OSError) as exc:
            broken.append((sample.key, str(exc)))
    rate = len(checked) / (time.perf_counter() - begin)
    if len(broken) == len(checked):
        findings.problems.append(f"field {name!r}: none of {len(checked)} images could be decoded")
    elif broken:
        shown = "; ".join(f"{key}: {reason}" for key, reason in broken[:MAX_SHOWN])
        findings.warnings.append(
            f"{name}: {len(broken)} of {len(checked)} images cannot be decoded and would be skipped: {shown}"
        )
    labels = {sample.label for sample in samples} - {None}
    return ImageCheck(len(samples), len(labels), len(checked), broken, rate)


def check_start(phase: str, recipe: PhaseRecipe, findings: Findings) -> TokenizerConfig | None:
    """Load the checkpoint that the run starts from.

    Returns:
        The tokenizer that would be trained; where the checkpoint is at fault that of the preset, or None.
    """
    try:
        return make_tokenizer(phase, recipe).config
    except (ModelError, TrainingError) as exc:
        findings.problems.append(str(exc) if str(exc).startswith("field") else f"field 'init': {exc}")
    preset = PRESETS.get(recipe.preset or "")
    return preset and preset.model_copy(update={"fusion": None if phase == "phase1" else preset.fusion})


def check_networks(recipe: PhaseRecipe, config: TokenizerConfig, findings: Findings) -> None:
    """Load the weights of the losses' networks."""
    try:
        if recipe.loss.perceptual:
            make_perceptual(recipe.loss)
    except WeightsError as exc:
        findings.problems.append(f"field 'loss': {exc}")
    try:
        if recipe.loss.adversarial:
            with torch.device("meta"):
                encoder = Encoder(config.encoder)
            make_backbone(recipe.discriminator, encoder, config)
    except WeightsError as exc:
        findings.problems.append(f"field 'discriminator': {exc}")


def check_recipe_fits(phase: str, recipe: BaseRecipe, num_processes: int, findings: Findings) -> torch.device:
    """Look at device, batches and durations; gives the device, or the CPU where there is none of its name."""
    try:
        device = resolve_device(recipe.device)
    except RuntimeError:
        findings.problems.append(f"field 'device': torch knows no device {recipe.device!r}")
        device = torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        findings.problems.append(f"field 'device': there is no {device} here")
    steps, warmup = recipe.num_steps, recipe.optimizer.warmup_steps
    if warmup >= steps:
        findings.problems.append(
            f"field 'optimizer.warmup_steps': {warmup} steps of warm-up do not end within num_steps={steps}"
        )
    if not isinstance(recipe, PhaseRecipe):
        if recipe.preset is None and not isinstance(recipe, GeneratorRecipe):
            findings.problems.append(f"field 'preset': name one of {', '.join(PRESETS)}")
        return device
    try:
        check_recipe(phase, recipe, num_processes)
    except RecipeError as exc:
        findings.problems.append(str(exc))
    start = recipe.discriminator.adversarial_start_step
    if recipe.loss.adversarial and start >= steps:
        findings.warnings.append(
            f"the adversarial loss would begin at step {start}, after the last of {steps}"
        )
    return device


def check_output(
    name: str, folder: Path, needed_bytes: int, findings: Findings, resume: bool | None = None
) -> int:
    """Whether a folder can be written to and has room; gives the bytes that are free.

    Args:
        name: field of the recipe, for messages.
        folder: need not exist.
        needed_bytes: what the run will keep in it at once.
        findings: gets what is wrong.
        resume: whether the run in it is to be continued; None where the folder holds no runs.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        findings.problems.append(f"field {name!r}: {existing} is a file, not a folder")
        return 0
    if not os.access(existing, os.W_OK | os.X_OK):
        findings.problems.append(f"field {name!r}: {existing} is not writable")
    if resume is False and holds_state(folder):
        findings.problems.append(
            f"field {name!r}: {folder} holds a run: continue it with --resume, or choose another"
        )
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        findings.problems.append(
            f"field {name!r}: {gib(needed_bytes)} are needed under {existing}, and {gib(free_bytes)} are free"
        )
    return free_bytes


def gib(num_bytes: float) -> str:
    """Bytes for people: ``3.21 GiB``."""
    return f"{num_bytes / 2**30:,.2f} GiB"
