"""Durations of a recipe in epochs: ``num_steps: 16 epochs`` becomes optimizer steps of that recipe's data.

One epoch is as many images as the training data lists, so ``steps = epochs * images / batch_size``,
rounded. The recipe that a run keeps holds the steps.
"""

import re
from pathlib import Path
from typing import Any

from training.data.sources import list_samples
from training.errors import RecipeError

# Fields that count optimizer steps, at any depth of a recipe.
STEP_FIELDS = frozenset(
    {
        "num_steps",
        "final_steps",
        "warmup_steps",
        "decay_start_step",
        "decay_end_step",
        "start_step",
        "adversarial_start_step",
        "log_every_steps",
        "evaluate_every_steps",
        "checkpoint_every_steps",
    }
)
_EPOCHS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*epochs?\s*")


def resolve_epochs(fields: dict[str, Any], default_batch_size: int) -> dict[str, Any]:
    """A recipe's fields with every duration in steps.

    Args:
        fields: as read from YAML; not changed.
        default_batch_size: images a step where the recipe gives none.

    Raises:
        RecipeError: there are epochs to count, but no batch size or no data to count them by.
        DataError: the data cannot be listed.
    """
    if not _has_epochs(fields):
        return fields
    batch_size = fields.get("batch_size", default_batch_size)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise RecipeError(f"field 'batch_size': {batch_size!r} cannot turn epochs into steps")
    return _replaced(fields, _num_images(fields.get("data")) / batch_size)


def _num_images(data: object) -> int:
    """What ``data.num_images`` says, or else a count of the listing."""
    section = data if isinstance(data, dict) else {}
    num_images = section.get("num_images")
    if isinstance(num_images, int) and num_images > 0:
        return num_images
    paths = section.get("train")
    if num_images is not None or not isinstance(paths, list) or not paths:
        raise RecipeError(
            "field 'data': durations in epochs need data.num_images, or data.train to count images in"
        )
    return len(list_samples([Path(str(path)) for path in paths]))


def _has_epochs(fields: dict[str, Any]) -> bool:
    return any(
        _has_epochs(value)
        if isinstance(value, dict)
        else name in STEP_FIELDS and isinstance(value, str) and _EPOCHS.fullmatch(value)
        for name, value in fields.items()
    )


def _replaced(fields: dict[str, Any], steps_per_epoch: float) -> dict[str, Any]:
    replaced: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            replaced[name] = _replaced(value, steps_per_epoch)
        elif name in STEP_FIELDS and isinstance(value, str) and (found := _EPOCHS.fullmatch(value)):
            replaced[name] = round(float(found[1]) * steps_per_epoch)
        else:
            replaced[name] = value
    return replaced
