"""``drorae export-latents``: a folder of latents in the layout of another trainer."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from cli.errors import EXIT_OK
from cli.options import Subparsers, add_command

DESCRIPTION = """\
Write the latents of `drorae tokenize` as other trainers read them.
webdataset: one tar per file of latents, with KEY.npy and KEY.cls per sample, KEY.flip.npy of mirror images.
npy: the folder of EDM2 and REPA, 00012/img-mean-std-00012345.npy [2C, h, w] and dataset.json. These trainers
draw a latent from mean and standard deviation; ours are exact, so the deviation is zero.
An export that was cut off goes on when it is given again. LightningDiT needs none: it reads a folder made
with --flip.
"""
EXAMPLES = """\
  drorae export-latents latents/ --format webdataset --output tars/
  drorae export-latents latents/ --format npy --output data/vae-sd
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "export-latents", run, "latents in another trainer's layout", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("latents", type=Path, metavar="DIR", help="folder of drorae tokenize")
    parser.add_argument(
        "--format", choices=("webdataset", "npy"), required=True, help="whose layout the output has"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to write")


def run(arguments: argparse.Namespace) -> int:
    """Export what the output lacks."""
    from training.latents.reading.export import export_npy, export_webdataset
    from training.latents.reading.folder import LatentFolder

    folder = LatentFolder(arguments.latents)
    export = {"webdataset": export_webdataset, "npy": export_npy}[arguments.format]
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(folder), unit="image", desc="export", file=sys.stderr, disable=hidden) as bar:
        export(folder, arguments.output, bar.update)
    print(f"{arguments.output}: {len(folder)} latents {list(folder.identity.shape)}, {arguments.format}")
    return EXIT_OK
