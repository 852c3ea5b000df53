"""``drorae serve``: the HTTP service."""

import argparse

from cli.options import Subparsers, add_command, add_settings, read_settings

EXAMPLES = """\
  drorae serve
  drorae serve --checkpoint runs/phase3/checkpoint --port 9000
  DRORAE_DEVICE=cuda:1 DRORAE_BATCH_SIZE=128 drorae serve
  curl --data-binary @photo.jpg http://127.0.0.1:8000/reconstruct -o out.png
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "serve",
        run,
        "serve the tokenizer over HTTP",
        "Serve a checkpoint over HTTP until interrupted. / has a page to try it, /docs describes the API.",
        EXAMPLES,
    )
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve; gives the server's exit status."""
    settings = read_settings(arguments)
    from service import server  # so that no other command loads the web framework

    status = server.run(settings)
    server.leave_if_stuck(status)
    return status
