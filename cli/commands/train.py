"""``drorae train``: one phase of training, or a sweep of phase 2, from a recipe."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from cli.errors import CommandError, UsageError
from cli.options import Subparsers, add_command, positive_int
from model.spelling import suggest

PHASES = {
    "phase0": "the encoder, distilled from a pretrained network (mini only)",
    "phase1": "the decoder, on the frozen encoder's last layer",
    "phase2": "the fusion, between frozen encoder and decoder",
    "phase3": "the decoder, on the enriched latents",
    "joint": "fusion and decoder at once, an ablation",
    "generator": "a DiT^DH on the tokenizer's latents (stage 2)",
    "sweep": "phase 2 at several expert widths and layer counts, with the fit of their scaling",
}
EXAMPLES = """\
  drorae train phase1 --config training/recipes/mini/phase1.yaml
  drorae train phase1 --config training/recipes/mini/phase1.yaml --resume
  drorae train sweep --config training/recipes/mini/sweep.yaml
  drorae train generator --config training/recipes/mini/generator.yaml
  drorae train phase2 --config my.yaml --set optimizer.learning_rate=1e-4 --output runs/try
  torchrun --nproc-per-node 8 -m cli.main train phase2 --config my.yaml      on eight GPUs
  drorae train phase2 --config training/recipes/dinov2-b-phase2.yaml --dry-run --processes 8

recipes (training/recipes; what each value is from stands beside it):
  dinov2-b-phase1, -phase2, -phase3   full size, on ImageNet: the paper's and RAE's values
  dit-dh-xl, dit-dh-s                 generators: RAE's, and its guide
  mini/phase0 ... mini/phase3-seams   the bundled checkpoint (make mini)
  mini/generator                      a generator for it
Durations may be given in epochs: --set num_steps="16 epochs".
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    phases = "\n".join(f"  {name:10}{what}" for name, what in PHASES.items())
    parser = add_command(
        subparsers,
        "train",
        run,
        "train one phase of a tokenizer, or a generator",
        "Train one phase from a recipe (YAML): pictures, a log and checkpoints go to its run directory.\n\n"
        f"phases, and the parts that they train:\n{phases}",
        EXAMPLES,
    )
    parser.add_argument("phase", type=_phase, metavar="PHASE", help=" | ".join(PHASES))
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
    _add_dry_run(parser)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "dry run", "show parameters, memory, disk and time of the run, and whether it can; writes nothing"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print the plan; status 2 if the run would fail"
    )
    group.add_argument(
        "--check-images",
        type=_images,
        default=256,
        metavar="N|all",
        help="images of each listing to decode, spread evenly over it (default: %(default)s)",
    )
    group.add_argument(
        "--matrix-tflops",
        type=_positive,
        metavar="X",
        help="the device's matrix rate in bfloat16, TFLOP/s (default: its data sheet's, else measured)",
    )
    group.add_argument(
        "--float32-tflops", type=_positive, metavar="X", help="the same in float32, which the losses take"
    )
    group.add_argument(
        "--matrix-share",
        type=_positive,
        default=0.4,
        metavar="X",
        help="the part of it that a step reaches (default: %(default)s; benchmarks/training.py measures it)",
    )
    group.add_argument(
        "--processes",
        type=positive_int,
        default=int(os.environ.get("WORLD_SIZE", "1")),
        metavar="N",
        help="of the run, one a GPU (default: as torchrun says, else 1)",
    )
    group.add_argument("--json", action="store_true", help="print the plan as JSON")


def _phase(text: str) -> str:
    if text not in PHASES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PHASES)}{suggest(text, PHASES)}")
    return text


def _images(text: str) -> int | None:
    return None if text == "all" else positive_int(text)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Train, or plan to; gives the exit status."""
    if not arguments.config.is_file():
        raise UsageError(f"{arguments.config}: there is no such recipe file")
    for override in arguments.overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UsageError(f"--set {override}: expected KEY=VALUE")
    level = "INFO" if os.environ.get("RANK", "0") == "0" else "WARNING"  # one of torchrun's ranks reports
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        if arguments.dry_run:
            return _show_plan(arguments)
        from training.run import run_phase  # so that serving does not need the training extras
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"training needs the package {exc.name!r}: pip install 'drorae[training]'"
        ) from exc
    return run_phase(
        arguments.phase, arguments.config, arguments.overrides, arguments.output, arguments.resume
    )


def _show_plan(arguments: argparse.Namespace) -> int:
    from training.planning.plan import PlanOptions, plan_phase, render_plan

    if arguments.phase == "sweep":
        raise UsageError("--dry-run plans one phase; a sweep's points are runs of phase2: plan that")
    stated = {"bfloat16": arguments.matrix_tflops, "float32": arguments.float32_tflops}
    plan = plan_phase(
        arguments.phase,
        arguments.config,
        arguments.overrides,
        arguments.output,
        arguments.resume,
        PlanOptions(
            num_checked=arguments.check_images,
            matrix_tflops={name: rate for name, rate in stated.items() if rate is not None},
            matrix_share=arguments.matrix_share,
            num_processes=arguments.processes,
        ),
    )
    print(json.dumps(plan.as_dict(), indent=2) if arguments.json else render_plan(plan))
    problems = plan.findings.problems
    if problems:
        others = f" (and {len(problems) - 1} more, listed above)" if len(problems) > 1 else ""
        raise UsageError(f"this run would fail: {problems[0]}{others}")
    return 0
