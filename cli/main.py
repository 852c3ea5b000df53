"""Entry point of the ``drorae`` command: the parser, and the one place where errors become exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from cli import (
    analyze,
    decode,
    encode,
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
from cli.errors import EXIT_FAILED, describe

logger = logging.getLogger(__name__)

COMMANDS = (serve, reconstruct, encode, decode, info, pull, import_, export, evaluate, analyze, stats, train)
DESCRIPTION = "Turn images into DRoRAE latents and back: as files, as an HTTP service, or train the model."
EPILOG = """\
first steps:
  drorae reconstruct photo.jpg out.png        what the tokenizer keeps of a photo
  drorae encode photo.jpg -o latents.safetensors
  drorae decode latents.safetensors out.png
  drorae serve                                the same over HTTP, on 127.0.0.1:8000

exit status: 0 done, 1 the operation failed, 2 wrong arguments or unusable input
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0 done, 1 the operation failed, 2 wrong arguments or unusable input.
    """
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        if arguments.debug:
            raise
        status, sentence = describe(error) or (EXIT_FAILED, _unexpected(error))
        print(f"drorae: {' '.join(sentence.split())}", file=sys.stderr)
        return status


def program() -> NoReturn:
    """The ``drorae`` program."""
    status = main()
    if "LOCAL_RANK" in os.environ:
        # One of torchrun's: gloo's threads outlive its groups, and can abort an interpreter that goes away
        # (pytorch/pytorch#179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


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


def _unexpected(error: BaseException) -> str:
    logger.debug("unexpected error", exc_info=error)
    return f"unexpected {type(error).__name__}: {error} (drorae --debug shows where)"


if __name__ == "__main__":  # for launchers such as torchrun: -m cli.main
    program()
