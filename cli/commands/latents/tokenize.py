"""``drorae tokenize``: a data set to a folder of latents."""

import argparse

from cli.errors import CommandError, UsageError
from cli.files import add_image_options
from cli.options import Subparsers, add_command, add_settings, positive_int, read_settings, whole_number

DTYPES = ("float16", "bfloat16", "float32")
EXAMPLES = """\
  drorae tokenize imagenet/train --output latents
  drorae tokenize shards/*.tar --output latents --dtype bfloat16 --flip
  drorae tokenize list.txt --output latents --dry-run
  srun drorae tokenize imagenet/train --output latents --shard $SLURM_PROCID/$SLURM_NTASKS
"""
DESCRIPTION = """\
Encode a data set into a folder of latents: safetensors files of about 1,000 images, the exact mean and
variance of the latents, and manifest.json. Every GPU or core is used.

DATA are folders (classes from class folders), WebDataset tars (.tar, .tar.gz; labels from .cls or .json) and
lists (.txt or .tsv: a path a line, relative to the list, then a tab and a label if there is one).

A command that was cut off goes on where it was when it is given again, and any number of commands may share
the work by --shard. The files are the same, byte for byte, whoever makes them. An image that cannot be read
is recorded and skipped.

exit status: 0 done, 3 done but for images that could not be read, 1 the operation failed (a full disk, a
process that ended again and again), 2 wrong arguments or unusable input (another checkpoint, other options
or other data than those that the folder was made with)"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "tokenize", run, "a data set to a folder of latents", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="folders, tars and lists of images, or their URLs"
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of latents, or its URL")
    add_image_options(parser)
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="normalise per position by the checkpoint's statistics (drorae info says if it has any)",
    )
    parser.add_argument("--flip", action="store_true", help="also encode the mirror image of each image")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="type of the stored numbers (default float16)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="in which the tokenizer runs (default auto: bfloat16 on GPUs, float32 on CPUs)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="images at once (default 64 on GPUs, 8 on CPUs)"
    )
    _add_work_options(parser)
    add_settings(parser, ("checkpoint", "device", "fusion"))


def _add_work_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument(
        "--shard",
        type=part,
        default=(0, 1),
        metavar="i/n",
        help="do the i-th of n equal parts, from 0; n commands fill one folder",
    )
    group.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="processes: that decode images for GPUs, or that decode and encode (default: one per core)",
    )
    group.add_argument("--verify", action="store_true", help="reread all files, and make bad ones again")
    group.add_argument("--retry-broken", action="store_true", help="try images again that could not be read")
    group.add_argument(
        "--max-broken",
        type=whole_number,
        default=10_000,
        metavar="N",
        help="give up once more than N images could not be read (default 10000)",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="encode on a Ray cluster: host:port, auto (this machine's), or local (one that is started here)",
    )
    group.add_argument(
        "--hang-limit",
        type=positive_int,
        default=1800,
        metavar="S",
        help="with --ray: replace an actor that finishes nothing for S seconds (default 1800)",
    )
    group.add_argument("--dry-run", action="store_true", help="print size, room and time, and write nothing")


def part(text: str) -> tuple[int, int]:
    """An argument ``i/n`` with 0 <= i < n."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected i/n with i from 0 to n - 1, such as 0/4, not {text!r}")
    return int(index), int(count)


def run(arguments: argparse.Namespace) -> int:
    """Encode; 3 when some images could not be read."""
    settings = read_settings(arguments)
    try:
        from service.engine.devices import visible_devices
        from training.latents.storage.places import as_place
        from training.latents.tokenize import TokenizeOptions, tokenize_command
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"tokenize needs the package {exc.name!r}: pip install 'drorae[training]'"
        ) from exc
    output = as_place(arguments.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, and a folder is to be written")
    options = TokenizeOptions(
        data=[as_place(text) for text in arguments.data],
        output=output,
        checkpoint=settings.checkpoint,
        devices=visible_devices(settings.device),
        fusion=settings.fusion,
        batch_size=arguments.batch_size,
        latent=arguments.latent,
        normalize=arguments.normalize,
        dtype=arguments.dtype,
        precision=arguments.precision,
        fit=arguments.fit,
        flip=arguments.flip,
        part=arguments.shard,
        num_workers=arguments.workers,
        max_broken=arguments.max_broken,
        verify=arguments.verify,
        retry_broken=arguments.retry_broken,
        dry_run=arguments.dry_run,
    )
    if arguments.ray is None:
        return tokenize_command(options)
    try:
        from training.latents.on_ray.engine import ClusterOptions, tokenize_on_ray
    except ModuleNotFoundError as exc:
        raise CommandError(f"--ray needs the package {exc.name!r}: pip install 'drorae[ray]'") from exc
    return tokenize_on_ray(options, ClusterOptions(arguments.ray, arguments.hang_limit))
