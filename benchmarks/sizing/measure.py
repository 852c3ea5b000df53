"""Measures what steps cost on this machine's host, and holds the model to runs of the service."""

import io
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from benchmarks.harness.photos import QUALITY, SAMPLES, read_photos
from benchmarks.harness.provenance import Provenance
from benchmarks.harness.service import Service, launch
from benchmarks.serving.bare import Variant, run_bare
from benchmarks.serving.client import Load
from benchmarks.serving.simulated import DEFAULT_BATCH_MS, MAX_BATCH
from benchmarks.serving.trials import Trial, run_trial
from benchmarks.sizing.costs import FrontCosts, HostCosts
from benchmarks.sizing.simulation import BatchCost, Machine, Outcome, Traffic, simulate
from model.process import num_cpus
from service.codecs.images import read_image, write_picture
from service.engine.devices import share_cpus
from service.photos.decode import ImageRules
from service.settings import Settings

logger = logging.getLogger(__name__)

SIDE = 256
PHOTO_SIZES = ((256, 256), (500, 375), (1920, 1440), (4000, 3000))
PICTURES = ("png", "jpeg")
MANY = 16
"""Images of a request, to tell its own cost from theirs."""
NUM_FRONTS = 2
BAR = 0.15
"""Most that the model's rate may be off."""
_TARGET = "/encode?format=raw"
_BATCHES = (1, 8)
_MIN_S = 0.5


@dataclass(frozen=True)
class SizingRow(Provenance):
    """The model beside a run of the service."""

    scenario: str
    clients: int
    images_per_request: int
    measured_per_s: float
    """Images; medians of the rounds."""
    model_per_s: float
    ratio: float
    measured_p50_ms: float
    model_p50_ms: float
    bottleneck: str
    num_rounds: int


@dataclass(frozen=True)
class Trials:
    """Runs of one load; CPU times are medians of the rounds, seconds."""

    load: Load
    trials: list[Trial]

    @property
    def images_per_s(self) -> float:
        return (
            statistics.median(trial.report.ok_per_s for trial in self.trials) * self.load.images_per_request
        )

    @property
    def p50_ms(self) -> float:
        return statistics.median(trial.report.latencies[200].p50_ms for trial in self.trials)

    def part_s(self, part: str) -> float:
        """CPU time of one of the service's parts per request."""
        return statistics.median(trial.part_cpu_ms_per_request(part) for trial in self.trials) / 1e3

    @property
    def client_s(self) -> float:
        """CPU time of the client per request."""
        return statistics.median(trial.client_cpu_ms_per_request for trial in self.trials) / 1e3


def measure(
    folder: Path, clients: int, duration_s: float, rounds: int, provenance: Provenance
) -> tuple[HostCosts, list[SizingRow]]:
    """Costs of this host, and the model beside the service around a simulated device and on this CPU.

    Args:
        folder: of staged photos of `SIDE` pixels.
        clients: of the closed loops.
        duration_s: of each run, seconds.
        rounds: runs of each load.
        provenance: of the rows.
    """
    loads = [(clients, 1), (2 * clients, 1), (max(1, clients // MANY), MANY)]
    device = {"batch_size": str(MAX_BATCH), "cpu_workers": "1", "cpu_threads": "1"}
    with launch({"log_level": "warning", **device}, "benchmarks.serving.simulated") as service:
        simulated = [_run(service, folder, *load, duration_s, rounds) for load in loads]
    with launch(
        {"log_level": "warning", "frontends": str(NUM_FRONTS), **device}, "benchmarks.serving.simulated"
    ) as service:
        fronted = [_run(service, folder, *load, duration_s, rounds) for load in loads]
    host = _host_costs(folder, simulated, fronted, duration_s, provenance)
    with launch({"log_level": "warning"}) as service:
        real = [_run(service, folder, *load, duration_s, rounds) for load in ((1, 1), loads[0], loads[2])]
    shares = share_cpus(Settings())
    on_device = Machine(num_cpus(), shares.num_decoders, batch_size=MAX_BATCH, depth=1)
    on_cpu = Machine(num_cpus(), shares.num_decoders, shares.num_workers, 8, computes=True)
    batches = (BatchCost(DEFAULT_BATCH_MS / 1e3, 0.0), BatchCost(*host.batch_s))
    rows = [_compare("simulated device", provenance, host, on_device, batches[0], run) for run in simulated]
    with_fronts = replace(on_device, num_fronts=NUM_FRONTS)
    name = f"simulated device, {NUM_FRONTS} fronts"
    rows += [_compare(name, provenance, host, with_fronts, batches[0], run) for run in fronted]
    rows += [_compare("mini on the CPU", provenance, host, on_cpu, batches[1], run) for run in real]
    return host, rows


def _run(
    service: Service, folder: Path, clients: int, num_images: int, duration_s: float, rounds: int
) -> Trials:
    load = Load(service.url, _TARGET, str(folder), clients, duration_s, images_per_request=num_images)
    trials = []
    for number in range(rounds):
        trials.append(run_trial(service, load))
        rate = trials[-1].report.ok_per_s * num_images
        logger.info("round %d, %d clients x %d images: %.1f images/s", number + 1, clients, num_images, rate)
    return Trials(load, trials)


def _python_costs(runs: Sequence[Trials], part: str) -> tuple[float, float]:
    """CPU time of a part per request, and per image of it."""
    single, _, many = runs
    item_s = max(0.0, (many.part_s(part) - single.part_s(part)) / (MANY - 1))
    return single.part_s(part) - item_s, item_s


def _host_costs(
    folder: Path,
    simulated: Sequence[Trials],
    fronted: Sequence[Trials],
    duration_s: float,
    provenance: Provenance,
) -> HostCosts:
    """From runs around a simulated device, all of whose CPU time is the host's."""
    single = simulated[0]
    request_s, item_s = _python_costs(simulated, "main")
    decode_s = {f"{width}x{height}": _decoding_s(width, height) for width, height in PHOTO_SIZES}
    # In the service a decoder also passes bytes and pixels on, whatever the photo's size.
    passing_s = max(0.0, single.part_s("decoders") - _seconds(_reading(read_photos(folder)[0])))
    return HostCosts(
        machine=provenance.device,
        commit=provenance.commit,
        request_s=request_s,
        item_s=item_s,
        client_s=single.client_s,
        decode_s={name: seconds + passing_s for name, seconds in decode_s.items()},
        picture_s={name: _seconds(_writing(folder, name)) for name in PICTURES},
        batch_s=_batch_cost(folder, duration_s),
        behind_fronts=FrontCosts(*_python_costs(fronted, "main"), *_python_costs(fronted, "fronts")),
    )


def _batch_cost(folder: Path, duration_s: float) -> tuple[float, float]:
    """Of the bare loop with as many single-threaded loops as there are cores, without decoding."""
    loops = num_cpus()
    decode_s = _seconds(_reading(read_photos(folder)[0]))
    small, large = (
        loops * size / run_bare("mini", folder, Variant(loops, 1, size), duration_s) - size * decode_s
        for size in _BATCHES
    )
    item_s = (large - small) / (_BATCHES[1] - _BATCHES[0])
    return max(0.0, small - item_s), item_s


def _decoding_s(width: int, height: int) -> float:
    """CPU time to decode a sample of so many pixels."""
    with Image.open(SAMPLES / "bridge.jpg") as photo:
        buffer = io.BytesIO()
        photo.convert("RGB").resize((width, height)).save(buffer, "jpeg", quality=QUALITY)
    return _seconds(_reading(buffer.getvalue()))


def _reading(data: bytes) -> Callable[[], object]:
    settings = Settings()
    rules = ImageRules(
        SIDE, settings.max_image_pixels, settings.max_aspect_ratio, exact=settings.exact_images
    )
    return lambda: read_image(data, rules)


def _writing(folder: Path, name: str) -> Callable[[], object]:
    pixels = _reading(read_photos(folder)[0])()
    assert isinstance(pixels, torch.Tensor)
    unit = pixels.float() / 255
    return lambda: write_picture(unit, name)  # type: ignore[arg-type]  # one of PICTURES


def _seconds(action: Callable[[], object]) -> float:
    """CPU time of a call: the mean over half a second, after one that does not count."""
    action()
    begin_s, count = time.process_time(), 0
    while time.process_time() - begin_s < _MIN_S:
        action()
        count += 1
    return (time.process_time() - begin_s) / count


def _compare(
    scenario: str, provenance: Provenance, host: HostCosts, machine: Machine, batch: BatchCost, run: Trials
) -> SizingRow:
    photo = f"{SIDE}x{SIDE}"
    costs = host.costs(batch, photo, client_s=host.client_s, num_fronts=machine.num_fronts)
    load = run.load
    outcome: Outcome = simulate(machine, costs, Traffic(load.clients, 0.0, load.images_per_request))
    return SizingRow(
        **vars(provenance),
        scenario=scenario,
        clients=load.clients,
        images_per_request=load.images_per_request,
        measured_per_s=run.images_per_s,
        model_per_s=outcome.images_per_s,
        ratio=outcome.images_per_s / run.images_per_s,
        measured_p50_ms=run.p50_ms,
        model_p50_ms=outcome.p50_ms,
        bottleneck=outcome.bottleneck,
        num_rounds=len(run.trials),
    )
