"""``drorae analyze``: the effects of a checkpoint's fusion, as the paper's figures."""

import argparse
import json
from pathlib import Path

from cli.errors import EXIT_OK, CommandError, UsageError
from cli.options import Subparsers, add_command, add_photos, add_settings, check_photos, read_settings

EXAMPLES = """\
  drorae analyze mini --data photos/ --output analysis/
  drorae analyze runs/phase3/checkpoint --base-checkpoint runs/phase1/checkpoint \\
      --data photos-256-val.tar --output analysis/ --limit 100
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "analyze",
        run,
        "spectra, router weights and latents, as figures",
        "Reconstruct photos and look inside: Fourier spectra of reconstructions from base and enriched\n"
        "latents against the originals, router weights of every layer, principal components of the latents,\n"
        "cosines and norms. Writes PNG figures and analysis.json; prints the main numbers as JSON.",
        EXAMPLES,
    )
    parser.add_argument(
        "positional", nargs="?", metavar="CHECKPOINT", help="as --checkpoint: a directory or a bundled name"
    )
    add_photos(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for figures and JSON")
    parser.add_argument(
        "--base-checkpoint",
        metavar="DIR",
        help="also decode the base latents by this checkpoint's decoder, such as phase 1's",
    )
    add_settings(parser, ("checkpoint", "device", "batch_size"))


def run(arguments: argparse.Namespace) -> int:
    """Analyze and print the main numbers."""
    if arguments.positional is not None:
        if "setting_checkpoint" in arguments:
            raise UsageError("the checkpoint is named twice: as an argument and by --checkpoint")
        arguments.setting_checkpoint = arguments.positional
    settings = read_settings(arguments)
    check_photos(arguments.data)
    if arguments.output.is_file():
        raise UsageError(f"{arguments.output} is a file: --output names a directory")
    try:
        from training.studies.analysis import analyze_command
        from training.studies.summary import headline
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"analysis needs the package {exc.name!r}: pip install 'drorae[training]'"
        ) from exc
    summary = analyze_command(
        settings.checkpoint,
        arguments.data,
        arguments.output,
        arguments.base_checkpoint,
        arguments.limit,
        settings.batch_size,
        settings.device,
    )
    print(json.dumps(headline(summary), indent=2))
    return EXIT_OK
