"""How many images per second a node serves: a model, costs measured on the host, and estimates of GPUs."""

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch

from benchmarks.harness.photos import SAMPLES, stage_photos
from benchmarks.harness.provenance import read_provenance
from benchmarks.harness.results import append_rows, check_columns, format_table
from benchmarks.harness.script import positive
from benchmarks.sizing.costs import HOST_COSTS, load_host_costs
from benchmarks.sizing.h100 import CORES, CaseRow, rows_of_cases, save_plot
from benchmarks.sizing.measure import BAR, SIDE, SizingRow, measure

EPILOG = """\
examples:
  python -m benchmarks.sizing measure --photos photos.tar --output benchmarks/results/sizing.csv
  python -m benchmarks.sizing node --plot docs/serving/sizing.png
  python -m benchmarks.sizing node --fronts 8

measure   costs on this host, written to benchmarks/results/host_costs.json, and the model beside the service:
          around a simulated device, and with mini on the CPU; the bar is a rate within 15 %
node      what the model says of a node with one H100, whose own times are estimates
"""
TABLE = (
    "scenario",
    "clients",
    "images_per_request",
    "measured_per_s",
    "model_per_s",
    "ratio",
    "measured_p50_ms",
    "model_p50_ms",
    "bottleneck",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or print the model's table; 1 where the model is off by more than its bar."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return _measure(arguments) if arguments.command == "measure" else _node(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("measure", "node"))
    parser.add_argument("--costs", type=Path, default=HOST_COSTS, metavar="JSON", help="costs of the host")
    parser.add_argument("--photos", type=Path, default=SAMPLES, help="folder or tar (default: samples)")
    parser.add_argument("--clients", type=positive, default=64, help="of the closed loops (default: 64)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument("--duration-s", type=float, default=10.0, metavar="S", help="of a run (default: 10)")
    parser.add_argument(
        "--requests", type=positive, default=3000, metavar="N", help="of each simulated run (default: 3000)"
    )
    parser.add_argument(
        "--fronts", type=positive, default=1, metavar="N", help="of the service in node (default: 1)"
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="append the rows of measure to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table of node; needs matplotlib")
    parser.add_argument("--commit", help="recorded as the commit where the files are not a git checkout")
    return parser


def _measure(arguments: argparse.Namespace) -> int:
    if arguments.output:
        check_columns(arguments.output, SizingRow)
    provenance = read_provenance(torch.device("cpu"), torch.float32, arguments.commit)
    with tempfile.TemporaryDirectory(prefix="drorae-sizing-") as folder:
        stage_photos(arguments.photos, SIDE, Path(folder))
        host, rows = measure(
            Path(folder), arguments.clients, arguments.duration_s, arguments.rounds, provenance
        )
    host.save(arguments.costs)
    if arguments.output:
        append_rows(arguments.output, rows)
    print(format_table(rows, {name: attrgetter(name) for name in TABLE}))
    return 1 if any(abs(row.ratio - 1) > BAR for row in rows) else 0


def _node(arguments: argparse.Namespace) -> int:
    host = load_host_costs(arguments.costs)
    rows = list(rows_of_cases(host, arguments.requests, arguments.fronts))
    print(_markdown(rows))
    if arguments.plot:
        save_plot(rows, arguments.plot)
    return 0


def _markdown(rows: Sequence[CaseRow]) -> str:
    """The table as documents have it: images per second by cores, and what limits them."""
    heads = ["requests", *(f"{cores} cores" for cores in CORES), "feeds the GPU", "p99 rises at"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        rates = [f"{row.rates[cores]:,.0f} ({row.limits[cores]})" for cores in CORES]
        enough = f"{row.cores} cores" if row.cores else f"no, {row.limits[CORES[-1]]}"
        lines.append(f"| {' | '.join([str(row.case), *rates, enough, f'{row.knee_per_s:,.0f}/s'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
