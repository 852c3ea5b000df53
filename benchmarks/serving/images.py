"""The host's work on an image, as it was and as it is: ``python -m benchmarks.serving.images --help``."""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness.photos import SAMPLES
from benchmarks.harness.provenance import Provenance, read_provenance
from benchmarks.harness.results import append_rows, check_columns, format_table
from benchmarks.harness.script import positive
from model.images.costs import check_parts
from model.images.files import fit_picture
from model.images.opening import open_picture
from model.images.tensors import collate, to_byte_tensor
from model.tokenizer import Tokenizer
from service.codecs.images import write_picture
from service.engine.cuda import CudaLaunched
from service.engine.operations import finished
from service.photos.decode import ImageRules, decode_image

EPILOG = """\
examples:
  python -m benchmarks.serving.images --output benchmarks/results/images.csv

Both ways run in turns, on one thread; times are CPU times, so that a busy machine does little to their ratio.
"""
SIDE = 256
BATCH = 64
LATENT = (768, 16, 16)
ROUNDS = 15
COLUMNS = ("case", "before_ms", "now_ms", "ratio", "p20_ratio", "p80_ratio", "bar")

Work = Callable[[], object]


@dataclass(frozen=True)
class ImagesRow(Provenance):
    """One comparison.

    Attributes:
        case: of the work.
        before_ms, now_ms: medians of the CPU time, milliseconds.
        ratio: median of the rounds' ratios, before over now; with quantiles.
        bar: least that the ratio must be.
        met: whether it is.
    """

    case: str
    before_ms: float
    now_ms: float
    ratio: float
    p20_ratio: float
    p80_ratio: float
    bar: float | None
    met: str


@dataclass(frozen=True)
class Case:
    """Two ways to do the same work, with the bar of their ratio."""

    name: str
    before: Work
    now: Work
    bar: float | None = None


class _Reached:
    """An event of a device that has long done its work."""

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "_Reached") -> float:
        return 1.0


def cases() -> list[Case]:
    """The host's work on images, in the order of a request."""
    picture = Tokenizer.load("mini").reconstruct(to_byte_tensor(photo((SIDE, SIDE), noise=0))[None])
    as_bytes = finished(picture, torch.uint8)[0]
    decoded = [to_byte_tensor(photo((SIDE, SIDE))) for _ in range(BATCH)]
    return [
        _preparation("JPEG 500x375", jpeg((500, 375)), 1.6),
        _preparation("JPEG 1280x853", jpeg((1280, 853))),
        _preparation("JPEG 4000x3000", jpeg((4000, 3000)), 6.0),
        _preparation("JPEG 4000x3000, progressive", jpeg((4000, 3000), progressive=True)),
        Case("fill 64 pictures", lambda: _planar(decoded), lambda: collate(decoded)),
        _results("64 latents", torch.randn(BATCH, *LATENT), torch.float16),
        _results("64 pictures", torch.rand(BATCH, 3, SIDE, SIDE), torch.uint8),
        Case(
            "PNG answer",
            lambda: write_picture(picture[0], "png", "small"),
            lambda: write_picture(as_bytes, "png"),
            2.5,
        ),
    ]


def photo(size: tuple[int, int], noise: float = 3) -> Image.Image:
    """A real photo at that size, with noise as of a sensor, so that enlarged ones have details too."""
    source = max(SAMPLES.glob("*.jpg"), key=lambda path: path.stat().st_size)
    with Image.open(source) as opened:
        pixels = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.float32)
    noisy = pixels + np.random.default_rng(0).normal(0, noise, pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def jpeg(size: tuple[int, int], **options: bool) -> bytes:
    """A photo of that size as a JPEG file."""
    buffer = io.BytesIO()
    photo(size).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def _preparation(name: str, data: bytes, bar: float | None = None) -> Case:
    """A file to pixels: exactly and with a copy of the whole picture, against the service's way."""
    rules = ImageRules(SIDE, 50_000_000, 20, exact=False)

    def exactly() -> bytes:
        check_parts(data)
        with open_picture(data) as picture:
            return fit_picture(picture.read(), SIDE).tobytes()

    return Case(name, exactly, lambda: decode_image(data, rules).tobytes(), bar)


def _planar(pictures: Sequence[Tensor]) -> Tensor:
    """Planes of interleaved pictures, as the host once made them."""
    planes = torch.empty(len(pictures), 3, SIDE, SIDE, dtype=torch.uint8)
    for place, pixels in zip(planes, pictures, strict=True):
        place.copy_(pixels)
    return planes


def _results(name: str, results: Tensor, dtype: torch.dtype) -> Case:
    """The wait for a GPU's results: widened to float32, against as the device leaves them."""
    as_computed, as_answered = results.to(torch.bfloat16), finished(results, dtype)
    event = cast(torch.cuda.Event, _Reached())
    largest = torch.ones(BATCH, dtype=torch.bfloat16)
    launched = CudaLaunched(as_answered, largest, event, event, event)
    return Case(f"wait for {name}", lambda: as_computed.to(torch.float32, copy=True), launched.wait, 5.0)


def compare(case: Case, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of both ways, round by round, after one that is not counted."""
    case.before(), case.now()
    before: list[float] = []
    now: list[float] = []
    for _ in range(rounds):
        for work, times in ((case.before, before), (case.now, now)):
            started_s = time.process_time()
            work()
            times.append(time.process_time() - started_s)
    return before, now


def row_of(case: Case, rounds: int, provenance: Provenance) -> ImagesRow:
    """Measure one case."""
    before, now = compare(case, rounds)
    ratios = [old / max(new, 1e-9) for old, new in zip(before, now, strict=True)]
    p20, ratio, p80 = np.quantile(ratios, (0.2, 0.5, 0.8)).tolist()
    met = "" if case.bar is None else "yes" if ratio >= case.bar else "no"
    middles = (1e3 * statistics.median(times) for times in (before, now))
    return ImagesRow(
        **asdict(provenance),
        **dict(zip(COLUMNS, (case.name, *middles, ratio, p20, p80, case.bar), strict=True)),
        met=met,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit status is 1 where a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.images",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=positive, default=ROUNDS, metavar="N", help="rounds (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--commit", help="recorded instead of git's")
    arguments = parser.parse_args(argv)
    if arguments.output:
        check_columns(arguments.output, ImagesRow)
    torch.set_num_threads(1)
    provenance = read_provenance(torch.device("cpu"), torch.float32, arguments.commit)
    rows = [row_of(case, arguments.rounds, provenance) for case in cases()]
    print(format_table(rows, {name: attrgetter(name) for name in COLUMNS}))
    if arguments.output:
        append_rows(arguments.output, rows)
    return int(any(row.met == "no" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
