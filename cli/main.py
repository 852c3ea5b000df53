"""Entry point of the ``drorae`` command, and the one place where errors become exit codes."""

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from model.process import limit_threads
from service.processes import startup

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0 done, 1 the operation failed, 2 wrong arguments or unusable input, 3 done but for
        photos that could not be read.
    """
    from cli.errors import EXIT_FAILED, describe  # with PyTorch, for which `program` prepares the process
    from cli.parser import build_parser

    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        _flush_output()
        return status
    except BrokenPipeError:
        _drop_output()
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        if arguments.debug:
            raise
        status, sentence = describe(error) or (EXIT_FAILED, _unexpected(error))
        print(f"drorae: {' '.join(sentence.split())}", file=sys.stderr)
        return status


def program() -> NoReturn:
    """The ``drorae`` program."""
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    if "serve" in sys.argv[1:3]:  # --debug may come first
        startup.prepare()
    else:
        limit_threads()
    try:
        status = main()
    except SystemExit:
        try:
            _flush_output()  # help, for which argparse exits by itself
        except BrokenPipeError:
            _drop_output()
        raise
    if "LOCAL_RANK" in os.environ:
        # One of torchrun's: gloo's threads outlive its groups, and can abort an interpreter that goes away
        # (pytorch/pytorch#179291).
        _flush_output()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _fill_closed_streams() -> None:
    """Open the null device in place of standard streams that the caller closed.

    Else files opened later would take their numbers, and messages end up in them. ``sys.stdin`` and
    ``sys.stdout`` stay None, by which commands know that there is nothing to read or write.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def _flush_output() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Let the interpreter's last flush succeed: the reader of our output, such as head, has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: BaseException) -> str:
    logger.debug("unexpected error", exc_info=error)
    return f"unexpected {type(error).__name__}: {error} (drorae --debug shows where)"


if __name__ == "__main__":  # for launchers such as torchrun: -m cli.main
    program()
