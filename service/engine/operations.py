"""The operations of the model on an item.

A row of this table is all that queue, runners, routes, OpenAPI document and metrics know of an operation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.config import TokenizerConfig
from model.images.tensors import to_bytes
from model.tokenizer import LatentKind, Tokenizer

Run = Callable[[Tokenizer, Tensor, "BatchKey"], Tensor]


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation.

    Attributes:
        name: label in metrics, and the path of the route that has it alone.
        takes: kind of its items, images [3, S, S] or latents [C, h, w].
        gives: kind of its results: latents [C, h, w], pictures [3, S, S], or router weights [L, h, w].
        run: computes a batch, and checks the values of its input.
        run_unchecked: the same without these checks, which would wait for a GPU.
    """

    name: str
    takes: Literal["images", "latents"]
    gives: Literal["latents", "pictures", "weights"]
    run: Run
    run_unchecked: Run

    @property
    def usual(self) -> "BatchKey":
        """The kind of batch of requests without options."""
        dtypes = {"latents": torch.float16, "pictures": torch.uint8, "weights": torch.float32}
        return BatchKey(self, dtype=dtypes[self.gives])

    def keys(self, tokenizer: Tokenizer) -> "list[BatchKey]":
        """Every kind of batch that the tokenizer can run, of the usual type; the usual one first."""
        if self.gives == "weights":
            return [self.usual] if tokenizer.has_router else []
        keys = [self.usual]
        if tokenizer.has_statistics and "latents" in (self.takes, self.gives):
            keys.append(replace(self.usual, normalize=True))
        if self.takes == "images":
            keys.append(replace(self.usual, latent="base"))
        return keys

    def sample(self, tokenizer: Tokenizer) -> Tensor:
        """An item that the model takes without complaint: a grey image, or a latent of zeros."""
        if self.takes == "latents":
            return torch.zeros(tokenizer.config.latent_shape)
        side = tokenizer.config.image_size
        return torch.full((3, side, side), 128, dtype=torch.uint8)

    def result_bytes(self, config: TokenizerConfig) -> int:
        """Size of one result, float32."""
        channels, *grid = config.latent_shape
        shape = {
            "latents": (channels, *grid),
            "pictures": (3, config.image_size, config.image_size),
            "weights": (len(config.fused_layers), *grid),
        }[self.gives]
        return math.prod(shape) * torch.float32.itemsize


@dataclass(frozen=True)
class BatchKey:
    """Items with equal keys can go through the model together.

    Attributes:
        operation: of all of them.
        latent: which latent is made of images.
        normalize: whether latents, in or out, are normalised per position.
        dtype: of the results: a float, or uint8 for pictures as interleaved bytes.
    """

    operation: Operation
    latent: LatentKind = "enriched"
    normalize: bool = False
    dtype: torch.dtype = torch.float32


def finished(results: Tensor, dtype: torch.dtype) -> Tensor:
    """The model's results [B, ...] in the type of a key; pictures in [0, 1] to interleaved bytes."""
    if dtype != torch.uint8:
        return results.to(dtype)
    return to_bytes(results.float()).contiguous(memory_format=torch.channels_last)


ENCODE = Operation(
    "encode",
    takes="images",
    gives="latents",
    run=lambda tokenizer, batch, key: tokenizer.encode(batch, latent=key.latent, normalize=key.normalize),
    run_unchecked=lambda tokenizer, batch, key: tokenizer.latents(batch, key.latent, key.normalize),
)
DECODE = Operation(
    "decode",
    takes="latents",
    gives="pictures",
    run=lambda tokenizer, batch, key: tokenizer.decode(batch, normalize=key.normalize),
    run_unchecked=lambda tokenizer, batch, key: tokenizer.pixels(batch, key.normalize),
)
RECONSTRUCT = Operation(
    "reconstruct",
    takes="images",
    gives="pictures",
    run=lambda tokenizer, batch, key: tokenizer.reconstruct(batch, latent=key.latent),
    run_unchecked=lambda tokenizer, batch, key: tokenizer.pixels(tokenizer.latents(batch, key.latent)),
)
ROUTE = Operation(
    "route",
    takes="images",
    gives="weights",
    run=lambda tokenizer, batch, key: tokenizer.router_weights(batch),
    run_unchecked=lambda tokenizer, batch, key: tokenizer.routing(batch),
)
OPERATIONS = (ENCODE, DECODE, RECONSTRUCT, ROUTE)
