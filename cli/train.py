"""``drorae train``: one phase of training, or a sweep of phase 2, from a recipe."""

import argparse
import logging
import sys
from pathlib import Path

from cli.errors import CommandError, UsageError
from cli.options import Subparsers, add_command

PHASES = {
    "phase0": "the encoder, distilled from a pretrained network (mini only)",
    "phase1": "the decoder, on the frozen encoder's last layer",
    "phase2": "the fusion, between frozen encoder and decoder",
    "phase3": "the decoder, on the enriched latents",
    "joint": "fusion and decoder at once, an ablation",
    "sweep": "phase 2 at several expert widths and layer counts, with the fit of their scaling",
}
EXAMPLES = """\
  drorae train phase1 --config training/recipes/mini-phase1.yaml
  drorae train phase1 --config training/recipes/mini-phase1.yaml --resume
  drorae train sweep --config training/recipes/mini-sweep.yaml
  drorae train phase2 --config my.yaml --set optimizer.learning_rate=1e-4 --output runs/try
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    phases = "\n".join(f"  {name:8}{what}" for name, what in PHASES.items())
    parser = add_command(
        subparsers,
        "train",
        run,
        "train one phase of a tokenizer",
        "Train one phase from a recipe (YAML): pictures, a log and checkpoints go to its run directory.\n\n"
        f"phases and what each one trains:\n{phases}",
        EXAMPLES,
    )
    parser.add_argument("phase", choices=PHASES, metavar="PHASE", help=" | ".join(PHASES))
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the recipe, YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one field of the recipe, nested ones with dots; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run that the directory holds")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run directory, instead of the recipe's")


def run(arguments: argparse.Namespace) -> int:
    """Train; gives the phase's exit status."""
    if not arguments.config.is_file():
        raise UsageError(f"{arguments.config}: there is no such recipe file")
    for override in arguments.overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UsageError(f"--set {override}: expected KEY=VALUE")
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        from training.run import run_phase  # so that serving does not need the training extras
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"training needs the package {exc.name!r}: pip install 'drorae[training]'"
        ) from exc
    return run_phase(
        arguments.phase, arguments.config, arguments.overrides, arguments.output, arguments.resume
    )
