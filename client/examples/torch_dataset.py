"""Latents as a PyTorch data set, encoded while one trains: ``python torch_dataset.py PHOTOS [URL]``.

Every worker process of the loader has its part of the photos, and connections of its own.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from drorae_client import Client

SUFFIXES = (".jpg", ".png", ".webp")


class EncodedPhotos(IterableDataset[torch.Tensor]):
    """Latents [C, h, w] of photos, in bfloat16."""

    def __init__(self, photos: list[Path], client: Client) -> None:
        self.photos = photos
        self.client = client

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        mine = self.photos[worker.id :: worker.num_workers] if worker else self.photos
        for latents in self.client.encode_many(mine, dtype="bfloat16"):
            yield latents.torch()[0]


def main() -> None:
    """Print the shape of every batch."""
    folder, *url = sys.argv[1:]
    photos = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    for latents_BChw in DataLoader(EncodedPhotos(photos, Client(*url)), batch_size=4, num_workers=2):
        print(tuple(latents_BChw.shape), latents_BChw.dtype)


if __name__ == "__main__":
    main()
