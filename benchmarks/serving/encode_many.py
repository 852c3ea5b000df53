"""``encode_many`` of both clients against the load generator, which costs next to nothing.

All send the same photos to one service with as many images in flight, in turns: the generator as single
images, the clients as single images and in batches of eight. Each is a process of its own, as all share the
cores with the service.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from itertools import cycle
from pathlib import Path

from benchmarks.harness.photos import SAMPLES, read_photos, stage_photos
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.service import Service, launch
from benchmarks.serving.client import Load, run_client
from drorae_client import AsyncClient, Client

TARGET = "/encode?format=raw"
IN_FLIGHT = (16, 64)
BATCHES = (1, 8)
BAR = 0.95
_WARMUP = 0.2
_LIMIT_S = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and show a table; 0 where the best batch of both clients meets the bar at every load."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.encode_many", description=__doc__)
    parser.add_argument("--photos", type=Path, default=SAMPLES, help="tar or folder (default: samples)")
    parser.add_argument("--checkpoint", default="mini", help="what is served (default: %(default)s)")
    parser.add_argument("--duration-s", type=float, default=15.0, help="of one trial (default: %(default)g)")
    parser.add_argument("--rounds", type=int, default=3, help="turns (default: %(default)d)")
    parser.add_argument("--client", help=argparse.SUPPRESS)  # this process is one client's
    arguments = parser.parse_args(argv)
    if arguments.client:
        print(run_one(**json.loads(arguments.client)))
        return 0
    with tempfile.TemporaryDirectory(prefix="drorae-encode-many-") as folder:
        stage_photos(arguments.photos, 256, Path(folder))
        with launch({"checkpoint": arguments.checkpoint, "log_level": "warning"}) as service:
            shares = [
                share
                for in_flight in IN_FLIGHT
                for share in compare(service, folder, in_flight, arguments.duration_s, arguments.rounds)
            ]
    return 0 if min(shares) >= BAR else 1


def compare(service: Service, folder: str, in_flight: int, duration_s: float, rounds: int) -> list[float]:
    """Print the rates at one load; gives each client's best share of the generator's."""
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        load = Load(service.url, TARGET, folder, in_flight, duration_s, warmup_s=_WARMUP * duration_s)
        rates.setdefault("generator", []).append(run_client(load).ok_per_s)
        for kind in ("sync", "async"):
            for batch in BATCHES:
                task = {"url": service.url, "folder": folder, "kind": kind, "batch": batch}
                rate = run_apart({**task, "concurrency": in_flight // batch, "duration_s": duration_s})
                rates.setdefault(f"{kind}, batch {batch}", []).append(rate)
    reference = statistics.median(rates["generator"])
    shares = {name: statistics.median(values) / reference for name, values in rates.items()}
    print(f"{in_flight} images in flight")
    for name, values in rates.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"  {name:16} {statistics.median(values):7.1f} images/s  {shares[name]:.3f}  ({each})")
    return [max(shares[f"{kind}, batch {batch}"] for batch in BATCHES) for kind in ("sync", "async")]


def run_apart(task: dict[str, str | int | float]) -> float:
    """Images per second of a client in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving.encode_many", "--client", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=_LIMIT_S, check=True)
    return float(done.stdout)


def run_one(url: str, folder: str, kind: str, batch: int, concurrency: int, duration_s: float) -> float:
    """Images per second after a warm-up, while the client is kept busy."""
    photos = cycle(read_photos(Path(folder)))
    begin_s = time.perf_counter() + _WARMUP * duration_s
    end_s = begin_s + duration_s
    times: list[float] = []
    if kind == "sync":
        with Client(url) as client:
            for _ in client.encode_many(photos, batch=batch, concurrency=concurrency):
                times.append(time.perf_counter())
                if times[-1] > end_s:
                    break
    else:
        asyncio.run(_run_async(url, photos, batch, concurrency, end_s, times))
    return sum(begin_s <= moment < end_s for moment in times) / duration_s


async def _run_async(
    url: str, photos: "cycle[bytes]", batch: int, concurrency: int, end_s: float, times: list[float]
) -> None:
    async with (
        AsyncClient(url) as client,
        aclosing(client.encode_many(photos, batch=batch, concurrency=concurrency)) as results,
    ):
        async for _ in results:
            times.append(time.perf_counter())
            if times[-1] > end_s:
                break


if __name__ == "__main__":
    sys.exit(main())
