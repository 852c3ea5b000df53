"""``drorae export``: a checkpoint to the folder of another library."""

import argparse
from pathlib import Path

import torch

from cli import files
from cli.errors import EXIT_OK, UsageError
from cli.options import Subparsers, add_command
from model.generator import Generator, find_generator
from model.interop.rae_generator import export_diffusers_transformer, export_rae
from model.interop.to_diffusers import export_diffusers
from model.tokenizer import Tokenizer

DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """\
Write a checkpoint as a folder that diffusers' AutoencoderRAE.from_pretrained loads: encoder, decoder and
statistics. Its decode takes latents as `drorae decode` does, its encode gives base latents; the fusion of
a fused checkpoint is written beside it, with a small Python file that makes enriched latents of the two.
A generator goes to RAE's own files, or to the folder of diffusers' pull request 13231, which is not merged.
"""
EXAMPLES = """\
  drorae export --format diffusers runs/phase3/checkpoint --output drorae-b-diffusers
  drorae export --format diffusers mini --output mini-diffusers --dtype bfloat16
  drorae export --format rae runs/mini/generator/checkpoint --output rae-generator
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "export", run, "a checkpoint to diffusers' format", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint directory or a bundled name")
    parser.add_argument(
        "--format", choices=("diffusers", "rae"), default="diffusers", help="whose (default diffusers)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder, a new one")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the weights (default float32)"
    )
    parser.add_argument(
        "--transformers",
        type=int,
        choices=(4, 5),
        default=5,
        help="major version of transformers that will load it, which names the encoder's tensors (default 5)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export; the folder is complete or not there."""
    files.check_new_folder(arguments.output)
    dtype = getattr(torch, arguments.dtype)
    source = find_generator(arguments.checkpoint)
    if source is not None:
        export = export_rae if arguments.format == "rae" else export_diffusers_transformer
        written = export(Generator.load(source), arguments.output, dtype)
        print(f"{arguments.output}: {', '.join(written)}")
        return EXIT_OK
    if arguments.format == "rae":
        raise UsageError(f"{arguments.checkpoint}: --format rae is for generators, and this is none")
    tokenizer = Tokenizer.load(arguments.checkpoint, fusion="reference")
    written = export_diffusers(tokenizer, arguments.output, dtype, arguments.transformers)
    print(f"{arguments.output}: {', '.join(written)}")
    return EXIT_OK
