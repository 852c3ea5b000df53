"""Faults that the service must bear: ``python -m benchmarks.faults --help``."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.faults.cancel import run_cancel
from benchmarks.faults.fuzz import campaign as fuzz
from benchmarks.faults.model_faults import run_inject
from benchmarks.faults.openapi import run_schemathesis
from benchmarks.faults.sigterm import run_sigterm
from benchmarks.faults.soak import run_soak
from benchmarks.faults.starts import run_starts
from benchmarks.harness.photos import PhotoError
from benchmarks.harness.provenance import read_provenance
from benchmarks.harness.results import ResultsError, append_rows, check_columns, format_table
from benchmarks.harness.script import positive
from benchmarks.probes.checks import TABLE, Check, FaultRow, Options, to_row

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Start the service, one for each scenario, and hurt it:

  fuzz          10,000 malformed or mutated requests: none may be answered with a 5xx
  schemathesis  what its OpenAPI allows and forbids, where schemathesis is installed
  cancel        500 connections that are closed while their requests wait for a busy device
  sigterm       SIGTERM under load, 20 times: nothing that was accepted is lost
  starts        30 starts beside a busy loop on every CPU: all become ready
  inject        a hang, no memory, a poisoned batch, a dead engine
  soak          10 minutes of mixed traffic: nothing grows, nothing is left over

The exit status is 1 where a bar is not met."""
EPILOG = """\
examples:
  python -m benchmarks.faults --quick              every scenario, small, results on the screen only
  python -m benchmarks.faults fuzz --seed 3 --count 50000
  python -m benchmarks.faults fuzz --replay fuzz-failures/seed0-case11.http
  python -m benchmarks.faults --output benchmarks/results/faults.csv --plot docs/serving/soak.png"""

Scenario = Callable[[Options], list[Check]]
SCENARIOS: Mapping[str, Scenario] = {
    "fuzz": fuzz.run_fuzz,
    "schemathesis": run_schemathesis,
    "cancel": run_cancel,
    "sigterm": run_sigterm,
    "starts": run_starts,
    "inject": run_inject,
    "soak": run_soak,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 every bar is met, 1 one is not, or nothing could be run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        options = _options(arguments)
        if arguments.output:
            check_columns(arguments.output, FaultRow)  # now, not after minutes of work
        if arguments.replay:
            return _replay(arguments.replay, options)
        names = list(SCENARIOS) if arguments.scenario == "all" else [arguments.scenario]
        rows = [row for scenario_rows in run(names, options, arguments.output) for row in scenario_rows]
    except (ResultsError, PhotoError, ValueError) as exc:
        parser.error(str(exc))
    if not rows:
        return 1
    print(format_table(rows, TABLE))
    return 1 if any(row.met == "no" for row in rows) else 0


def run(names: Sequence[str], options: Options, output: Path | None = None) -> Iterator[list[FaultRow]]:
    """Run scenarios by name; gives each one's rows, and appends them to the CSV file where one is named.

    Raises:
        LaunchError: the service did not start.
        PhotoError: there are no photos.
        ResultsError: the file has other columns.
    """
    provenance = read_provenance(torch.device(_device(options)), torch.float32)
    for name in names:
        logger.info("scenario %s", name)
        rows = [to_row(check, provenance) for check in SCENARIOS[name](options)]
        if output is not None:
            append_rows(output, rows)
        yield rows


def _device(options: Options) -> str:
    """Where the service runs, for the record."""
    named = options.settings.get("device", "auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if named == "auto" else named


def _replay(path: Path, options: Options) -> int:
    answer = fuzz.replay(path, options)
    print(answer.status, answer.body[:2000].decode("utf-8", "replace"))
    return 1 if answer.status >= 500 else 0


def _options(arguments: argparse.Namespace) -> Options:
    settings = [text.partition("=") for text in arguments.set]
    for name, equals, _ in settings:
        if not (name and equals):
            raise ValueError(f"--set {name}: write NAME=VALUE")
    return Options(
        seed=arguments.seed,
        quick=arguments.quick,
        photos=arguments.photos,
        count=arguments.count,
        minutes=arguments.minutes,
        schemathesis=arguments.schemathesis,
        settings={name: value for name, _, value in settings},
        save=arguments.save,
        plot=arguments.plot,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="?", choices=(*SCENARIOS, "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="small versions, for a look")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--count", type=positive, metavar="N", help="bodies of the fuzz, or starts")
    parser.add_argument("--minutes", type=float, metavar="M", help="length of the soak (default: 10)")
    parser.add_argument(
        "--photos", type=Path, metavar="PATH", help="tar or folder of photos (default: the samples)"
    )
    parser.add_argument(
        "--schemathesis", type=Path, metavar="FILE", help="its executable (default: the one in PATH)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the service; repeatable",
    )
    parser.add_argument(
        "--save",
        type=Path,
        default=Options.save,
        metavar="DIR",
        help="where requests go that were answered wrongly (default: %(default)s)",
    )
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="send one of them again, and nothing else"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the soak (needs matplotlib)")
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="append the results to this file (default: only show them)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
