"""A latents folder in the layouts of other people's trainers: WebDataset tars, and EDM2's folder of arrays.

An export is made in units, each written under a temporary name and renamed, so one that was cut off goes on
with the units that are missing. ``export.json`` holds which folder it came from, and is there from the start.

Shape legend: C latent channels, h w latent grid.
"""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.errors import LatentsError
from training.latents.reading.folder import LatentFolder
from training.latents.units import NO_LABEL
from training.output.files import write_atomically, write_json

SOURCE_FILE = "export.json"
LABELS_FILE = "dataset.json"
ROWS_PER_FOLDER = 1000  # EDM2's

Progress = Callable[[int], Any]
"""Told the rows that are done."""


def export_webdataset(folder: LatentFolder, output: Path, progress: Progress) -> None:
    """One tar per shard: ``KEY.npy`` [C, h, w] and ``KEY.cls`` per sample, ``KEY.flip.npy`` of mirror images.

    WebDataset takes a name up to its first dot as the key, so dots of a key become ``%2E``. A key that
    a shard has twice gets its row's number behind it. A sample without a class has no ``.cls``.

    Raises:
        LatentsError: the output is another export's, or a shard is damaged.
        OSError: it cannot be written.
    """
    _begin(folder, output, "webdataset")
    for number, rows in enumerate(folder.shard_ranges):
        file = output / f"latents-{number:06d}.tar"
        if not file.exists():
            write_atomically(file, _tar(folder, number))
        progress(len(rows))


def export_npy(folder: LatentFolder, output: Path, progress: Progress) -> None:
    """EDM2's folder, which REPA reads: ``00012/img-mean-std-00012345.npy`` [2 C, h, w] and ``dataset.json``.

    These trainers draw a latent from a mean and a standard deviation along the channels. Our latents are
    exact, so the deviations are zeros. Mirror images have no place in it. ``dataset.json`` holds the labels
    (null unless every sample has one) and, beside what they read, the samples' names.

    Raises:
        LatentsError: the output is another export's, or a shard is damaged.
        OSError: it cannot be written.
    """
    _begin(folder, output, "npy")
    for start in range(0, len(folder), ROWS_PER_FOLDER):
        rows = range(start, min(start + ROWS_PER_FOLDER, len(folder)))
        target = output / _array_name(start).partition("/")[0]
        if not target.exists():
            _write_arrays(folder, rows, target)
        progress(len(rows))
    _write_labels(folder, output / LABELS_FILE)


def _begin(folder: LatentFolder, output: Path, layout: str) -> None:
    """Claim the output for this export, or find that an export of the same folder began it."""
    source = json.dumps({"layout": layout, "latents_sha256": folder.digest}).encode()
    file = output / SOURCE_FILE
    if file.exists():
        if file.read_bytes() != source:
            raise LatentsError(f"{output}: holds an export of other latents or in another layout")
        return
    if output.exists() and any(output.iterdir()):
        raise LatentsError(f"{output}: the folder is not empty and no export: name a new one")
    write_atomically(file, source)


def _tar(folder: LatentFolder, shard: int) -> bytes:
    buffer = io.BytesIO()
    views, labels = folder.shard_views(shard), folder.shard_labels(shard)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, latents, label in zip(_member_names(folder, shard), views, labels, strict=True):
            for suffix, latent in zip(("npy", "flip.npy"), latents, strict=False):
                _add(archive, f"{name}.{suffix}", _npy(latent))
            if label != NO_LABEL:
                _add(archive, f"{name}.cls", str(label).encode())
    return buffer.getvalue()


def _member_names(folder: LatentFolder, shard: int) -> list[str]:
    keys, rows = folder.shard_keys(shard), folder.shard_ranges[shard]
    uses = Counter(keys)
    return [
        _without_dots(key if uses[key] == 1 else f"{key}-{row}") for row, key in zip(rows, keys, strict=True)
    ]


def _without_dots(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}{name.replace('.', '%2E')}"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without owner and time: the same latents give the same bytes
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _write_arrays(folder: LatentFolder, rows: Sequence[int], target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for row, latent in zip(rows, folder.rows(rows).latents, strict=True):
        moments = torch.cat([latent, torch.zeros_like(latent)])
        (partial / Path(_array_name(row)).name).write_bytes(_npy(moments))
    os.replace(partial, target)


def _write_labels(folder: LatentFolder, file: Path) -> None:
    labels = folder.labels()
    keys = [key for shard in range(len(folder.shard_ranges)) for key in folder.shard_keys(shard)]
    files = [_array_name(row) for row in range(len(folder))]
    table = None if NO_LABEL in labels else list(zip(files, labels, strict=True))
    write_json(file, {"labels": table, "names": dict(zip(files, keys, strict=True))})


def _array_name(row: int) -> str:
    return f"{row // ROWS_PER_FOLDER:05d}/img-mean-std-{row:08d}.npy"


def _npy(latent: Tensor) -> bytes:
    """A .npy file; the format has no bfloat16, which becomes float32."""
    buffer = io.BytesIO()
    wide = latent.float() if latent.dtype == torch.bfloat16 else latent
    np.save(buffer, wide.numpy(), allow_pickle=False)
    return buffer.getvalue()
