"""The parser of the ``drorae`` command, which imports every subcommand and with them PyTorch."""

import argparse
from importlib.metadata import version

from cli.commands import (
    analyze,
    evaluate,
    export,
    import_,
    info,
    pull,
    reconstruct,
    serve,
    stats,
    train,
)
from cli.commands.generators import generate, quality
from cli.commands.latents import decode, encode, export_latents, tokenize

COMMANDS = (
    serve,
    reconstruct,
    encode,
    decode,
    tokenize,
    generate,
    info,
    pull,
    import_,
    export,
    export_latents,
    evaluate,
    quality,
    analyze,
    stats,
    train,
)
DESCRIPTION = "Turn images into DRoRAE latents and back: as files, as an HTTP service, or train the model."
EPILOG = """\
first steps:
  drorae reconstruct photo.jpg out.png        what the tokenizer keeps of a photo
  drorae encode photo.jpg -o latents.safetensors
  drorae decode latents.safetensors out.png
  drorae serve                                the same over HTTP, on 127.0.0.1:8000

exit status: 0 done, 1 the operation failed, 2 wrong arguments or unusable input,
3 done, but for photos that could not be read (encode, reconstruct, tokenize)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="drorae",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"drorae {version('drorae')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser
