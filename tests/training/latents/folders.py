"""Folders of latents for the tests: encoded by a tokenizer from pictures, as ``drorae tokenize`` does."""

from pathlib import Path
from typing import Any

import torch

from model.tokenizer import Tokenizer
from tests.training.conftest import encode_png, make_image
from training.evaluation.moments import PointwiseMoments
from training.latents.encoding import decode_unit, encode_unit, latent_encoder
from training.latents.manifest import Identity, Manifest, write_manifest
from training.latents.shards import read_tensors, write_statistics
from training.latents.store import FolderStore
from training.latents.units import NO_LABEL, Unit, UnitImage

CLASSES = ("ant", "bee", "cat")


def make_latents(
    tokenizer: Tokenizer,
    directory: Path,
    count: int = 12,
    per_shard: int = 5,
    broken: int | None = None,
    has_labels: bool = True,
    **identity_fields: Any,
) -> Path:
    """Latents of pictures ``make_image(0)`` and so on, named ``more/00`` and so on, of three classes in turn.

    Args:
        tokenizer: loaded from a checkpoint.
        directory: of the folder; the pictures lie beside it.
        count: pictures.
        per_shard: pictures per file.
        broken: number of a picture that cannot be read.
        has_labels: whether the pictures have classes.
        identity_fields: other than the defaults.
    """
    assert tokenizer.checkpoint is not None
    fields = {
        "model": tokenizer.config.name,
        "checkpoint_sha256": tokenizer.checkpoint.sha256,
        "latent": "enriched",
        "normalized": False,
        "dtype": "float32",
        "shape": tokenizer.config.latent_shape,
        "flip": False,
        "fit": "crop",
        "image_size": tokenizer.config.image_size,
        "precision": "float32",
        "batch_size": 4,
        "images_per_shard": per_shard,
    }
    identity, store = Identity(**{**fields, **identity_fields}), FolderStore(directory)
    pictures = directory.with_name(f"{directory.name}-pictures")
    pictures.mkdir()
    images = []
    for index in range(count):
        file = pictures / f"{index:02d}.png"
        file.write_bytes(b"no picture" if index == broken else encode_png(make_image(index)))
        label = index % 3 if has_labels else NO_LABEL
        images.append(UnitImage(f"more/{index:02d}", str(file), None, None, label))
    encoder, moments = latent_encoder(tokenizer, identity), PointwiseMoments(identity.shape)
    records = []
    for start in range(0, count, per_shard):
        unit = Unit(len(records), "pictures", start, tuple(images[start : start + per_shard]))
        batches = decode_unit(unit, identity)
        records.append(encode_unit(unit, batches, encoder, identity, torch.device("cpu"), store))
        views = [name for name in ("latents", "latents_flip")[: 1 + identity.flip]]
        for latents in read_tensors(store, unit.file_name, views).values():
            moments.update(latents)
    write_statistics(store, moments, identity.flip)
    manifest = Manifest(identity=identity, inputs=(), classes=CLASSES if has_labels else (), complete=False)
    write_manifest(store, manifest.with_shards(records, complete=True))
    return directory
