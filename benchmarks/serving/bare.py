"""The bare loop: photos decoded, preprocessed and encoded as fast as this machine can, without any HTTP.

Run by `run_bare` in a process of its own, so that neither torch's threads nor its memory are shared.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness.photos import read_photos
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.script import positive
from model.tokenizer import Tokenizer
from service.codecs.images import read_image
from service.photos.decode import ImageRules
from service.settings import Settings


class BareError(Exception):
    """The bare loop failed; shows its output."""


@dataclass(frozen=True)
class Variant:
    """One way to run the loop: so many side by side, each with so many of torch's threads."""

    num_loops: int
    num_threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.num_loops} loops x {self.num_threads} threads, batches of {self.batch}"


def variants(batches: Sequence[int]) -> list[Variant]:
    """One loop with torch's own threads, and one single-threaded loop per core, at every batch size."""
    cores = torch.get_num_threads()
    shapes = [(1, cores)] if cores == 1 else [(1, cores), (cores, 1)]
    return [Variant(loops, threads, batch) for loops, threads in shapes for batch in batches]


def run_bare(checkpoint: str, folder: Path, variant: Variant, duration_s: float) -> float:
    """Run the loop in a process of its own; gives images per second.

    Raises:
        BareError: it did not finish.
    """
    flags = {"checkpoint": checkpoint, "folder": folder, "duration-s": duration_s}
    flags |= {name.replace("_", "-"): value for name, value in asdict(variant).items()}
    command = [sys.executable, "-m", "benchmarks.serving.bare"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise BareError(f"the bare loop ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout)["images_per_s"])


def measure(checkpoint: str, photos: Sequence[bytes], variant: Variant, duration_s: float) -> float:
    """Images a second over ``duration_s``, after one batch of every loop."""
    torch.set_num_threads(variant.num_threads)
    tokenizer = Tokenizer.load(checkpoint)
    limits = Settings(checkpoint=checkpoint)
    rules = ImageRules(
        tokenizer.config.image_size, limits.max_image_pixels, limits.max_aspect_ratio, exact=False
    )
    counts = [0] * variant.num_loops
    ends_s = [0.0] * variant.num_loops
    together = threading.Barrier(variant.num_loops + 1)

    def encode(first: int) -> None:
        chosen = [photos[(first + k) % len(photos)] for k in range(variant.batch)]
        tokenizer.encode(torch.stack([read_image(photo, rules) for photo in chosen]))

    def loop(number: int) -> None:
        torch.set_num_threads(variant.num_threads)  # OpenMP keeps the number for each thread
        with torch.inference_mode():
            encode(number)
            together.wait()
            end_s = time.perf_counter() + duration_s
            while time.perf_counter() < end_s:
                encode(number + counts[number])
                counts[number] += variant.batch
        ends_s[number] = time.perf_counter()

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(variant.num_loops)]
    for thread in threads:
        thread.start()
    together.wait()
    begin_s = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(count / (end_s - begin_s) for count, end_s in zip(counts, ends_s, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """One variant, once; writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.bare", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--duration-s", type=float, required=True)
    parser.add_argument("--num-loops", type=positive, required=True)
    parser.add_argument("--num-threads", type=positive, required=True)
    parser.add_argument("--batch", type=positive, required=True)
    arguments = parser.parse_args(argv)
    variant = Variant(arguments.num_loops, arguments.num_threads, arguments.batch)
    photos = read_photos(arguments.folder)
    images_per_s = measure(arguments.checkpoint, photos, variant, arguments.duration_s)
    json.dump({"images_per_s": images_per_s}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
