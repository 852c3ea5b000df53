"""Weights as training programs wrap them: in dictionaries beside their average, under names of wrappers.

A file holds one set of weights, or a set and its average, which is then meant. Anything else is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from model.errors import CheckpointError

# Keys of averaged weights, and of weights; the first of each is the usual one.
AVERAGES = (
    "ema",
    "ema_model",
    "model_ema",
    "ema_state_dict",
    "ema_model_state_dict",
    "model_ema_state_dict",
    "state_dict_ema",
    "shadow",
)
PLAIN = ("model", "module", "state_dict", "model_state_dict")
# Wrappers that name themselves in every tensor's name: torch.compile, FSDP, activation checkpointing.
TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
MAX_DEPTH = 8  # of dictionaries in one another
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


@dataclass(frozen=True)
class Unwrapped:
    """Weights without their wrappers, and sentences on the choices that were made."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def unwrap(contents: object, part: str | None = None) -> Unwrapped:
    """The weights among a file's contents.

    Args:
        contents: of the file: tensors by name, perhaps in dictionaries.
        part: of a whole model, the module that is wanted.

    Raises:
        CheckpointError: no tensors by name, or several sets of them.
    """
    notes: list[str] = []
    while isinstance(contents, dict):
        key = _choose([name for name in contents if _holds_tensors(contents[name])], notes)
        if key is None:
            break
        contents = contents[key]
    tensors = _without_wrappers(_checked(contents), notes)
    if part is not None:
        tensors = _select(tensors, part, notes)
    return Unwrapped(tensors, tuple(notes))


def _choose(names: list[object], notes: list[str]) -> str | None:
    """Which of a dictionary's entries to go on with; averages come first. None where there is no wrapper."""
    averages = [name for name in AVERAGES if name in names]
    plain = [name for name in PLAIN if name in names]
    for found in (averages, plain):
        if len(found) > 1:
            listed = ", ".join(map(repr, found))
            raise CheckpointError(f"holds several sets of weights, {listed}: save the one that is meant")
        if found:
            if averages:
                beside = f" beside those of {plain[0]!r}" if plain else ""
                notes.append(f"averaged weights ({found[0]!r}){beside} were taken")
            return found[0]
    return None


def _holds_tensors(value: object, depth: int = MAX_DEPTH) -> bool:
    """Whether there is a tensor by name in a dictionary, or in those that it holds."""
    return isinstance(value, dict) and any(
        isinstance(inner, Tensor) or (depth and _holds_tensors(inner, depth - 1)) for inner in value.values()
    )


def _checked(contents: object) -> dict[str, Tensor]:
    if not isinstance(contents, dict) or not contents:
        raise CheckpointError(f"holds {type(contents).__name__}, expected a dictionary of tensors")
    for name, value in contents.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"entry {name!r} is {type(value).__name__}, expected a tensor")
    return contents


def _without_wrappers(tensors: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Names without transparent wrappers, and without the wrappers that they all begin with."""
    named = _without_transparent(tensors)
    while True:
        others = named.keys() - {COUNTER}
        if COUNTER in named and all(name.startswith("module.") for name in others):
            notes.append(f"averaged weights ({COUNTER!r}) were taken")
            del named[COUNTER]
        heads = {name.partition(".")[0] for name in named if "." in name}
        if any("." not in name for name in named) or not heads <= {*AVERAGES, *PLAIN}:
            return named
        head = _choose(list(heads), notes)
        named = {
            name.removeprefix(f"{head}."): tensor
            for name, tensor in named.items()
            if name.startswith(f"{head}.")
        }


def _select(tensors: dict[str, Tensor], part: str, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of one module, where the file holds a whole model."""
    prefix = f"{part}."
    selected = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not selected:
        return tensors
    if len(selected) < len(tensors):
        notes.append(f"of a whole model the {part} was taken")
    return _without_wrappers({name.removeprefix(prefix): tensor for name, tensor in selected.items()}, notes)


def _without_transparent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for wrapped, tensor in tensors.items():
        name = ".".join(part for part in wrapped.split(".") if part not in TRANSPARENT)
        if name in renamed:
            raise CheckpointError(f"holds tensor {name!r} twice, wrapped and not")
        renamed[name] = tensor
    return renamed
