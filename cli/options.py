"""Flags made from the service's settings, and the parser that every command shares."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from cli.errors import UsageError
from service.engine.devices import choose
from service.settings import ENV_PREFIX, Settings, environment_warnings

# What the commands on files take of the settings: the model, and how much of it at once.
MODEL_FIELDS = ("checkpoint", "device", "fusion", "batch_size")
# Limits of pictures, which hold for files too; the environment sets them.
PICTURE_FIELDS = ("max_image_pixels", "max_aspect_ratio", "max_frames")
# Files are made to be kept: the same numbers, whatever the device that made them.
EXACT = {"dtype": "float32"}

Subparsers = Any  # argparse keeps the class of add_subparsers' result private
Run = Callable[[argparse.Namespace], int]


def add_command(
    subparsers: Subparsers, name: str, run: Run, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A subcommand whose help ends in examples.

    Args:
        subparsers: of the main parser.
        name: as typed.
        run: called with the parsed arguments; gives the exit status.
        summary: one line for the list of commands.
        description: of the command, for its own help.
        examples: command lines, one per line.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_settings(parser: argparse.ArgumentParser, fields: Collection[str] | None = None) -> None:
    """A flag for each setting, or for those in ``fields``, named after it."""
    group = parser.add_argument_group("settings", "each also as an environment variable; the flag wins")
    names = Settings.model_fields if fields is None else fields
    parser.set_defaults(fields_read={*names, *PICTURE_FIELDS})
    for name, field in Settings.model_fields.items():
        if name not in names:
            continue
        description = f"{field.description} (default {_shown(field.default)}; {ENV_PREFIX}{name.upper()})"
        group.add_argument(
            _flag(name),
            dest=f"setting_{name}",
            default=argparse.SUPPRESS,
            help=description.replace("%", "%%"),
            **_kind(name, field),
        )


def read_settings(arguments: argparse.Namespace) -> Settings:
    """The settings that flags, environment and defaults give, in that order.

    Of the environment a command reads what concerns it: no port where none is opened. Commands on files are
    `EXACT`, and get the batch size that suits the device.

    Raises:
        UsageError: a value out of bounds; names the flag or the variable.
        UnavailableError: the device does not exist here.
    """
    is_service = "port" in arguments.fields_read
    if not is_service:  # the service logs them
        for sentence in environment_warnings():
            print(f"drorae: {sentence}", file=sys.stderr)
    prefix = "setting_"
    given = {
        name.removeprefix(prefix): value for name, value in vars(arguments).items() if name.startswith(prefix)
    }
    defaults = {name: field.default for name, field in Settings.model_fields.items()} | EXACT
    unread = {name: default for name, default in defaults.items() if name not in arguments.fields_read}
    try:
        settings = Settings(**{**unread, **given})
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        if not first["loc"]:
            raise UsageError(message) from exc
        name = str(first["loc"][0])
        source = _flag(name) if name in given else ENV_PREFIX + name.upper()
        raise UsageError(f"{source}: {message}, not {first['input']!r}") from exc
    return settings if is_service or "batch_size" not in arguments.fields_read else choose(settings).settings


def add_photos(parser: argparse.ArgumentParser) -> None:
    """``--data`` and ``--limit``: the photos that a command goes over."""
    parser.add_argument(
        "--data", type=Path, required=True, nargs="+", metavar="DIR|TAR", help="the photos, centre-cropped"
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="use N photos, spread evenly (default: all)"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers``, for a command that shares the photos out over ranks."""
    parser.add_argument(
        "--workers",
        type=whole_number,
        metavar="N",
        help="processes that decode photos (default: by the device)",
    )


def check_photos(paths: Sequence[Path]) -> None:
    """Whether there is something at every path.

    Raises:
        UsageError: names the first that is absent.
    """
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: there is no such folder or tar file")


def positive_int(text: str) -> int:
    """An argument that is a whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, not {text!r}")
    return number


def whole_number(text: str) -> int:
    """An argument that is a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not {text!r}")
    return int(text)


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _shown(default: object) -> str:
    return str(default or "none") if isinstance(default, tuple | str | SecretStr | None) else str(default)


def _kind(name: str, field: FieldInfo) -> dict[str, Any]:
    """How argparse shows the value; settings themselves judge it."""
    if get_origin(field.annotation) is Literal:
        return {"choices": get_args(field.annotation)}
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if field.annotation is int:
        return {"metavar": "N"}
    return {"metavar": "X" if field.annotation is float else name.upper()}
