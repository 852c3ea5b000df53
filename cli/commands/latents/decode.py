"""``drorae decode``: a file of latents to pictures.

Shape legend: N latents, C h w one latent.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor

from cli import files
from cli.errors import EXIT_OK, UsageError
from cli.latents import open_named
from cli.options import Subparsers, add_command, add_settings, read_settings, whole_number
from model.tokenizer import Tokenizer
from service.codecs import tensors
from service.codecs.media_types import JSON, NPY, SAFETENSORS
from service.codecs.requests import LatentBatch, Payload, read_latents
from service.codecs.schemas import DecodeOptions
from service.engine.devices import load_tokenizer
from service.errors import ServiceError

MEDIA_TYPES = {".safetensors": SAFETENSORS, ".npy": NPY, ".json": JSON}
EXAMPLES = """\
  drorae decode latents.safetensors out.png
  drorae decode latents.npy pictures/            one numbered PNG each
  drorae decode latents/ out.png --key n01440764/n01440764_10026
  drorae decode latents/latents-000000.safetensors pictures/ --row 0 17
  curl --data-binary @photo.jpg http://127.0.0.1:8000/encode -o l.safetensors
  drorae decode l.safetensors out.jpg
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "decode",
        run,
        "a file of latents to pictures",
        "Decode latents of this checkpoint, [N, C, h, w] or [C, h, w]: a file of `drorae encode` or\n"
        "`generate`, an answer of the service to /encode, or some of a folder of `drorae tokenize` or of\n"
        "one of its files. Latents that say they are of another checkpoint are refused.",
        EXAMPLES,
    )
    parser.add_argument(
        "latents",
        type=Path,
        metavar="LATENTS",
        help="a .safetensors (tensor 'latents'), .npy or .json file, or a folder of latents; - for stdin",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="the picture (.png, .jpg, .webp; - for PNG on stdout), or a folder for 0000.png, 0001.png, ...",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether the latents are normalised per position (default: as the file says, else not)",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--row", type=whole_number, nargs="+", metavar="N", help="these latents alone, counted from 0"
    )
    chosen.add_argument("--key", nargs="+", metavar="NAME", help="the latents of these names alone")
    add_settings(parser, ("checkpoint", "device", "batch_size"))


def run(arguments: argparse.Namespace) -> int:
    """Decode all latents of the file."""
    # Latents are past the fusion: preparing one would be for nothing, and may be impossible here.
    settings = read_settings(arguments).model_copy(update={"fusion": "reference"})
    output: Path = arguments.output
    is_picture = output == files.STANDARD_STREAM or (
        output.suffix.lower() in files.PICTURE_FORMATS and not output.is_dir()
    )
    if is_picture:
        files.check_output_file(output, files.PICTURE_FORMATS)
    elif output.suffix and not output.exists():
        raise UsageError(f"{output}: a picture ends in one of {', '.join(files.PICTURE_FORMATS)}")
    data = _read_chosen(arguments.latents, arguments.row, arguments.key)
    tokenizer = load_tokenizer(settings)
    batch = _read(arguments.latents, data, arguments.normalize, tokenizer)
    if is_picture and len(batch.latents) > 1:
        raise UsageError(f"{output}: there are {len(batch.latents)} latents, so the output must be a folder")
    targets = [output] if is_picture else _numbered(output, len(batch.latents))
    done = 0
    for paths in files.batches(targets, settings.batch_size, "decode"):
        pictures = _decode(batch, slice(done, done + len(paths)), tokenizer)
        for path, pixels in zip(paths, pictures, strict=True):
            files.write_picture_file(path, pixels)
        done += len(paths)
    plural = "s" if done > 1 else ""
    files.say(f"{output}: {done} picture{plural} of {tokenizer.config.image_size} pixels", output)
    return EXIT_OK


def _read_chosen(path: Path, rows: list[int] | None, keys: list[str] | None) -> bytes:
    """A file of latents, as it is or with some of them alone."""
    named = open_named(path)
    if named is None:
        if rows or keys:
            raise UsageError(
                f"{path}: --row and --key are for folders and files that hold names (of drorae tokenize, "
                "encode or generate)"
            )
        return files.read_file(path)
    if rows is None and keys is None and path.is_dir():
        raise UsageError(f"{path}: the folder has {named.count} latents: choose some by --row or --key")
    chosen = [named.row_of(key) for key in keys] if keys else rows or range(named.count)
    if not chosen:
        raise UsageError(f"{path}: holds no latents: none of its images could be read")
    if outside := [row for row in chosen if row >= named.count]:
        raise UsageError(f"{path}: --row {outside[0]}: there are {named.count} latents, counted from 0")
    return named.take(chosen)


def _read(path: Path, data: bytes, normalize: bool | None, tokenizer: Tokenizer) -> LatentBatch:
    options = DecodeOptions(normalize=normalize)
    try:
        return read_latents(Payload(data, ""), _kind(path, data), options, tokenizer, sys.maxsize)
    except ServiceError as exc:
        raise UsageError(f"{path}: {exc.detail}") from exc


def _kind(path: Path, data: bytes) -> str:
    """Format by the suffix, or by the first bytes where it names none."""
    known = MEDIA_TYPES.get(path.suffix.lower())
    if known is not None:
        return known
    if data.startswith(tensors.NPY_MAGIC):
        return NPY
    if tensors.looks_like_safetensors(data):
        return SAFETENSORS
    raise UsageError(f"{path}: not a file of latents ({', '.join(MEDIA_TYPES)})")


def _numbered(folder: Path, count: int) -> list[Path]:
    files.make_folder(folder)
    return [folder / f"{index:04d}{files.DEFAULT_PICTURE_SUFFIX}" for index in range(count)]


def _decode(batch: LatentBatch, part: slice, tokenizer: Tokenizer) -> Tensor:
    return tokenizer.decode(batch.latents[part], batch.normalized).float().cpu()
