"""Names of files: which ones are images or shards, and how names are shown."""

import os
from pathlib import PurePath

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_OTHER_PICTURES = frozenset(
    {
        ".avif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jxl",
        ".dng",
        ".cr2",
        ".nef",
        ".arw",
        ".psd",
        ".svg",
        ".tga",
    }
)

# Why something is left out of a listing.
NOT_AN_IMAGE = "no image by its name"
OTHER_FORMAT = "picture in a format that is not read"
HIDDEN = "hidden (its name begins with a dot)"
DANGLING = "link without a target"
NOT_A_FILE = "neither a file nor a folder"
LISTED_ALREADY = "link to a folder that is listed already"
UNREADABLE = "folder that cannot be read"
COMPANION = "picture beside the image of the same sample"
FOLDER_LINK = "link in a tar that may lead to a folder"
SPARSE = "sparse file in a tar"
NO_JSON = "damaged JSON, which gives its sample no label"
REPLACED = "replaced by a later member of the same name"


def printable(name: str) -> str:
    """A name as text that every report, log and terminal takes; other characters and bytes are escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def is_tar(path: PurePath) -> bool:
    """Whether a file is a shard by its name."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def reason_to_leave_out(name: str) -> str | None:
    """Why a file of this name is no image; None if it is one."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return HIDDEN if os.path.basename(name).startswith(".") else None
    return OTHER_FORMAT if suffix in _OTHER_PICTURES else NOT_AN_IMAGE
