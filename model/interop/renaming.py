"""State dicts under other names: which foreign tensors make up each of ours, applied strictly.

Pure functions; nothing is read or written. `model.interop.transformers_weights` and
`model.interop.rae_decoder_weights` hold the tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import CheckpointError


@dataclass(frozen=True)
class TensorNames:
    """Foreign name of every tensor of ours; a tuple is concatenated along the first dimension."""

    block_prefix: str
    outside: dict[str, str]
    in_block: dict[str, str | tuple[str, ...]]
    dropped: frozenset[str] = frozenset()

    def sources(self, num_blocks: int) -> dict[str, tuple[str, ...]]:
        """Our name of every tensor, with the foreign tensors that it is made of."""
        sources: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in self.outside.items()}
        for block in range(num_blocks):
            prefix = f"{self.block_prefix}{block}."
            for ours, theirs in self.in_block.items():
                parts = (theirs,) if isinstance(theirs, str) else theirs
                sources[f"blocks.{block}.{ours}"] = tuple(prefix + part for part in parts)
        return sources


def affine(pairs: Mapping[str, str]) -> dict[str, str]:
    """Weight and bias of modules: ours to theirs."""
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in ("weight", "bias")
    }


def fused(ours: str, *theirs: str) -> dict[str, str | tuple[str, ...]]:
    """Weight and bias of one linear map of ours, which are several of theirs."""
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}


def translate(
    state_dict: Mapping[str, Tensor],
    names: TensorNames,
    num_blocks: int,
    spell: Callable[[str], str] = str,
    shapes: Mapping[str, torch.Size] | None = None,
) -> dict[str, Tensor]:
    """Our tensors from foreign ones.

    Args:
        state_dict: foreign tensors.
        names: the table.
        num_blocks: how many blocks there must be.
        spell: turns a name of the table into the one that errors should use.
        shapes: of our tensors by our names, where they are known.

    Raises:
        CheckpointError: a tensor is missing, not known or of another shape; names it.
    """
    remaining = {name: tensor for name, tensor in state_dict.items() if name not in names.dropped}

    def take(name: str) -> Tensor:
        if name not in remaining:
            raise CheckpointError(f"tensor {spell(name)!r} is missing")
        return remaining.pop(name)

    def assemble(ours: str, parts: tuple[str, ...]) -> Tensor:
        tensors = [take(part) for part in parts]
        wanted = list(tensors[0].shape)
        if shapes is not None:
            wanted = list(shapes[ours])
            wanted[0] //= len(parts)
        for part, tensor in zip(parts, tensors, strict=True):
            if list(tensor.shape) != wanted or not wanted:
                found = list(tensor.shape)
                raise CheckpointError(f"tensor {spell(part)!r} has shape {found}, expected {wanted}")
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    translated = {ours: assemble(ours, theirs) for ours, theirs in names.sources(num_blocks).items()}
    if remaining:
        raise CheckpointError(f"unexpected tensor {spell(min(remaining))!r}")
    return translated


def translate_back(
    state_dict: Mapping[str, Tensor], names: TensorNames, num_blocks: int
) -> dict[str, Tensor]:
    """Foreign tensors from ours, which must be complete; what the table drops is not there."""
    foreign = {}
    for ours, theirs in names.sources(num_blocks).items():
        for part, tensor in zip(theirs, state_dict[ours].chunk(len(theirs)), strict=True):
            foreign[part] = tensor.contiguous()
    return foreign


def count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks a state dict has, by the highest number after the prefix.

    Raises:
        CheckpointError: there is none.
    """
    numbers = [name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix)]
    num_blocks = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    if not num_blocks:
        raise CheckpointError(f"tensor '{prefix}0.*' is missing: no block was found")
    return num_blocks
