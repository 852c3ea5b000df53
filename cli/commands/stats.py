"""``drorae stats``: mean and variance of the latents per position, stored in a checkpoint."""

import argparse
from pathlib import Path

from cli.errors import CommandError
from cli.options import (
    Subparsers,
    add_command,
    add_photos,
    add_settings,
    add_workers,
    check_photos,
    read_settings,
)

EXAMPLES = """\
  drorae stats runs/phase3/checkpoint --data imagenet/train --in-place
  drorae stats mini --data photos/ more.tar --output mini-with-statistics
  torchrun --nproc-per-node 8 --no-python drorae stats CHECKPOINT --data imagenet/train --output NEW
"""
DESCRIPTION = """\
Measure the exact mean and variance of every position of the latents over all photos, and store
them in the checkpoint for normalize=true. The weights and the provenance stay as they are. A
command that was cut off continues where it was when it is given again, on any number of ranks.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "stats", run, "measure and store the latents' statistics", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("positional", metavar="CHECKPOINT", help="a directory or a bundled name")
    add_photos(parser)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--output", type=Path, metavar="CKPT", help="checkpoint to write")
    target.add_argument("--in-place", action="store_true", help="rewrite CHECKPOINT itself, atomically")
    add_workers(parser)
    add_settings(parser, ("device", "batch_size"))


def run(arguments: argparse.Namespace) -> int:
    """Measure; gives the exit status."""
    check_photos(arguments.data)
    settings = read_settings(arguments)
    try:
        from model.checkpoints.tokenizers import resolve_checkpoint
        from training.evaluation.latent_statistics import StatisticsOptions, statistics_command
    except ModuleNotFoundError as exc:
        raise CommandError(f"stats needs the package {exc.name!r}: pip install 'drorae[training]'") from exc
    output = resolve_checkpoint(arguments.positional) if arguments.in_place else arguments.output
    return statistics_command(
        StatisticsOptions(
            checkpoint=arguments.positional,
            data=arguments.data,
            output=output,
            limit=arguments.limit,
            batch_size=settings.batch_size,
            device=settings.device,
            num_workers=arguments.workers,
        )
    )
