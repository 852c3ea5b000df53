"""Benchmark of the fusion operator: ``python -m benchmarks.fusion --help``.

Shape legend: B batch, N patch tokens, C width, H expert hidden width, L layers.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import counts as counting
from benchmarks.cases.counts import FusionSize
from benchmarks.cases.fusions import (
    IMPLEMENTATIONS,
    SPEC,
    Implementation,
    Operands,
    States,
    random_states,
    sweep,
    why_unavailable,
)
from benchmarks.harness.results import ratio
from benchmarks.harness.runner import Measurement, Setup, measure, relative_error, unless_out_of_memory
from benchmarks.harness.script import positive, read_ceilings, run_script, script_parser
from benchmarks.harness.timing import Ceilings
from kernels import reference
from kernels.dispatch import FusionProblem, detect_platform

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Time the fusion operator (L layers' tokens in, the enriched latent out) side by side in every
implementation that runs here, on random weights and hidden states:

  definition           as published, eager PyTorch (kernels.reference)
  definition_compiled  the same under torch.compile; compiles anew for every size
  folded               experts folded, eager PyTorch (kernels.folded)
  fused                experts folded, Triton kernels (kernels.fused)
  fused_fp8            the same with norms in FP8
  fused_graph          `fused` replayed from a CUDA graph

Times are the device's: launches are left out. Each result is checked against the definition in float64
before it is timed. What cannot run, or gives a wrong result, is skipped with a line that says why."""
EPILOG = """\
examples:
  python -m benchmarks.fusion                                    every default, results on the screen only
  python -m benchmarks.fusion --output benchmarks/results/fusion.csv
  python -m benchmarks.fusion --batch 1 8 --hidden-width 1536 --implementations definition folded"""

# Largest relative error that is still timed: twice that of the definition run in the same dtype. A layer
# left out, or a norm wrong by a tenth, gives 2e-2 and more with the correction's beta of 0.2.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DEFAULT_BATCHES = {"cuda": (1, 8, 64, 256), "cpu": (1, 8)}
EXTRA = ("definition_compiled", "fused_fp8")  # the first compiles for every size
DEFAULT_HIDDEN_WIDTHS = [128, 1536, 3072, 6144]
CHECK_STRIDE = 8  # every eighth token of the first and the last image


@dataclass(frozen=True)
class FusionRow:
    """One line of the results. benchmarks/README.md has the legend."""

    device: str
    dtype: str
    torch: str
    triton: str
    commit: str
    batch: int
    tokens: int
    width: int
    hidden_width: int
    num_layers: int
    implementation: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    num_runs: int
    sm_mhz: float | None
    power_w: float | None
    gflop_definition: float
    gflop_folded: float
    gflop_executed: float
    mb_minimum: float
    mb_moved: float | None
    tflops: float
    matrix_tflops: float
    matrix_share: float
    copy_gb_per_s: float
    floor_ms: float
    speedup_over_definition: float | None
    speedup_over_compiled: float | None
    relative_error: float


TABLE: Mapping[str, Callable[[FusionRow], object]] = {
    "implementation": lambda row: row.implementation,
    "batch": lambda row: row.batch,
    "H": lambda row: row.hidden_width,
    "p50 ms": lambda row: row.p50_ms,
    "p20": lambda row: row.p20_ms,
    "p80": lambda row: row.p80_ms,
    "floor ms": lambda row: row.floor_ms,
    "TFLOP/s": lambda row: row.tflops,
    "of matrix rate": lambda row: f"{100 * row.matrix_share:.1f}%",
    "x definition": lambda row: row.speedup_over_definition,
    "x compiled": lambda row: row.speedup_over_compiled,
    "rel. error": lambda row: f"{row.relative_error:.1e}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 nothing could be measured."""
    return run_script(build_parser(), argv, FusionRow, run, TABLE)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = script_parser("fusion", DESCRIPTION, EPILOG, IMPLEMENTATIONS, DEFAULT_BATCHES)
    # The others run only where they are asked for.
    parser.set_defaults(implementations=[name for name in IMPLEMENTATIONS if name not in EXTRA])
    parser.add_argument(
        "--hidden-width",
        type=positive,
        nargs="+",
        metavar="H",
        default=DEFAULT_HIDDEN_WIDTHS,
        help="expert hidden widths (default: 128 1536 3072 6144)",
    )
    parser.add_argument(
        "--width", type=positive, default=768, metavar="C", help="token width (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", type=positive, default=12, metavar="L", help="fused layers (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=256,
        metavar="N",
        help="patch tokens an image (default: %(default)s)",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also time the fused kernels with other tiles and splits"
    )
    return parser


def run(setup: Setup, arguments: argparse.Namespace) -> Iterator[list[FusionRow]]:
    """Rows of each size, as they are measured."""
    chosen = select_implementations(setup, arguments)
    if not chosen:
        return
    ceilings = read_ceilings(setup)
    generator = torch.Generator().manual_seed(arguments.seed)
    for hidden_width in arguments.hidden_width:
        operands = Operands(
            arguments.layers, arguments.width, hidden_width, setup.device, setup.dtype, generator
        )
        for batch in setup.batches:
            size = FusionSize(
                batch,
                arguments.tokens,
                arguments.layers,
                arguments.width,
                hidden_width,
                setup.dtype.itemsize,
            )
            yield unless_out_of_memory(
                f"batch {batch}, H {hidden_width}",
                partial(measure_size, size, chosen, operands, setup, ceilings),
            )


def select_implementations(setup: Setup, arguments: argparse.Namespace) -> dict[str, Implementation]:
    """Those asked for, less those that cannot run on this device at all; a line for each."""
    platform = detect_platform(setup.device)
    problem = FusionProblem(arguments.layers, arguments.width, max(arguments.hidden_width), setup.dtype)
    wanted = {name: IMPLEMENTATIONS[name] for name in arguments.implementations}
    if arguments.sweep and problem.dtype != torch.float32:
        wanted |= sweep()
    chosen = {}
    for name, implementation in wanted.items():
        if reason := why_unavailable(name, problem, platform):
            logger.warning("skipped %s: %s", name, reason)
        else:
            chosen[name] = implementation
    return chosen


def measure_size(
    size: FusionSize,
    chosen: Mapping[str, Implementation],
    operands: Operands,
    setup: Setup,
    ceilings: Ceilings,
) -> Iterator[FusionRow]:
    """Rows of one size, one an implementation."""
    states = random_states(operands, size.batch, size.tokens)
    expected = expected_tokens(states, operands)
    builders = {name: partial(found.build, operands, states) for name, found in chosen.items()}

    def error_of(_: str, tokens: Tensor) -> float:
        return relative_error(checked_tokens(tokens), expected)

    label = f"batch {size.batch}, H {size.hidden_width}"
    measurements = measure(builders, error_of, setup, label, TOLERANCES[setup.dtype], head_start=True)
    for name in measurements:
        yield make_row(name, chosen[name], size, measurements, setup, ceilings)


def expected_tokens(states: States, operands: Operands) -> Tensor:
    """The definition in float64, on a few tokens."""
    exact = [checked_tokens(state).double().cpu() for state in states]
    return reference.fuse_layers(exact, operands.exact, SPEC).tokens


def checked_tokens(tokens: Tensor) -> Tensor:
    """The tokens whose result is checked, of [B, N, C]: from both ends of the batch, [2, N / 8, C]."""
    return tokens[[0, -1], ::CHECK_STRIDE]


def make_row(
    name: str,
    implementation: Implementation,
    size: FusionSize,
    measurements: Mapping[str, Measurement],
    setup: Setup,
    ceilings: Ceilings,
) -> FusionRow:
    """The result of one implementation, with its counts and its ratios to the others of the same run."""
    measurement = measurements[name]
    p50_ms = {other: found.timing.p50_ms for other, found in measurements.items()}
    needed, minimum = counting.needed_operations(size), counting.minimum_bytes(size)
    moved = implementation.moved_bytes
    tflops = needed / p50_ms[name] / 1e9
    return FusionRow(
        **vars(setup.provenance),
        batch=size.batch,
        tokens=size.tokens,
        width=size.width,
        hidden_width=size.hidden_width,
        num_layers=size.num_layers,
        implementation=name,
        **vars(measurement.timing),
        gflop_definition=counting.definition_operations(size) / 1e9,
        gflop_folded=counting.folded_operations(size) / 1e9,
        gflop_executed=implementation.operations(size) / 1e9,
        mb_minimum=minimum / 1e6,
        mb_moved=None if moved is None else moved(size) / 1e6,
        tflops=tflops,
        matrix_tflops=ceilings.matrix_tflops,
        matrix_share=tflops / ceilings.matrix_tflops,
        copy_gb_per_s=ceilings.copy_gb_per_s,
        floor_ms=max(needed / ceilings.matrix_tflops / 1e9, minimum / ceilings.copy_gb_per_s / 1e6),
        speedup_over_definition=ratio(p50_ms.get("definition"), p50_ms[name]),
        speedup_over_compiled=ratio(p50_ms.get("definition_compiled"), p50_ms[name]),
        relative_error=measurement.relative_error,
    )


if __name__ == "__main__":
    sys.exit(main())
