"""Scaling sweep of phase 2: expert widths and layer counts, equal training for each point.

Every point is a run of the ordinary trainer in a directory of its own, so that a sweep that was stopped
goes on where it was: finished points are skipped, the one under way resumes from its last state.
"""

import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from tqdm import tqdm

from model.checkpoints.tokenizers import open_checkpoint, resolve_checkpoint
from model.config import PRESETS, Depth, EncoderConfig, FusionConfig, Width, fusion_num_parameters
from model.images.similarity import psnr, ssim
from model.images.tensors import to_bytes
from model.tokenizer import LatentKind, Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import Sample, list_samples
from training.data.workers import end_with_parent
from training.distributed.device import resolve_device
from training.errors import DataError, RecipeError, TrainingError
from training.evaluation.feature_networks import EfficientNetFeatures
from training.evaluation.frechet import frechet_distance
from training.evaluation.moments import FeatureMoments
from training.losses.perceptual import make_perceptual
from training.output.files import write_json
from training.phases.reconstruction import ReconstructionTask
from training.phases.states import holds_state
from training.phases.trainer import Trainer
from training.recipes.recipe import NonNegativeInt, PhaseRecipe, PositiveInt, in_steps, load_recipe
from training.studies.scaling import SweepPoint, write_report

logger = logging.getLogger(__name__)

EVALUATION_BATCH_SIZE = 25
# What may differ between the parts of one sweep: which points there are, and how they are run.
FREE_FIELDS = frozenset({"widths", "layer_counts", "extra_seeds", "num_processes", "output", "name"})


class SweepRecipe(PhaseRecipe):
    """A recipe of phase 2, and the sizes to train it at."""

    widths: list[Width] = Field(
        min_length=2, description="Expert widths h, each with the fusion's number of layers."
    )
    layer_counts: list[Depth] = Field(
        min_length=2, description="Numbers of fused layers, each with the fusion's expert width."
    )
    extra_seeds: list[NonNegativeInt] = Field(
        [],
        description="Seeds to train the fusion's own size with again: how far chance alone moves a figure.",
    )
    num_processes: PositiveInt = Field(1, description="Points trained side by side.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("widths", "layer_counts", "extra_seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values} names a value twice")
        if self.seed in self.extra_seeds:
            raise ValueError(f"extra_seeds={self.extra_seeds} holds the seed of every point, {self.seed}")
        return self


@dataclass(frozen=True)
class Size:
    """Where one point lies."""

    num_layers: int
    hidden_width: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the point's directory."""
        return f"layers{self.num_layers:02d}-width{self.hidden_width:04d}-seed{self.seed}"


class PointTask(ReconstructionTask):
    """Phase 2 as ever, judged by more figures and exported without latent statistics.

    Statistics take a pass over the training images, and no generator is trained on a point.
    """

    def __init__(self, recipe: PhaseRecipe, samples: Sequence[Sample]) -> None:
        super().__init__("phase2", recipe, samples, is_resumed=holds_state(recipe.output))

    def evaluate(self, step: int, directory: Path) -> dict[str, float]:
        """The figures of `measure` on the validation images, with averaged weights."""
        with self.ema.applied():
            return measure(self.tokenizer, self.validation, self.perceptual.distance)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        with self.ema.applied():
            dtype = getattr(torch, self.recipe.storage_dtype)
            self.tokenizer.save(path, dtype, {**provenance, "phase": self.phase})


@torch.no_grad()
def measure(
    tokenizer: Tokenizer, samples: Sequence[Sample], distance: nn.Module, latent: LatentKind = "enriched"
) -> dict[str, float]:
    """Means over images, ``psnr_db``, ``ssim`` and ``perceptual`` (``distance`` on whole images), and the
    Frechet distance between originals and reconstructions, ``frechet_efficientnet_lite0``.

    Raises:
        DataError: no image can be decoded.
    """
    network = EfficientNetFeatures(tokenizer.device)
    rows, sides = [], (FeatureMoments(network.width), FeatureMoments(network.width))
    for _, batch in evaluation_batches(samples, tokenizer.config.image_size, EVALUATION_BATCH_SIZE):
        images = batch.pixels(tokenizer.device)
        decoded = tokenizer.reconstruct(images, latent).float()
        figures = (psnr(decoded, images), ssim(decoded, images), distance(decoded, images))
        rows.append(torch.stack([figure.double().cpu() for figure in figures], dim=1))
        for side, pixels in zip(sides, (images, decoded), strict=True):
            side.update(network.features(to_bytes(pixels)))
    if not rows:
        raise DataError(f"none of the {len(samples)} images could be decoded")
    means = torch.cat(rows).mean(dim=0).tolist()
    found = dict(zip(("psnr_db", "ssim", "perceptual"), means, strict=True))
    frechet = frechet_distance(*sides)
    return found if frechet is None else found | {network.column: frechet}


def run_sweep(
    config_path: Path, overrides: list[str], output: Path | None = None, resume: bool = False
) -> int:
    """``drorae train sweep``: train every point, then write table, fit and plot.

    Args:
        config_path: the recipe, YAML.
        overrides: ``section.field=value`` changes to it.
        output: directory of the sweep, instead of the recipe's.
        resume: go on with the sweep that the directory holds.

    Returns:
        0.

    Raises:
        TrainingError, model.errors.ModelError: one sentence that names the file or field at fault.
    """
    if output is not None:
        overrides = [*overrides, f"output={output}"]
    recipe = load_recipe(SweepRecipe, config_path, overrides)
    samples = list_samples(recipe.data.train)
    recipe = in_steps(recipe, len(samples))
    encoder = _source_encoder(recipe)
    centre = _centre(recipe, encoder)
    sizes = plan_sizes(recipe, centre, encoder)
    _claim(recipe, resume)
    pending = [size for size in sizes if not _run_file(recipe.output, size).exists()]
    logger.info("%d points, %d of them to train", len(sizes), len(pending))
    _train_all([point_recipe(recipe, centre, size) for size in pending], samples, recipe.num_processes)
    points = {size: _read_point(recipe.output, size, encoder.width) for size in sizes}
    write_report(
        recipe.output,
        list(points.values()),
        points[Size(centre.num_layers, centre.hidden_width, recipe.seed)],
        _baseline(recipe),
        json.loads(recipe.model_dump_json()),
    )
    return 0


def plan_sizes(recipe: SweepRecipe, centre: FusionConfig, encoder: EncoderConfig) -> list[Size]:
    """Every point once: all widths, all layer counts, and the fusion's own size with every seed.

    Raises:
        RecipeError: more layers than the encoder has.
    """
    for count in (*recipe.layer_counts, centre.num_layers):
        if count > encoder.depth:
            raise RecipeError(f"field 'layer_counts': {count} exceeds the encoder's {encoder.depth} blocks")
    sizes = [Size(centre.num_layers, width, recipe.seed) for width in recipe.widths]
    sizes += [Size(count, centre.hidden_width, recipe.seed) for count in recipe.layer_counts]
    seeds = (recipe.seed, *recipe.extra_seeds)
    sizes += [Size(centre.num_layers, centre.hidden_width, seed) for seed in seeds]
    return sorted(set(sizes), key=lambda size: (size.seed != recipe.seed, size.num_layers, size.hidden_width))


def point_recipe(recipe: SweepRecipe, centre: FusionConfig, size: Size) -> PhaseRecipe:
    """The sweep's recipe at one size: nothing else differs between points."""
    fields = {name: getattr(recipe, name) for name in PhaseRecipe.model_fields}
    fusion = centre.model_copy(update={"num_layers": size.num_layers, "hidden_width": size.hidden_width})
    output = recipe.output / "points" / size.name
    return PhaseRecipe(**{**fields, "name": size.name, "output": output, "fusion": fusion, "seed": size.seed})


def _centre(recipe: SweepRecipe, encoder: EncoderConfig) -> FusionConfig:
    """The fusion that the sizes vary, fitted to the encoder."""
    fusion = recipe.fusion or (PRESETS[recipe.preset].fusion if recipe.preset else None)
    if fusion is None:
        raise RecipeError("field 'fusion': name a preset or give the fusion that the sizes vary")
    if fusion.mixer != "experts":
        raise RecipeError("field 'fusion.mixer': only experts have a width to sweep")
    return fusion.fitted(encoder)


def _source_encoder(recipe: SweepRecipe) -> EncoderConfig:
    if recipe.init is None:
        raise RecipeError("field 'init': the sweep starts from phase 1's checkpoint")
    config = open_checkpoint(resolve_checkpoint(recipe.init)).config
    if config.fusion is not None:
        raise RecipeError(f"field 'init': {recipe.init} has a fusion already; name phase 1's checkpoint")
    return config.encoder


def _claim(recipe: SweepRecipe, resume: bool) -> None:
    """Keep the recipe beside the points, and refuse to mix two kinds of training in one sweep.

    Raises:
        TrainingError: the directory holds a sweep, and it is not to be resumed.
        RecipeError: it was trained otherwise; names the field.
    """
    file = recipe.output / "recipe.json"
    fields = json.loads(recipe.model_dump_json())
    if file.exists() and not resume:
        raise TrainingError(
            f"{recipe.output} holds a sweep: continue it with --resume, or choose another --output"
        )
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        for name in sorted(set(fields) - FREE_FIELDS):
            if fields[name] != before.get(name):
                raise RecipeError(
                    f"field {name!r} differs from that of the points under {recipe.output}: all points are "
                    "trained alike, so choose another --output"
                )
    write_json(file, fields)


def _train_all(recipes: list[PhaseRecipe], samples: Sequence[Sample], num_processes: int) -> None:
    """Train the points, each from its last state where it has one."""
    with tqdm(total=len(recipes), desc="sweep", unit="point", dynamic_ncols=True) as bar:
        if num_processes == 1:
            for recipe in recipes:
                _show(bar, recipe, _train_point(recipe, samples))
            return
        with _quiet_processes(min(num_processes, max(1, len(recipes)))) as pool:
            futures = {pool.submit(_train_point, recipe, samples): recipe for recipe in recipes}
            for future in as_completed(futures):
                _show(bar, futures[future], future.result())


def _train_point(recipe: PhaseRecipe, samples: Sequence[Sample]) -> dict[str, float]:
    return Trainer(PointTask(recipe, samples), recipe.output).run(resume=True)


def _show(bar: "tqdm[Any]", recipe: PhaseRecipe, figures: dict[str, float]) -> None:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    bar.write(f"{recipe.name}: {shown}")
    bar.update()


@contextmanager
def _quiet_processes(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes that share the threads among them and draw no bars of their own."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, so by the new processes alone
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),  # CUDA and thread pools do not survive a fork
        initializer=_start_process,
        initargs=(max(1, torch.get_num_threads() // num_processes),),
    )
    try:
        yield pool
    except BaseException:  # an error or Ctrl-C ends the others too: their last states are whole
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _start_process(num_threads: int) -> None:
    """In each of the processes: its threads, and an end when the sweep is killed."""
    torch.set_num_threads(num_threads)
    end_with_parent()


def _run_file(output: Path, size: Size) -> Path:
    """Written last by the trainer: its presence says that the point is finished."""
    return output / "points" / size.name / "run.json"


def _read_point(output: Path, size: Size, width: int) -> SweepPoint:
    run = json.loads(_run_file(output, size).read_text(encoding="utf-8"))
    num_parameters = fusion_num_parameters(size.num_layers, width, size.hidden_width)
    return SweepPoint(
        size.num_layers,
        size.hidden_width,
        size.seed,
        num_parameters,
        run["validation"],
        run["training_seconds"],
    )


def _baseline(recipe: SweepRecipe) -> dict[str, float]:
    """The figures without any fusion: z_base through the same decoder, measured once per sweep."""
    file = recipe.output / "baseline.json"
    if not file.exists():
        assert recipe.init is not None
        device = resolve_device(recipe.device)
        distance = make_perceptual(recipe.loss).to(device).distance
        tokenizer = Tokenizer.load(recipe.init, device=device)
        write_json(file, measure(tokenizer, list_samples(recipe.data.validation), distance, "base"))
    figures: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return figures
