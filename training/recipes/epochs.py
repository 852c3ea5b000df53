"""Durations in epochs: a recipe may say ``num_steps: 16 epochs`` instead of a number of optimizer steps.

Such a duration stays an `Epochs` until the training images are listed; `recipe.in_steps` then replaces it by
``epochs * images / batch_size`` steps, rounded.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, WrapValidator

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*epochs?\s*")


@dataclass(frozen=True)
class Epochs:
    """A duration in passes over the training images."""

    count: float


def _epochs_or_steps(value: object, validate: ValidatorFunctionWrapHandler) -> Any:
    found = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return validate(value)
    return Epochs(float(found[1])) if float(found[1]) else validate(0)


# The type of a field that counts optimizer steps: an int, or `Epochs` in a recipe that was just read.
Steps = Annotated[int, Field(ge=0), WrapValidator(_epochs_or_steps)]
PositiveSteps = Annotated[int, Field(ge=1), WrapValidator(_epochs_or_steps)]


def has_epochs(section: BaseModel) -> bool:
    """Whether a recipe still holds durations in epochs, at any depth."""
    return any(
        has_epochs(value) if isinstance(value, BaseModel) else isinstance(value, Epochs)
        for _, value in section
    )


def steps_of(section: BaseModel, steps_per_epoch: float) -> dict[str, Any]:
    """The fields of a recipe, durations in steps."""
    fields: dict[str, Any] = dict(section)
    for name, value in section:
        if isinstance(value, Epochs):
            fields[name] = round(value.count * steps_per_epoch)
        elif isinstance(value, BaseModel) and has_epochs(value):
            fields[name] = steps_of(value, steps_per_epoch)
    return fields
