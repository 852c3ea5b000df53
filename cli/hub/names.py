"""Short names of published models, and the files of a repository that an import reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from cli.errors import UsageError

RAE_FILES = "nyu-visionx/RAE-collections"
CONFIGURATIONS = frozenset({"config.json", "preprocessor_config.json"})
# Pickled weights, by the names that transformers, diffusers and RAE give them: the first that there are, and
# only where no safetensors lie beside them.
PICKLED_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "diffusion_pytorch_model.bin",
    "model.pt",
)
STATISTICS = "stat.pt"
# The same weights in another precision or of another kind, beside those that a loader takes by default.
VARIANT = re.compile(r"\.(fp16|bf16|non_ema)[.-]")


@dataclass(frozen=True)
class Source:
    """A published model with a name of its own."""

    repository: str
    files: tuple[str, ...] = ()
    """What to take of the repository; nothing stands for what `choose_files` finds."""
    encoder: str | None = None
    """The source of the frozen encoder, where the files are a decoder alone."""


def _rae(encoder: str, folder: str, statistics: str) -> Source:
    return Source(RAE_FILES, (f"decoders/{folder}/model.pt", f"stats/{statistics}/{STATISTICS}"), encoder)


SOURCES: dict[str, Source] = {
    # Frozen encoders, as transformers saves them.
    "dinov2-s": Source("facebook/dinov2-with-registers-small"),
    "dinov2-b": Source("facebook/dinov2-with-registers-base"),
    "dinov2-l": Source("facebook/dinov2-with-registers-large"),
    "dinov2-g": Source("facebook/dinov2-with-registers-giant"),
    "dinov2-s-no-registers": Source("facebook/dinov2-small"),
    "dinov2-b-no-registers": Source("facebook/dinov2-base"),
    "dinov2-l-no-registers": Source("facebook/dinov2-large"),
    "dinov2-g-no-registers": Source("facebook/dinov2-giant"),
    "siglip2-b": Source("google/siglip2-base-patch16-256"),
    "siglip2-l": Source("google/siglip2-large-patch16-256"),
    "siglip2-so400m": Source("google/siglip2-so400m-patch16-256"),
    "mae-b": Source("facebook/vit-mae-base"),
    "mae-l": Source("facebook/vit-mae-large"),
    # Whole autoencoders (phase 1), as diffusers' AutoencoderRAE saves them.
    "rae-dinov2-s": Source("nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08"),
    "rae-dinov2-b": Source("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"),
    "rae-dinov2-b-512": Source("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512"),
    "rae-dinov2-l": Source("nyu-visionx/RAE-dinov2-wReg-large-ViTXL-n08"),
    "rae-siglip2-b": Source("nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08"),
    "rae-mae-b": Source("nyu-visionx/RAE-mae-base-p16-ViTXL-n08"),
    # The same decoders with their statistics, as RAE's own code saves them.
    "rae-decoder-dinov2-s": _rae("dinov2-s", "dinov2/wReg_small/ViTXL_n08", "dinov2/wReg_small/imagenet1k"),
    "rae-decoder-dinov2-b": _rae("dinov2-b", "dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k"),
    "rae-decoder-dinov2-b-512": _rae(
        "dinov2-b", "dinov2/wReg_base/ViTXL_n08_i512", "dinov2/wReg_base/imagenet1k_512"
    ),
    "rae-decoder-dinov2-l": _rae("dinov2-l", "dinov2/wReg_large/ViTXL_n08", "dinov2/wReg_large/imagenet1k"),
    "rae-decoder-siglip2-b": _rae(
        "siglip2-b", "siglip2/base_p16_i256/ViTXL_n08", "siglip2/base_p16_i256/ImageNet1k"
    ),
    "rae-decoder-mae-b": _rae("mae-b", "mae/base_p16/ViTXL_n08", "mae/base_p16/ImageNet1k"),
}


def choose_files(repository: str, files: Sequence[str], include: Sequence[str] = ()) -> list[str]:
    """The files of a repository to download.

    Without patterns: configurations, weights and statistics of the repository's root, or of its only folder
    with weights. Safetensors go before pickled twins and variants of lower precision, which are left out.

    Args:
        repository: its name, for errors.
        files: every path in it, with ``/``.
        include: patterns of whole paths (``*``, ``?`` and ``[]``; a folder stands for all below it), instead.

    Raises:
        UsageError: a pattern that no file matches, no weights, or several models to choose from.
    """
    if include:
        return _matching(repository, files, include)
    folders = sorted({_folder(file) for file in files if _is_weights(file)})
    if not folders:
        raise UsageError(
            f"{repository}: has no weights that drorae can import (*.safetensors, "
            f"{', '.join(PICKLED_WEIGHTS)}): name the files to download by --include"
        )
    if "." not in folders and len(folders) > 1:
        shown = ", ".join(folders[:4]) + (", ..." if len(folders) > 4 else "")
        known = [name for name, source in SOURCES.items() if source.repository == repository]
        short = f", or pull one by its name: {', '.join(known)}" if known else ""
        raise UsageError(
            f"{repository}: holds {len(folders)} models ({shown}): choose by --include FOLDER/{short}"
        )
    chosen = "." if "." in folders else folders[0]
    return _needed([file for file in files if _folder(file) == chosen])


def parse_target(target: str) -> tuple[str, str | None]:
    """``REPO[@REVISION]`` as name and revision.

    Raises:
        UsageError: a part is empty.
    """
    name, separator, revision = target.partition("@")
    if not name or (separator and not revision):
        raise UsageError(f"{target}: expected REPO or REPO@REVISION")
    return name, revision or None


def _matching(repository: str, files: Sequence[str], include: Sequence[str]) -> list[str]:
    matches = {pattern: filter_names(files, pattern + "*" * pattern.endswith("/")) for pattern in include}
    for pattern, found in matches.items():
        if not found:
            raise UsageError(f"{repository}: has no file {pattern} (--include takes whole paths, * and ?)")
    return [file for file in files if any(file in found for found in matches.values())]


def _needed(files: Sequence[str]) -> list[str]:
    """Of one folder's files."""
    names = {PurePosixPath(file).name for file in files}
    tensors = {name for name in names if name.endswith(".safetensors")}
    weights = {name for name in tensors if not VARIANT.search(name)} or tensors
    for pattern in PICKLED_WEIGHTS:
        weights = weights or {name for name in names if fnmatchcase(name, pattern)}
    suffix = ".safetensors.index.json" if tensors else ".bin.index.json"
    indexes = {name for name in names if name.endswith(suffix) and not VARIANT.search(name)}
    wanted = weights | indexes | (names & CONFIGURATIONS) | (names & {STATISTICS})
    return [file for file in files if PurePosixPath(file).name in wanted]


def _is_weights(file: str) -> bool:
    name = PurePosixPath(file).name
    return name.endswith(".safetensors") or any(fnmatchcase(name, known) for known in PICKLED_WEIGHTS)


def _folder(file: str) -> str:
    return str(PurePosixPath(file).parent)
