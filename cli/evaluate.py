"""``drorae evaluate``: reconstruction quality over a folder or a tar of photos."""

import argparse
from pathlib import Path

from cli.errors import CommandError, UsageError
from cli.options import MODEL_FIELDS, Subparsers, add_command, add_settings, read_settings

EXAMPLES = """\
  drorae evaluate --data photos/
  drorae evaluate --checkpoint runs/phase3/checkpoint --data photos-256-val.tar --output report/
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        "PSNR and SSIM over many photos",
        "Reconstruct every photo of a folder or tar file and print the mean PSNR and SSIM as JSON.",
        EXAMPLES,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR|TAR", help="the photos")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also write the figures, those of each photo and a grid"
    )
    add_settings(parser, MODEL_FIELDS)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; gives the evaluation's exit status."""
    settings = read_settings(arguments)
    if not arguments.data.exists():
        raise UsageError(f"{arguments.data}: there is no such folder or tar file")
    if arguments.output is not None and arguments.output.is_file():
        raise UsageError(f"{arguments.output} is a file: --output names a directory")
    try:
        from training.evaluate import evaluate_command
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"evaluation needs the package {exc.name!r}: pip install 'drorae[training]'"
        ) from exc
    return evaluate_command(
        settings.checkpoint,
        arguments.data,
        arguments.output,
        settings.batch_size,
        settings.device,
        settings.fusion,
    )
