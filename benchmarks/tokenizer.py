"""Benchmark of whole encodes and decodes: ``python -m benchmarks.tokenizer --help``.

Shape legend: B batch, C latent width, h w latent grid, S image side.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.tokenizers import (
    IMPLEMENTATIONS,
    Models,
    build_models,
    decode_operations,
    diffusers_version,
    encode_operations,
    fusion_operations,
    fusion_path,
    why_no_diffusers,
)
from benchmarks.harness.results import ratio
from benchmarks.harness.runner import (
    Measurement,
    Setup,
    UnavailableError,
    measure,
    relative_error,
    report_skipped,
    unless_out_of_memory,
)
from benchmarks.harness.script import read_ceilings, run_script, script_parser
from benchmarks.harness.timing import Ceilings
from model.config import PRESETS, TokenizerConfig

DESCRIPTION = """\
Time whole encodes and decodes side by side, on random weights and images already on the device:

  encode_base          the plain last layer, eager: an RAE without fusion
  encode_reference     enriched, the fusion by its definition
  encode_folded        enriched, the fusion folded, in plain PyTorch
  encode_triton        enriched, the fusion folded, in Triton kernels
  encode_base_compiled, encode_compiled   base and enriched, all of it under torch.compile
  encode_base_graph, encode_graph         base and enriched, replayed from a CUDA graph (model.cuda_graphs)
  encode_blocks_graph, decode_blocks_graph    the same with compiled blocks (DRORAE_COMPILE_BLOCKS)
  diffusers_encode     diffusers' AutoencoderRAE with the same weights, which has no fusion
  decode, decode_graph, diffusers_decode

On CUDA each call starts on an idle device, so that the launches of small batches count, as they do for a
caller. Encodes and decodes are those without checks of values, as the service runs them.
Each result is checked against the same weights in float32 before it is timed. What cannot run, or gives a
wrong result, is skipped with a line that says why."""
EPILOG = """\
examples:
  python -m benchmarks.tokenizer                               full size, results on the screen only
  python -m benchmarks.tokenizer --output benchmarks/results/tokenizer.csv
  python -m benchmarks.tokenizer --device cpu --preset mini --batch 1 8"""

DEFAULT_BATCHES = {"cuda": (1, 8, 64), "cpu": (1,)}
# Largest relative error that is still timed: twice to three times that of `mini` in the same dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class TokenizerRow:
    """One line of the results. benchmarks/README.md has the legend."""

    device: str
    dtype: str
    torch: str
    triton: str
    commit: str
    diffusers: str
    preset: str
    implementation: str
    fusion: str
    batch: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    num_runs: int
    sm_mhz: float | None
    power_w: float | None
    images_per_s: float
    gflop: float
    tflops: float
    matrix_tflops: float
    matrix_share: float
    time_over_base: float | None
    speedup_over_diffusers: float | None
    relative_error: float


TABLE: Mapping[str, Callable[[TokenizerRow], object]] = {
    "implementation": lambda row: row.implementation,
    "fusion": lambda row: row.fusion,
    "batch": lambda row: row.batch,
    "p50 ms": lambda row: row.p50_ms,
    "p20": lambda row: row.p20_ms,
    "p80": lambda row: row.p80_ms,
    "images/s": lambda row: row.images_per_s,
    "TFLOP/s": lambda row: row.tflops,
    "of matrix rate": lambda row: f"{100 * row.matrix_share:.1f}%",
    "time / base": lambda row: row.time_over_base,
    "x diffusers": lambda row: row.speedup_over_diffusers,
    "rel. error": lambda row: f"{row.relative_error:.1e}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 nothing could be measured."""
    return run_script(build_parser(), argv, TokenizerRow, run, TABLE)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = script_parser("tokenizer", DESCRIPTION, EPILOG, IMPLEMENTATIONS, DEFAULT_BATCHES)
    parser.add_argument(
        "--preset", choices=PRESETS, default="dinov2-b", help="sizes of the model (default: %(default)s)"
    )
    return parser


def run(setup: Setup, arguments: argparse.Namespace) -> Iterator[list[TokenizerRow]]:
    """Rows of each batch size, as they are measured."""
    config = PRESETS[arguments.preset]
    paths = select_implementations(arguments.implementations, config, setup)
    if not paths:
        return
    ceilings = read_ceilings(setup)
    with_diffusers = any(name.startswith("diffusers") for name in paths)
    models = build_models(config, setup, max(setup.batches), with_diffusers, arguments.seed)
    for batch in setup.batches:
        yield unless_out_of_memory(
            f"batch {batch}", partial(measure_batch, batch, paths, models, setup, ceilings)
        )


def select_implementations(names: Sequence[str], config: TokenizerConfig, setup: Setup) -> dict[str, str]:
    """Implementations that this device can run, each with its fusion; logs a line for each other one."""
    paths = {}
    for name in names:
        try:
            if name.startswith("diffusers") and (reason := why_no_diffusers()):
                raise UnavailableError(reason)
            if IMPLEMENTATIONS[name].needs_cuda and setup.device.type != "cuda":
                raise UnavailableError("CUDA graphs need a CUDA device")
            paths[name] = fusion_path(config, IMPLEMENTATIONS[name].fusion, setup)
        except UnavailableError as exc:
            report_skipped(name, exc)
    return paths


def measure_batch(
    batch: int, paths: Mapping[str, str], models: Models, setup: Setup, ceilings: Ceilings
) -> Iterator[TokenizerRow]:
    """Rows of one batch size, one an implementation."""
    inputs = models.inputs.first(batch)
    builders = {name: partial(IMPLEMENTATIONS[name].build, models, inputs, setup) for name in paths}

    def error_of(name: str, found: Tensor) -> float:
        gives = IMPLEMENTATIONS[name].gives
        expected = models.expected[gives][:batch]
        found = found[: len(expected)]
        return relative_error(found.clamp(0, 1) if gives == "pixels" else found, expected)

    label = f"{models.tokenizer.config.name}, batch {batch}"
    measurements = measure(builders, error_of, setup, label, TOLERANCES[setup.dtype])
    for name in measurements:
        yield make_row(name, batch, paths[name], models.tokenizer.config, measurements, setup, ceilings)


def make_row(
    name: str,
    batch: int,
    path: str,
    config: TokenizerConfig,
    measurements: Mapping[str, Measurement],
    setup: Setup,
    ceilings: Ceilings,
) -> TokenizerRow:
    """The result of one implementation, with its ratios to the others of the same run."""
    implementation, measurement = IMPLEMENTATIONS[name], measurements[name]
    p50_ms = {other: found.timing.p50_ms for other, found in measurements.items()}
    is_decode = implementation.gives == "pixels"
    num_operations = batch * count_operations(name, config)
    tflops = num_operations / p50_ms[name] / 1e9
    return TokenizerRow(
        **vars(setup.provenance),
        diffusers=diffusers_version(),
        preset=config.name,
        implementation=name,
        fusion=path,
        batch=batch,
        **vars(measurement.timing),
        images_per_s=1e3 * batch / p50_ms[name],
        gflop=num_operations / 1e9,
        tflops=tflops,
        matrix_tflops=ceilings.matrix_tflops,
        matrix_share=tflops / ceilings.matrix_tflops,
        time_over_base=ratio(p50_ms[name], p50_ms.get(implementation.base or "")),
        speedup_over_diffusers=ratio(
            p50_ms.get("diffusers_decode" if is_decode else "diffusers_encode"), p50_ms[name]
        ),
        relative_error=measurement.relative_error,
    )


def count_operations(name: str, config: TokenizerConfig) -> int:
    """Products that an implementation's result needs, for one image."""
    gives = IMPLEMENTATIONS[name].gives
    if gives == "pixels":
        return decode_operations(config)
    return encode_operations(config) + (fusion_operations(config) if gives == "enriched" else 0)


if __name__ == "__main__":
    sys.exit(main())
