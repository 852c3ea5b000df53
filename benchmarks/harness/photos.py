"""The photos that requests carry: JPEG files in a folder, which client and bare loop read alike."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from benchmarks.harness.provenance import ROOT
from model.images.files import fit_picture

SAMPLES = ROOT / "samples"
QUALITY = 90
MAX_PHOTOS = 64
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class PhotoError(Exception):
    """A source of photos that holds none; names it."""


def stage_photos(source: Path, side: int, folder: Path) -> list[Path]:
    """Write a source's photos as JPEG files into a folder, and give their paths.

    Args:
        source: a folder, or a tar file, of photos; the first `MAX_PHOTOS` are taken.
        side: each is cropped and resized to a square of this side, pixels; 0 leaves size and shape.
        folder: where the files go.

    Raises:
        PhotoError: there are none.
    """
    paths = []
    for number, data in enumerate(_read(source)):
        if number == MAX_PHOTOS:
            break
        path = folder / f"photo-{number:03d}.jpg"
        path.write_bytes(_as_jpeg(data, side))
        paths.append(path)
    if not paths:
        raise PhotoError(f"{source} holds no photos ({', '.join(_SUFFIXES)})")
    return paths


def read_photos(folder: Path) -> list[bytes]:
    """The files that `stage_photos` wrote."""
    return [path.read_bytes() for path in sorted(folder.glob("photo-*.jpg"))]


def _read(source: Path) -> Iterator[bytes]:
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.suffix.lower() in _SUFFIXES:
                yield path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.name.lower().endswith(_SUFFIXES) else None
                if stream is not None:
                    yield stream.read()
    except (OSError, tarfile.TarError) as exc:
        raise PhotoError(f"{source} is neither a folder nor a tar file: {exc}") from exc


def _as_jpeg(data: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(data)) as opened:
        if side == 0 and opened.format == "JPEG":
            return data
        picture = opened.convert("RGB")
    buffer = io.BytesIO()
    (fit_picture(picture, side) if side else picture).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
