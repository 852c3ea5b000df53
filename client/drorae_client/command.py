"""The ``drorae-client`` command: files to latents and pictures, by a running service."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from drorae_client.client import Client
from drorae_client.connections import DEFAULT_TIMEOUT_S, DEFAULT_URL, client_version
from drorae_client.errors import (
    OF_AN_IMAGE,
    DeadlineError,
    DroraeError,
    InputError,
    InternalError,
    OptionError,
    UnauthorizedError,
)
from drorae_client.wire.calls import FileFormat
from drorae_client.wire.results import Latents

EXIT_FAILED, EXIT_USAGE, EXIT_SOME_BROKEN, EXIT_INTERRUPTED = 1, 2, 3, 130
KEY_VARIABLE = "DRORAE_API_KEY"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PICTURE_FILES: Mapping[str, FileFormat] = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg"}
LATENT_SUFFIXES = (".safetensors", ".npy")
EPILOG = """\
examples:
  drorae-client encode photo.jpg -o latents.safetensors
  drorae-client encode photos/ -o latents/            one file per photo
  drorae-client decode latents.safetensors out.png
  drorae-client reconstruct photos/ out/

exit status: 0 done; 1 the service failed or does not answer; 2 wrong arguments or unusable input;
3 done, but for photos that could not be used
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with Client(arguments.url, api_key=os.environ.get(KEY_VARIABLE), timeout=arguments.timeout) as client:
            status: int = arguments.run(client, arguments)
            return status
    except DroraeError as error:
        return _complain(str(error), _status_of(error))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _complain(f"{name}{error.strerror or error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)


def program() -> NoReturn:
    """The ``drorae-client`` program."""
    sys.exit(main())


def encode(client: Client, arguments: argparse.Namespace) -> int:
    """Photos to one file of latents, or to a folder with one file each."""
    photos, output = _photos(arguments.inputs), arguments.output
    if output.suffix.lower() in LATENT_SUFFIXES:
        targets = None
        _check_parent(output)
    elif output.suffix and not output.is_dir():
        raise InputError(f"{output}: files of latents end in {' or '.join(LATENT_SUFFIXES)}")
    else:
        targets = _targets(photos, arguments.inputs, output, ".safetensors")
    options = {"latent": arguments.latent, "fit": arguments.fit, "dtype": arguments.dtype}
    results = client.encode_many(
        photos,
        batch=arguments.batch,
        concurrency=arguments.concurrency,
        on_error="return",
        progress=_watched(photos),
        normalize=arguments.normalize,
        **options,
    )
    encoded: list[Latents] = []
    num_done = 0
    for photo, result in zip(photos, results, strict=True):
        if isinstance(result, DroraeError):
            _skip(photo, result, len(photos))
            continue
        num_done += 1
        if targets is None:
            encoded.append(result)
        else:
            targets[photo].parent.mkdir(parents=True, exist_ok=True)
            result.save(targets[photo])
    if encoded:
        _joined(encoded).save(output)
    return _end(output, num_done, len(photos), "photo")


def decode(client: Client, arguments: argparse.Namespace) -> int:
    """A file of latents to a picture, or to a folder of numbered pictures."""
    source, output = arguments.latents, arguments.output
    if source.suffix.lower() == ".npy":
        try:
            latents = Latents(array=np.load(source, allow_pickle=False))
        except ValueError as exc:
            raise InputError(f"{source}: no whole .npy file of numbers") from exc
    else:
        latents = Latents.load(source)
    items = latents.split() if latents.array.ndim == 4 else [latents]
    if len(items) == 1 and output.suffix:
        files = _picture_files(output)
        _check_parent(output)
        output.write_bytes(client.decode(items[0], normalize=arguments.normalize, files=files).files[0])
        return _end(output, 1, 1, "picture")
    if output.suffix and not output.is_dir():
        raise InputError(f"{output}: {len(items)} pictures need a folder")
    output.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(len(items)), unit="picture", disable=not _watched(items)):
        pictures = client.decode(items[number], normalize=arguments.normalize, files="png")
        (output / f"{number:04d}.png").write_bytes(pictures.files[0])
    return _end(output, len(items), len(items), "picture")


def reconstruct(client: Client, arguments: argparse.Namespace) -> int:
    """Photos to latents and back, with PSNR and SSIM."""
    photos, output = _photos([arguments.input]), arguments.output
    if arguments.input.is_dir():
        targets = _targets(photos, [arguments.input], output, ".png")
    else:
        target = output / f"{arguments.input.stem}.png" if output.is_dir() else output
        _check_parent(target)
        targets = {photos[0]: target}
    formats = {photo: _picture_files(target) for photo, target in targets.items()}
    num_done = 0
    for photo in tqdm(photos, unit="photo", disable=not _watched(photos)):
        try:
            pictures = client.reconstruct(
                photo, latent=arguments.latent, fit=arguments.fit, files=formats[photo]
            )
        except OF_AN_IMAGE as error:
            _skip(photo, error, len(photos))
            continue
        num_done += 1
        targets[photo].parent.mkdir(parents=True, exist_ok=True)
        targets[photo].write_bytes(pictures.files[0])
        tqdm.write(f"{photo}: PSNR {pictures.psnr[0]:.2f} dB, SSIM {pictures.ssim[0]:.4f}")
    return _end(output, num_done, len(photos), "photo")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drorae-client",
        description=f"Photos to latents and back, by a DRoRAE service, whose key {KEY_VARIABLE} holds.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=client_version())
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", default=DEFAULT_URL, help="of the service (default: %(default)s)")
    common.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds per request, over all its attempts (default: %(default)g)",
    )
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--latent", choices=("enriched", "base"), default="enriched", help="which latent")
    images.add_argument(
        "--fit", choices=("crop", "pad", "stretch"), default="crop", help="how a photo becomes square"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("encode", parents=[common, images], help="photos to latents")
    one.add_argument("inputs", type=Path, nargs="+", metavar="IN", help="photos, and folders of them")
    one.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors or .npy file for all, held in memory; or a folder for one file per photo",
    )
    one.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    one.add_argument("--normalize", action="store_true", help="normalise per position")
    one.add_argument("--batch", type=int, default=8, metavar="N", help="photos per request (default 8)")
    one.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default 8)")
    one.set_defaults(run=encode)

    one = commands.add_parser("decode", parents=[common], help="latents to pictures")
    one.add_argument("latents", type=Path, metavar="LATENTS", help="a .safetensors or .npy file")
    one.add_argument("output", type=Path, metavar="OUT", help="a .png or .jpg file; a folder for several")
    one.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="whether the latents are normalised (default: as the file says, else not)",
    )
    one.set_defaults(run=decode)

    one = commands.add_parser("reconstruct", parents=[common, images], help="photos to latents and back")
    one.add_argument("input", type=Path, metavar="IN", help="a photo, or a folder of them")
    one.add_argument("output", type=Path, metavar="OUT", help="a .png or .jpg file; of a folder a folder")
    one.set_defaults(run=reconstruct)
    return parser


def _photos(inputs: Sequence[Path]) -> list[Path]:
    """Files as they are given, and those of folders and their subfolders that end as photos do."""
    photos: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path}: No such file or directory")
        if not path.is_dir():
            photos.append(path)
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PHOTO_SUFFIXES)
        if not found:
            raise InputError(f"{path}: the folder holds no photos ({', '.join(PHOTO_SUFFIXES)})")
        photos += found
    return photos


def _targets(photos: Sequence[Path], inputs: Sequence[Path], folder: Path, suffix: str) -> dict[Path, Path]:
    """A file of the folder for each photo, named as the photo is, below the folder that was given."""
    folder.mkdir(parents=True, exist_ok=True)
    roots = [path for path in inputs if path.is_dir()]
    targets: dict[Path, Path] = {}
    for photo in photos:
        root = next((root for root in roots if photo.is_relative_to(root)), photo.parent)
        targets[photo] = (folder / photo.relative_to(root)).with_suffix(suffix)
    if len(set(targets.values())) < len(targets):
        raise InputError(f"{folder}: two photos have the same name; encode them into folders of their own")
    return targets


def _joined(encoded: Sequence[Latents]) -> Latents:
    first = encoded[0]
    return Latents(
        array=np.concatenate([latents.array for latents in encoded]),
        dtype=first.dtype,
        latent=first.latent,
        normalized=first.normalized,
        model=first.model,
        checkpoint_sha256=first.checkpoint_sha256,
    )


def _picture_files(path: Path) -> FileFormat:
    files = PICTURE_FILES.get(path.suffix.lower())
    if files is None:
        raise InputError(f"{path}: a picture ends in one of {', '.join(PICTURE_FILES)}")
    return files


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")


def _watched(items: Sequence[object]) -> bool:
    """Whether a person looks on, and there is something to see."""
    return len(items) > 1 and sys.stderr.isatty()


def _skip(photo: Path, error: DroraeError, num_photos: int) -> None:
    """Name a photo that could not be used, or fail where it is the only one."""
    if num_photos == 1 or isinstance(error, OptionError | DeadlineError):
        raise type(error)(f"{photo}: {error.detail}", error.request_id) from error
    tqdm.write(f"drorae-client: skipped {photo}: {error}", file=sys.stderr)


def _end(output: Path, num_done: int, num_all: int, unit: str) -> int:
    if num_done == 0:
        return _complain(f"none of the {num_all} {unit}s could be used", EXIT_FAILED)
    print(f"{output}: {num_done} {unit}{'s' if num_done > 1 else ''}")
    return EXIT_SOME_BROKEN if num_done < num_all else 0


def _status_of(error: DroraeError) -> int:
    is_usage = isinstance(error, (*OF_AN_IMAGE, UnauthorizedError))
    return EXIT_USAGE if is_usage and not isinstance(error, InternalError | DeadlineError) else EXIT_FAILED


def _complain(sentence: str, status: int) -> int:
    print(f"drorae-client: {' '.join(sentence.split())}", file=sys.stderr)
    return status
