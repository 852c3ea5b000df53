"""Shared by the benchmark scripts: flags, device, ceilings, and results to a file and to the screen."""

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness.provenance import read_provenance
from benchmarks.harness.results import ResultsError, Row, append_rows, check_columns, format_table
from benchmarks.harness.runner import Setup
from benchmarks.harness.timing import Ceilings, measure_ceilings

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
DEFAULT_NUM_RUNS = {"cuda": 200, "cpu": 15}


class SetupError(Exception):
    """Arguments that cannot be measured here; says why."""


def run_script(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    row_type: type[Row],
    run: Callable[[Setup, argparse.Namespace], Iterable[Sequence[Row]]],
    table: Mapping[str, Callable[[Row], object]],
) -> int:
    """A benchmark's whole life: read the flags, measure, append each case to the CSV file, show a table.

    Args:
        parser: made with `script_parser`.
        argv: arguments without the program's name; by default those of the process.
        row_type: dataclass of one result.
        run: gives the rows of one case after the other.
        table: a row's values in the table, by heading.

    Returns:
        Exit status: 0 done, 1 nothing could be measured.
    """
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        setup = read_setup(arguments)
        if arguments.output:
            check_columns(arguments.output, row_type)  # now, not after minutes of work
    except (SetupError, ResultsError) as exc:
        parser.error(str(exc))
    rows: list[Row] = []
    for case in run(setup, arguments):
        if arguments.output:
            append_rows(arguments.output, case)
        rows += case
    if not rows:
        return 1
    print(format_table(rows, table))
    return 0


def script_parser(
    name: str,
    description: str,
    epilog: str,
    implementations: Iterable[str],
    batches: Mapping[str, Sequence[int]],
) -> argparse.ArgumentParser:
    """A command line with the flags that every benchmark has.

    Args:
        name: of the benchmark's module.
        description: of the measurement.
        epilog: examples.
        implementations: names that ``--implementations`` takes.
        batches: batch sizes where none are given, by type of device.
    """
    names = list(implementations)
    texts = {kind: " ".join(map(str, sizes)) for kind, sizes in batches.items()}
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and activations (default: bfloat16 on cuda, float32 on cpu)",
    )
    parser.set_defaults(default_batches=batches)
    parser.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        metavar="B",
        help=f"images a call (default: {texts['cuda']} on cuda, {texts['cpu']} on cpu)",
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        metavar="N",
        help="timed runs of each implementation and size (default: 200 on cuda, 15 on cpu)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="append the results to this file (default: only show them)"
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help="which to time (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    parser.add_argument("--commit", help="recorded as the commit where the files are not a git checkout")
    return parser


def positive(text: str) -> int:
    """A positive number from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def read_setup(arguments: argparse.Namespace) -> Setup:
    """The setup that `script_parser`'s flags ask for.

    Raises:
        SetupError: the device does not exist here, or is neither CUDA nor a CPU.
    """
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise SetupError(f"--device {name}: torch knows no such device") from exc
    if device.type not in DEFAULT_DTYPES:
        raise SetupError(f"--device {name}: only cuda and cpu are timed")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SetupError(f"--device {name}: torch sees no CUDA device")
        torch.cuda.set_device(device)
    dtype = DTYPES[arguments.dtype or DEFAULT_DTYPES[device.type]]
    return Setup(
        device=device,
        dtype=dtype,
        batches=arguments.batch or arguments.default_batches[device.type],
        num_runs=arguments.repeats or DEFAULT_NUM_RUNS[device.type],
        provenance=read_provenance(device, dtype, arguments.commit),
    )


def read_ceilings(setup: Setup) -> Ceilings:
    """Measure the device's ceilings and say them."""
    ceilings = measure_ceilings(setup.device, setup.dtype)
    logger.info(
        "%s, %s: %.4g TFLOP/s in a large matrix product, %.4g GB/s in a large copy",
        setup.provenance.device,
        setup.provenance.dtype,
        ceilings.matrix_tflops,
        ceilings.copy_gb_per_s,
    )
    return ceilings
