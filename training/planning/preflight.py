"""What a run needs, looked at before it starts: images, weights, and room to write."""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.config import PRESETS, TokenizerConfig
from model.errors import ModelError
from model.networks.encoder import Encoder
from training.data.batches import Transform, decode_image, random_crop
from training.data.sources import Sample, list_samples
from training.errors import DataError, TrainingError, WeightsError
from training.losses.adversarial import make_backbone
from training.losses.perceptual import make_perceptual
from training.phases.starting_point import make_tokenizer
from training.phases.states import holds_state
from training.recipes.recipe import BaseRecipe, DataConfig, PhaseRecipe

logger = logging.getLogger(__name__)

MAX_SHOWN = 5


@dataclass
class Findings:
    """Why the run would fail, and what would only disappoint; sentences."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImageCheck:
    """One listing, and the part of it that was decoded.

    Attributes:
        num_listed: images in the listing; 0 where it could not be read.
        num_labels: different classes that the source names.
        num_checked: images that were decoded and cropped.
        broken: (key, why) of each that could not be.
        images_per_s: decoded and cropped a second, by one process.
    """

    num_listed: int = 0
    num_labels: int = 0
    num_checked: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    images_per_s: float | None = None


def check_training_images(
    data: DataConfig, side: int, num_checked: int | None, findings: Findings
) -> ImageCheck:
    """List ``data.train`` and decode some of it, as training will.

    Args:
        data: of the recipe.
        side: of the crops, pixels.
        num_checked: how many images to decode, spread evenly over the listing; None for all.
        findings: gets what is wrong.
    """
    check = _check_images("data.train", data.train, random_crop(data, side), num_checked, findings)
    if data.num_images is not None and check.num_listed and data.num_images != check.num_listed:
        findings.problems.append(
            f"field 'data.num_images': the recipe says {data.num_images} but data.train lists "
            f"{check.num_listed} images, so its epochs would be of the wrong length"
        )
    return check


def check_validation_images(
    data: DataConfig, side: int, num_checked: int | None, findings: Findings
) -> ImageCheck:
    """List ``data.validation`` and decode some of it."""
    if not data.validation:
        return ImageCheck()
    centre = DataConfig(train=data.train, resize_short_side=(side, side), flip=False)
    return _check_images("data.validation", data.validation, random_crop(centre, side), num_checked, findings)


def check_start(phase: str, recipe: PhaseRecipe, findings: Findings) -> TokenizerConfig | None:
    """Load the checkpoint that the run starts from, as training will.

    Returns:
        The tokenizer that would be trained; that of the recipe's preset where the checkpoint is at fault;
        None where neither is known.
    """
    try:
        return make_tokenizer(phase, recipe).config
    except (ModelError, TrainingError) as exc:
        text = str(exc)
        findings.problems.append(text if text.startswith("field") else f"field 'init': {text}")
    if recipe.preset not in PRESETS:
        return None
    fusion = PRESETS[recipe.preset].fusion if phase != "phase1" else None
    return PRESETS[recipe.preset].model_copy(update={"fusion": fusion})


def check_networks(recipe: PhaseRecipe, config: TokenizerConfig, findings: Findings) -> None:
    """Load the weights of the losses' networks."""
    if recipe.loss.perceptual:
        try:
            make_perceptual(recipe.loss)
        except WeightsError as exc:
            findings.problems.append(f"field 'loss': {exc}")
    if recipe.loss.adversarial:
        try:
            with torch.device("meta"):
                encoder = Encoder(config.encoder)
            make_backbone(recipe.discriminator, encoder, config)
        except WeightsError as exc:
            findings.problems.append(f"field 'discriminator': {exc}")


def check_output(
    field_name: str, folder: Path, needed_bytes: int, findings: Findings, resume: bool | None = None
) -> int:
    """Whether a folder can be written to and has room.

    Args:
        field_name: of the recipe, for messages.
        folder: need not be there.
        needed_bytes: what the run will keep in it at once.
        findings: gets what is wrong.
        resume: whether the run that it may hold is to be continued; None where the folder holds no runs.

    Returns:
        Bytes that are free there.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        findings.problems.append(f"field {field_name!r}: {existing} is a file, not a folder")
        return 0
    if not os.access(existing, os.W_OK | os.X_OK):
        findings.problems.append(f"field {field_name!r}: {existing} is not writable")
    if resume is False and holds_state(folder):
        findings.problems.append(
            f"field {field_name!r}: {folder} holds a run: continue it with --resume, or choose another"
        )
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        findings.problems.append(
            f"field {field_name!r}: {gib(needed_bytes)} are needed under {existing}, "
            f"where {gib(free_bytes)} are free"
        )
    return free_bytes


def check_schedule(recipe: BaseRecipe, findings: Findings) -> None:
    """Durations that cannot be meant."""
    steps = recipe.num_steps
    if recipe.optimizer.warmup_steps >= steps:
        findings.problems.append(
            f"field 'optimizer.warmup_steps': the warm-up of {recipe.optimizer.warmup_steps} steps "
            f"does not end within num_steps={steps}"
        )
    if isinstance(recipe, PhaseRecipe) and recipe.loss.adversarial:
        start = recipe.discriminator.adversarial_start_step
        if start >= steps:
            findings.warnings.append(
                f"the adversarial loss would begin at step {start}, after the last of {steps}"
            )


def gib(num_bytes: float) -> str:
    """Bytes for people: ``3.21 GiB``."""
    return f"{num_bytes / 2**30:,.2f} GiB"


def _check_images(
    name: str, paths: Sequence[Path], transform: Transform, num_checked: int | None, findings: Findings
) -> ImageCheck:
    try:
        samples = list_samples(paths)
    except (DataError, OSError) as exc:
        findings.problems.append(f"field {name!r}: {exc}")
        return ImageCheck()
    checked = _spread(samples, num_checked)
    broken, seconds = _decode(checked, transform, name)
    if broken and len(broken) == len(checked):
        findings.problems.append(f"field {name!r}: none of {len(checked)} images could be decoded")
    elif broken:
        shown = "; ".join(f"{key}: {why}" for key, why in broken[:MAX_SHOWN])
        findings.warnings.append(
            f"{name}: {len(broken)} of {len(checked)} images cannot be decoded and would be skipped: {shown}"
            + ("; ..." if len(broken) > MAX_SHOWN else "")
        )
    return ImageCheck(
        num_listed=len(samples),
        num_labels=len({sample.label for sample in samples} - {None}),
        num_checked=len(checked),
        broken=broken,
        images_per_s=len(checked) / seconds if seconds else None,
    )


def _spread(samples: Sequence[Sample], num_wanted: int | None) -> Sequence[Sample]:
    """So many of them, evenly over the listing, its first and last among them."""
    if num_wanted is None or num_wanted >= len(samples):
        return samples
    indices = np.linspace(0, len(samples) - 1, num_wanted).round().astype(int)
    return [samples[index] for index in indices]


def _decode(
    samples: Sequence[Sample], transform: Transform, name: str
) -> tuple[list[tuple[str, str]], float]:
    """What could not be decoded, and the seconds it took to look."""
    broken: list[tuple[str, str]] = []
    begin = time.perf_counter()
    for sample in tqdm(samples, desc=f"decode {name}", unit="image", leave=False, disable=None):
        try:
            transform(decode_image(sample.read()), np.random.default_rng(0))
        except (DataError, OSError) as exc:
            broken.append((sample.key, str(exc)))
    return broken, time.perf_counter() - begin
