"""Stage 2 from a folder of latents on disk: checked against the recipe, held on the device or streamed.

Shape legend: F views, C latent channels, h w latent grid.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.tokenizer import Tokenizer
from training.data.classes import Classes
from training.data.held_latents import HeldLatents
from training.data.sources import expand_path
from training.data.workers import ignore_signals, iterate
from training.distributed.ranks import Ranks
from training.errors import DataError, LatentsError, RecipeError
from training.latents.reading.datasets import LatentStream
from training.latents.reading.folder import LatentFolder, LatentRows
from training.latents.units import NO_LABEL
from training.recipes.generator import GeneratorRecipe

HOLD_ROWS = 1024  # read at once


def open_latents(recipe: GeneratorRecipe, field: str, tokenizer: Tokenizer | None = None) -> LatentFolder:
    """The folder that a field of ``data`` names, of the tokenizer and the latent of the recipe.

    Args:
        recipe: of the run.
        field: ``latents`` or ``validation_latents``.
        tokenizer: that the latents must be of; None where that is checked later.

    Raises:
        RecipeError: the folder cannot be used; names the field.
    """
    directory: Path = expand_path(getattr(recipe.data, field))
    wanted = tokenizer.checkpoint.sha256 if tokenizer is not None and tokenizer.checkpoint else None
    try:
        folder = LatentFolder(directory, wanted)
        identity = folder.identity
        if identity.latent != recipe.latent:
            raise LatentsError(f"{directory}: {identity.latent} latents, not {recipe.latent} ones")
        if identity.normalized:
            raise LatentsError(
                f"{directory}: normalised already, and training does that itself: leave out --normalize"
            )
    except LatentsError as exc:
        raise RecipeError(f"field 'data.{field}': {exc}") from exc
    return folder


def stored_classes(folder: LatentFolder, names: tuple[str, ...] | None) -> Classes:
    """The classes of a folder's rows.

    Args:
        folder: read through for its labels.
        names: names that are given instead of the manifest's.

    Raises:
        DataError: a row has no class, or there are fewer names than classes.
    """
    labels = folder.labels()
    if missing := labels.count(NO_LABEL):
        raise DataError(f"{folder.directory}: {missing} of {len(labels)} images have no class")
    names = names or tuple(folder.manifest.classes)
    count = max(labels) + 1
    if names and len(names) < count:
        raise DataError(f"{folder.directory}: labels up to {count - 1}, and {len(names)} names of classes")
    return Classes(names, len(names) or count, by_folder=None)


def check_labels(held: HeldLatents, classes: Classes) -> None:
    """Whether every held row has one of the classes.

    Raises:
        RecipeError: one has none, or another.
    """
    low, high = int(held.labels.min()), int(held.labels.max())
    if low < 0 or high >= classes.count:
        raise RecipeError(
            f"field 'data.validation_latents': labels from {low} to {high}, of {classes.count} classes"
        )


def hold_stored(
    folder: LatentFolder,
    flip: bool,
    dtype: torch.dtype,
    device: torch.device,
    limit: int | None = None,
    progress: bool = True,
) -> HeldLatents:
    """Rows of a folder on the device, at most ``limit`` of them, spread evenly.

    Raises:
        LatentsError: a file is damaged, mirror images are wanted and not there, or a number is too large for
            ``dtype``.
    """
    total, num_views = len(folder), folder.num_views(flip)
    count = min(limit or total, total)
    latents = torch.empty(count, num_views, *folder.identity.shape, dtype=dtype, device=device)
    labels = torch.empty(count, dtype=torch.int64, device=device)
    with tqdm(total=count, unit="image", desc="latents", disable=not progress) as bar:
        for start in range(0, count, HOLD_ROWS):
            chosen = [place * total // count for place in range(start, min(start + HOLD_ROWS, count))]
            part = slice(start, start + len(chosen))
            for view in range(num_views):
                rows = folder.rows([row + view * total for row in chosen])
                latents[part, view] = rows.latents.to(device=device, dtype=dtype)
                labels[part] = rows.labels.to(device)
            if not torch.isfinite(latents[part]).all():
                raise LatentsError(f"{folder.directory}: a latent is too large for {dtype}: use float32")
            bar.update(len(chosen))
    return HeldLatents(latents, labels, folder.manifest.totals.broken)


def stored_batches(
    recipe: GeneratorRecipe, directory: Path, flip: bool, start_batch: int, ranks: Ranks
) -> Iterator[LatentRows]:
    """This rank's share of endless micro-batches from number ``start_batch`` on.

    Raises:
        LatentsError: the folder has fewer rows than one batch, or a file is damaged.
    """
    size = recipe.batch_size // (recipe.accumulation_steps * ranks.size)
    stream = LatentStream(directory, size, recipe.seed, flip, rank=ranks.rank, world_size=ranks.size)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=recipe.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )
    epoch, batch = divmod(start_batch, len(stream))
    try:
        while True:
            stream.start(epoch, batch)
            yield from iterate(loader)
            epoch, batch = epoch + 1, 0
    except LatentsError as exc:  # of a worker: with its traceback, of which the last line is the sentence
        raise LatentsError(str(exc).splitlines()[-1].removeprefix("training.errors.LatentsError: ")) from exc
