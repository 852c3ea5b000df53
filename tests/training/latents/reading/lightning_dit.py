"""A loader of latents as LightningDiT's ``ImgLatentDataset`` is described, written for the tests alone.

Every ``*.safetensors`` file of the folder, in the order of the names, holds ``latents`` and ``latents_flip``
[n, C, h, w] and ``labels`` [n]. ``latents_stats.pt`` holds ``mean`` and ``std`` that broadcast over
[1, C, h, w]. A sample is one of the two views by a coin, and its label.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset


class ImgLatentDataset(Dataset[tuple[Tensor, Tensor]]):
    """Random access to all rows of all files."""

    def __init__(self, data_dir: Path) -> None:
        self.places: list[tuple[Path, int]] = []
        for file in sorted(data_dir.glob("*.safetensors")):
            with safe_open(file, framework="pt", device="cpu") as opened:
                count = opened.get_slice("labels").get_shape()[0]
            self.places += [(file, row) for row in range(count)]
        statistics = torch.load(data_dir / "latents_stats.pt")
        self.mean, self.std = statistics["mean"], statistics["std"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.view(index, "latents" if torch.rand(()) > 0.5 else "latents_flip")

    def view(self, index: int, name: str) -> tuple[Tensor, Tensor]:
        """A normalised latent [C, h, w] of one view, and its label, a scalar."""
        file, row = self.places[index]
        with safe_open(file, framework="pt", device="cpu") as opened:
            latent = opened.get_slice(name)[row : row + 1]
            label = opened.get_slice("labels")[row : row + 1]
        return ((latent - self.mean) / self.std).squeeze(0), label.squeeze(0)
