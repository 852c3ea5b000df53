"""Benchmark of ``drorae tokenize``: ``python -m benchmarks.latents --help``."""

import argparse
import itertools
import logging
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness.photos import SAMPLES, stage_photos
from benchmarks.harness.provenance import Provenance, read_provenance
from benchmarks.harness.results import append_rows, check_columns, format_table
from benchmarks.harness.script import positive
from benchmarks.serving.bare import Variant, run_bare, variants
from model.config import DecoderConfig, EncoderConfig, TokenizerConfig
from model.process import num_cpus
from model.tokenizer import Tokenizer
from training.latents.encoding import DecodedBatch, Encode, UnitLatents
from training.latents.jobs import Job
from training.latents.lanes import Encoded, LaneConfig, decoded_batches
from training.latents.store import FolderStore
from training.latents.tokenize import TokenizeOptions, local_engine, make_job

logger = logging.getLogger(__name__)

EPILOG = """\
examples:
  python -m benchmarks.latents throughput --photos photos.tar --output benchmarks/results/latents.csv
  python -m benchmarks.latents simulated
  python -m benchmarks.latents memory --images 100000

throughput   drorae tokenize on every core against the bare loop of decoding and encoding at its best batch
             size, in turns; the bar is 0.95
simulated    one lane whose device takes 5 ms per batch and no CPU, as a GPU looks to its host, against
             decoding alone; the bar is 0.95 of the slower of the two
memory       resident memory of the command and its lanes over many small images and a tiny network; the bar
             is 1.05 of what it is after a fifth of them
"""
BATCHES = (4, 8, 16)
BAR, MEMORY_BAR = 0.95, 1.05
DEVICE_S = 0.005
NUM_COPIES = 2048
"""Images of a data set, made of copies of the photos: more than a run encodes."""
COLUMNS = ("scenario", "configuration", "value", "reference", "reference_value", "ratio", "bar")
TINY = TokenizerConfig(
    name="tiny",
    image_size=32,
    encoder=EncoderConfig(width=32, depth=1, num_heads=2, patch_size=16, image_size=32, position_grid=2),
    fusion=None,
    decoder=DecoderConfig(width=32, depth=1, num_heads=2, mlp_width=32),
)


@dataclass(frozen=True)
class LatentsRow(Provenance):
    """One comparison.

    Attributes:
        scenario: throughput, simulated or memory.
        configuration: of what was measured.
        value: images per second, or MiB.
        reference: what it is compared with, likewise.
        reference_value: likewise.
        ratio, bar: of the two, and what it is held to.
    """

    scenario: str
    configuration: str
    num_rounds: int
    value: float
    reference: str
    reference_value: float
    ratio: float
    bar: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 where a bar is missed."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.output:
        check_columns(arguments.output, LatentsRow)
    provenance = read_provenance(torch.device("cpu"), torch.float32, arguments.commit)
    measure = {"throughput": throughput, "simulated": simulated, "memory": memory}[arguments.scenario]
    with tempfile.TemporaryDirectory(prefix="drorae-latents-") as folder:
        row = measure(arguments, provenance, Path(folder))
    if arguments.output:
        append_rows(arguments.output, [row])
    print(format_table([row], {name: attrgetter(name) for name in COLUMNS}))
    is_met = row.ratio <= row.bar if row.bar > 1 else row.ratio >= row.bar
    return 0 if is_met else 1


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latents",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", choices=("throughput", "simulated", "memory"))
    parser.add_argument("--photos", type=Path, default=SAMPLES, help="folder or tar (default: samples)")
    parser.add_argument("--side", type=int, default=0, metavar="PX", help="crop the photos to this side")
    parser.add_argument("--checkpoint", default="mini", help="of throughput (default mini)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns (default 5)")
    parser.add_argument(
        "--duration-s", type=float, default=20.0, metavar="S", help="of one turn (default 20)"
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="lanes or decoders (default: per core)")
    parser.add_argument("--images", type=positive, default=100_000, metavar="N", help="of memory")
    parser.add_argument("--output", type=Path, metavar="CSV", help="append the result to this file")
    parser.add_argument("--commit", help="recorded as the commit where the files are not a git checkout")
    return parser


def throughput(arguments: argparse.Namespace, provenance: Provenance, folder: Path) -> LatentsRow:
    """``drorae tokenize`` in turns with the bare loop."""
    staged = folder / "photos"
    staged.mkdir()
    photos = stage_photos(arguments.photos, arguments.side, staged)
    data = spread(photos, folder / "data", NUM_COPIES)
    torch.set_num_threads(num_cpus())  # of which the bare loop's variants are made
    candidates = variants(BATCHES)
    quick_s = arguments.duration_s / 4
    rates = {variant: run_bare(arguments.checkpoint, staged, variant, quick_s) for variant in candidates}
    logger.info("bare loop: %s", "; ".join(f"{variant}: {rate:.1f}" for variant, rate in rates.items()))
    finalists = sorted(candidates, key=lambda variant: rates[variant])[-2:]
    bare: defaultdict[Variant, list[float]] = defaultdict(list)
    ours = []
    options = TokenizeOptions([data], folder / "out", arguments.checkpoint, num_workers=arguments.workers)
    for number in range(arguments.rounds):
        for variant in finalists:
            bare[variant].append(run_bare(arguments.checkpoint, staged, variant, arguments.duration_s))
            logger.info("round %d, bare loop, %s: %.1f images/s", number + 1, variant, bare[variant][-1])
        ours.append(rate_of_engine(replace(options, output=folder / f"out{number}"), arguments.duration_s))
        logger.info("round %d, tokenize: %.1f images/s", number + 1, ours[-1])
    best = max(bare, key=lambda variant: median(bare[variant]))
    value, reference = median(ours), median(bare[best])
    return row(
        provenance, "throughput", arguments.checkpoint, len(ours), value, f"bare, {best}", reference, BAR
    )


def rate_of_engine(options: TokenizeOptions, duration_s: float) -> float:
    """Images per second of all lanes over some time, files written, from when every lane has begun."""
    job, _ = make_job(options, FolderStore(options.output))
    engine = local_engine(options, job, job.units)
    begun: set[int] = set()
    start_s, num_images = 0.0, 0
    with closing(engine.run()) as events:
        for event in events:
            if not isinstance(event, Encoded):
                continue
            if len(begun) < engine.num_lanes:
                begun.add(event.unit)
                start_s = time.perf_counter()
                continue
            num_images += event.num_images
            if time.perf_counter() - start_s > duration_s:
                break
        return num_images / (time.perf_counter() - start_s)


def simulated(arguments: argparse.Namespace, provenance: Provenance, folder: Path) -> LatentsRow:
    """One lane's loop around a device that sleeps, in turns with the decoding alone."""
    staged = folder / "photos"
    staged.mkdir()
    data = spread(stage_photos(arguments.photos, arguments.side, staged), folder / "data", NUM_COPIES)
    workers = arguments.workers or num_cpus()
    job, config = lane_of(data, folder / "out", workers)
    rates: defaultdict[float | None, list[float]] = defaultdict(list)
    for number in range(arguments.rounds):
        for device_s in (None, DEVICE_S):
            rates[device_s].append(rate_of_lane(job, config, device_s, arguments.duration_s))
            what = "decoding alone" if device_s is None else "with the device"
            logger.info("round %d, %s: %.1f images/s", number + 1, what, rates[device_s][-1])
    device_rate = job.identity.batch_size / DEVICE_S
    reference = min(median(rates[None]), device_rate)
    text = f"{workers} decoders, {DEVICE_S * 1e3:g} ms per batch of {job.identity.batch_size}"
    value, name = median(rates[DEVICE_S]), "the slower of decoding and device"
    return row(provenance, "simulated", text, arguments.rounds, value, name, reference, BAR)


def lane_of(data: Path, output: Path, num_decoders: int) -> tuple[Job, LaneConfig]:
    """A lane as a GPU has it, on the CPU."""
    options = TokenizeOptions([data], output, batch_size=64)
    job, _ = make_job(options, FolderStore(output))
    return job, LaneConfig("mini", "cpu", "auto", job.identity, job.store, num_decoders)


def rate_of_lane(job: Job, config: LaneConfig, device_s: float | None, duration_s: float) -> float:
    """Images per second of a lane whose device takes so long per batch, or that only decodes.

    As in a lane, a thread writes files; the device's results are zeros.
    """
    zeros = torch.zeros(job.identity.batch_size, 1, *job.identity.shape, dtype=job.identity.torch_dtype)
    units = itertools.cycle(job.units)
    free_s = start_s = time.perf_counter()
    num_images = 0

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        """Batches follow one another on the device; the host waits where it has three."""
        nonlocal free_s
        free_s = max(free_s, time.perf_counter()) + (device_s or 0.0)
        time.sleep(max(0.0, free_s - 2 * (device_s or 0.0) - time.perf_counter()))
        return zeros

    work: _OnDevice | None = None
    with ThreadPoolExecutor(1) as writer:
        for index, batch in enumerate(decoded_batches(config, lambda: next(units))):
            if index == 0:  # the decoders have started
                start_s = time.perf_counter()
                continue
            num_images += batch.num_images
            if device_s is not None:
                work = work or _OnDevice(batch.unit, job.identity, torch.device("cpu"))
                work.add(batch, encode)
                if batch.is_last:
                    writer.submit(work.write, job.store)
                    work = None
            if time.perf_counter() - start_s > duration_s:
                break
    return num_images / (time.perf_counter() - start_s)


class _OnDevice(UnitLatents):
    """Latents that come from a device which also takes their moments: the host only receives them."""

    def add(self, batch: DecodedBatch, encode: Encode) -> None:
        self.broken |= batch.broken
        latents = encode(batch.pixels)[: batch.num_images]
        self.latents[batch.start : batch.start + batch.num_images].copy_(latents)


def memory(arguments: argparse.Namespace, provenance: Provenance, folder: Path) -> LatentsRow:
    """A whole job of many small images."""
    staged = folder / "photos"
    staged.mkdir()
    data = spread(stage_photos(arguments.photos, TINY.image_size, staged), folder / "data", arguments.images)
    torch.manual_seed(0)
    Tokenizer(TINY).save(folder / "tiny")
    options = TokenizeOptions([data], folder / "out", str(folder / "tiny"), num_workers=arguments.workers)
    job, _ = make_job(options, FolderStore(options.output))
    engine = local_engine(options, job, job.units)
    samples: list[tuple[int, float]] = []
    num_images = 0
    for event in engine.run():
        num_images += event.num_images if isinstance(event, Encoded) else 0
        if num_images >= len(samples) * arguments.images / 100:
            samples.append((num_images, resident_mib([os.getpid(), *engine.pids])))
            logger.info("%d images: %.0f MiB", *samples[-1])
    early = [mib for count, mib in samples if 0.15 <= count / arguments.images <= 0.25]
    late = [mib for count, mib in samples if 0.85 <= count / arguments.images <= 0.95]
    text = f"{arguments.images} images, {engine.num_lanes} lanes"
    reference = "MiB after a fifth"
    return row(provenance, "memory", text, 1, median(late), reference, median(early), MEMORY_BAR)


def resident_mib(pids: Sequence[int]) -> float:
    """Resident memory of processes together, MiB."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in pids]
    return sum(pages) * resource.getpagesize() / 2**20


def spread(photos: Sequence[Path], folder: Path, count: int) -> Path:
    """A data set of so many images in folders of 1,000: links to the photos, in turns."""
    for index in range(count):
        place = folder / f"{index // 1000:04d}"
        if index % 1000 == 0:
            place.mkdir(parents=True)
        os.link(photos[index % len(photos)], place / f"{index:07d}.jpg")
    return folder


def row(
    provenance: Provenance,
    scenario: str,
    configuration: str,
    num_rounds: int,
    value: float,
    reference: str,
    reference_value: float,
    bar: float,
) -> LatentsRow:
    """A row, with the ratio."""
    return LatentsRow(
        **asdict(provenance),
        scenario=scenario,
        configuration=configuration,
        num_rounds=num_rounds,
        value=value,
        reference=reference,
        reference_value=reference_value,
        ratio=value / reference_value,
        bar=bar,
    )


if __name__ == "__main__":
    sys.exit(main())
