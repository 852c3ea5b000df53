"""The format of an answer: ``?format=`` first, then ``Accept`` with its q-values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.errors import NotAcceptableError

SAFETENSORS = "application/x-safetensors"
NPY = "application/x-npy"
JSON = "application/json"
RAW = "tensor/binary"
ZIP = "application/zip"
PNG = "image/png"
JPEG = "image/jpeg"
WEBP = "image/webp"

FORMAT_MEDIA_TYPES: Mapping[str, str] = {
    "safetensors": SAFETENSORS,
    "npy": NPY,
    "json": JSON,
    "raw": RAW,
    "zip": ZIP,
    "png": PNG,
    "jpeg": JPEG,
    "jpg": JPEG,
    "webp": WEBP,
}
"""Media type of each value of ``?format=``."""

LATENT_MEDIA_TYPES = (SAFETENSORS, NPY, JSON, RAW)
"""Formats of latents, the default first."""

PICTURE_MEDIA_TYPES = (PNG, JPEG, WEBP, ZIP, SAFETENSORS, NPY, JSON, RAW)
"""Formats of pictures, the default first."""


@dataclass(frozen=True)
class MediaRange:
    """One entry of an Accept header, such as ``image/*;q=0.5``."""

    kind: str
    subtype: str
    quality: float

    def matches(self, media_type: str) -> bool:
        """Whether the media type, written without parameters, is in the range."""
        kind, _, subtype = media_type.partition("/")
        return self.kind in ("*", kind) and self.subtype in ("*", subtype)

    @property
    def specificity(self) -> int:
        """0 for ``*/*``, 1 for ``image/*``, 2 for ``image/png``; the most specific entry decides."""
        return (self.kind != "*") + (self.subtype != "*")


def choose(format_name: str | None, accept: str | None, offered: Sequence[str]) -> str:
    """The media type of the answer.

    Args:
        format_name: value of ``?format=``, which wins.
        accept: the Accept header; None or empty accepts anything.
        offered: the formats of the route, the default first.

    Raises:
        NotAcceptableError: Accept allows nothing that is offered.
    """
    if format_name is not None:
        return FORMAT_MEDIA_TYPES[format_name]
    if accept is None or not accept.strip():
        return offered[0]
    ranges = [parsed for entry in accept.split(",") if (parsed := parse_range(entry)) is not None]
    best = max(offered, key=lambda media_type: _quality(media_type, ranges))  # ties: the earliest
    if _quality(best, ranges) <= 0:
        raise NotAcceptableError(
            f"Nothing in 'Accept: {accept[:200]}' can be produced; offered: {', '.join(offered)}."
        )
    return best


def parse_range(entry: str) -> MediaRange | None:
    """One entry of Accept, or None where it cannot be read."""
    media_type, *parameters = (part.strip() for part in entry.lower().split(";"))
    kind, slash, subtype = media_type.partition("/")
    if not (kind and slash and subtype) or (kind == "*" and subtype != "*"):
        return None
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                return None
    return MediaRange(kind, subtype, quality) if 0 <= quality <= 1 else None


def _quality(media_type: str, ranges: Sequence[MediaRange]) -> float:
    matching = [entry for entry in ranges if entry.matches(media_type)]
    return max(matching, key=lambda entry: entry.specificity).quality if matching else 0.0
