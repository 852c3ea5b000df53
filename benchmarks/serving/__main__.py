"""The service under load, against a bare loop, and against its peers around one device."""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.faults import __main__ as faults
from benchmarks.harness.photos import SAMPLES, PhotoError, stage_photos
from benchmarks.harness.provenance import RESULTS, Provenance, read_provenance
from benchmarks.harness.results import ResultsError, append_rows, check_columns, format_table
from benchmarks.harness.script import positive
from benchmarks.serving.host import measure_host
from benchmarks.serving.load import measure_load
from benchmarks.serving.report import TABLE, ServingRow, save_host_plot, save_latency_plot
from benchmarks.serving.simulated import add_device_flag
from benchmarks.serving.trials import Options

Measure = Callable[[Options, Provenance], Iterator[list[ServingRow]]]

# ``python -m benchmarks.faults`` has what the service must bear, with flags of its own.
SCENARIOS: Mapping[str, Measure] = {"load": measure_load, "host": measure_host}
_BATCHES = (1, 2, 4, 8, 16, 32)
_EPILOG = f"""\
load   closed loop at saturation against the bare loop; open loop at parts of the capacity and at ten times it
host   our service, LitServe and naive handlers around a simulated device
all    both
faults what the service must bear, with flags of its own: see faults --help

python -m benchmarks.serving all --photos photos.tar --peer-python peer/bin/python \\
    --output {RESULTS}/serving.csv --plots docs/serving
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, append rows, show a table; 0 where every bar was met, else 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["faults"]:
        return faults.main(words[1:])
    parser = _parser()
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    rows: list[ServingRow] = []
    with tempfile.TemporaryDirectory(prefix="drorae-serving-") as folder:
        try:
            if arguments.output:
                check_columns(arguments.output, ServingRow)
            stage_photos(arguments.photos, arguments.photo_side, Path(folder))
        except (ResultsError, PhotoError) as exc:
            parser.error(str(exc))
        options = _options(arguments, Path(folder))
        provenance = read_provenance(torch.device("cpu"), torch.float32, arguments.commit)
        for name in SCENARIOS if arguments.scenario == "all" else (arguments.scenario,):
            for part in SCENARIOS[name](options, provenance):
                if arguments.output:
                    append_rows(arguments.output, part)
                rows += part
    print(format_table(rows, TABLE))
    if arguments.plots:
        _save_plots(rows, arguments.plots)
    return 1 if any(row.met is False for row in rows) else 0


def _save_plots(rows: Sequence[ServingRow], folder: Path) -> None:
    if any(row.scenario == "open" for row in rows):
        save_latency_plot(rows, folder / "latency.png")
    if any(row.scenario == "host" for row in rows):
        save_host_plot(rows, folder / "host.png")


def _options(arguments: argparse.Namespace, folder: Path) -> Options:
    quick = arguments.quick
    return Options(
        folder=folder,
        checkpoint=arguments.checkpoint,
        settings=dict(arguments.set),
        rounds=arguments.rounds or (1 if quick else 3),
        duration_s=arguments.duration_s or (1.0 if quick else 15.0),
        open_duration_s=arguments.open_duration_s or (1.0 if quick else 60.0),
        clients=arguments.clients or (8 if quick else 64),
        max_connections=arguments.max_connections,
        deadline_s=arguments.deadline_s,
        device_ms=arguments.device_ms,
        batches=arguments.batch or ((4,) if quick else _BATCHES),
        peer_python=arguments.peer_python,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", choices=(*SCENARIOS, "all"))
    parser.add_argument("--photos", type=Path, default=SAMPLES, help="tar or folder (default: samples)")
    parser.add_argument(
        "--photo-side",
        type=int,
        default=256,
        metavar="S",
        help="photos become JPEG squares of this side; 0 leaves JPEG files alone (default: %(default)s)",
    )
    parser.add_argument("--checkpoint", default="mini", help="what is served (default: %(default)s)")
    parser.add_argument(
        "--set",
        type=_setting,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of our service (default: its own)",
    )
    parser.add_argument("--quick", action="store_true", help="a second of each, to see that all works")
    parser.add_argument("--rounds", type=positive, help="turns that systems take (default: 3)")
    parser.add_argument("--duration-s", type=float, help="of a closed-loop trial (default: 15)")
    parser.add_argument("--open-duration-s", type=float, help="of an open-loop trial (default: 60)")
    parser.add_argument("--clients", type=positive, help="of a closed loop (default: 64)")
    parser.add_argument(
        "--max-connections", type=positive, default=512, help="of an open loop (default: 512)"
    )
    parser.add_argument(
        "--deadline-s", type=float, default=10.0, help="X-Request-Timeout under overload (default: 10)"
    )
    add_device_flag(parser)
    parser.add_argument(
        "--batch", type=positive, nargs="+", metavar="B", help="sizes that the bare loop tries"
    )
    parser.add_argument("--peer-python", help="interpreter of an environment with LitServe")
    parser.add_argument("--output", type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots; needs matplotlib")
    parser.add_argument("--commit", help="recorded as the commit where the files are not a git checkout")
    return parser


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
