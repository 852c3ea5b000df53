"""``drorae pull``: published weights from the Hugging Face hub, verified and cached."""

import argparse
import shlex
import sys
from pathlib import Path

from cli.errors import EXIT_OK, CommandError
from cli.hub.names import SOURCES, STATISTICS, parse_target
from cli.options import Subparsers, add_command

EXAMPLES = """\
  drorae pull rae-dinov2-b
  drorae pull facebook/dinov2-with-registers-base@main --output models/dinov2-b
  HF_TOKEN=hf_... drorae pull nyu-visionx/RAE-collections --include 'stats/dinov2/*/stat.pt'
"""
VARIABLES = """\
The hub's variables apply: HF_HOME (the cache's place), HF_TOKEN, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE.
The next pull keeps complete files. Standard output is the folder alone."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    width = max(map(len, SOURCES)) + 2
    names = "\n".join(f"  {name:{width}}{source.repository}" for name, source in SOURCES.items())
    parser = add_command(
        subparsers,
        "pull",
        run,
        "download published weights from the Hugging Face hub",
        "Download the files of a model repository that an import needs: configuration, weights, statistics.\n"
        f"{VARIABLES}\n\nnames for published models:\n{names}",
        EXAMPLES,
    )
    parser.add_argument(
        "target", metavar="REPO[@REVISION]", help="ORGANIZATION/NAME, or one of the names above"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="put plain files here, instead of into the shared cache"
    )
    parser.add_argument(
        "--include",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="take the files whose paths match, instead of those that an import needs",
    )


def run(arguments: argparse.Namespace) -> int:
    """Download, and say what comes next."""
    name, revision = parse_target(arguments.target)
    try:
        from cli.hub.repository import pull_repository  # so that no other command loads the library
    except ModuleNotFoundError as exc:
        raise CommandError(f"downloads need the package {exc.name!r}: pip install 'drorae[hub]'") from exc
    folder = pull_repository(name, revision, arguments.output, arguments.include)
    print(folder)
    print(f"next: {next_command(name, folder)}", file=sys.stderr)
    return EXIT_OK


def next_command(name: str, folder: Path) -> str:
    """The command to type after a pull, by the files in the folder."""
    source = SOURCES.get(name)
    target = shlex.quote(name.rpartition("/")[2])
    path = shlex.quote(str(folder))
    if (folder / "encoder.safetensors").is_file():  # a checkpoint of ours
        return f"drorae info {path}"
    if (folder / "config.json").is_file():
        if any(folder.glob("diffusion_pytorch_model*")):
            return f"drorae import {path} --output {target}"
        return f"drorae import --encoder {path} --new-decoder xl --output {target}"
    encoder = source.encoder if source and source.encoder else "ENCODER"
    decoder = next(iter(sorted(folder.rglob("model.pt"))), folder / "model.pt")
    statistics = "".join(
        f" --statistics {shlex.quote(str(file))}" for file in sorted(folder.rglob(STATISTICS))[:1]
    )
    return (
        f'drorae import --encoder "$(drorae pull {encoder})" --decoder {shlex.quote(str(decoder))}'
        f"{statistics} --output {target}"
    )
