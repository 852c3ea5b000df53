"""The host path alone: our service, LitServe and naive FastAPI handlers around one simulated device."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from benchmarks.harness.provenance import Provenance
from benchmarks.harness.service import PARTS, Service, launch
from benchmarks.serving.client import Load, run_client
from benchmarks.serving.report import Bar, ServingRow, images_per_s, row_of_trials
from benchmarks.serving.simulated import MAX_BATCH
from benchmarks.serving.trials import Options, Trial, run_trial

logger = logging.getLogger(__name__)

BARS = {"litserve": 1.8, "naive": 3.0}
"""Least that our rate is over theirs."""
_CHOICE_SHARE = 0.3
_FIRST_S = 1.0  # of a server's life, which is not measured

# A GPU has one engine that takes up to 32 images; one thread of torch's, for there is nothing to compute.
_OUR_SETTINGS = {"batch_size": str(MAX_BATCH), "cpu_workers": "1", "cpu_threads": "1"}
_NAIVE = {"FastAPI, def handler": ("sync",), "FastAPI, async handler": ("async",)}
_LITSERVE = {
    f"{workers} workers, {servers} API servers, batch_timeout {timeout_s:g} s": (
        "litserve",
        f"--workers={workers}",
        f"--api-servers={servers}",
        f"--batch-timeout-s={timeout_s:g}",
    )
    for workers, servers in ((1, 1), (2, 1), (2, 2))
    for timeout_s in (0.0, 0.002, 0.005, 0.01)
}


@dataclass(frozen=True)
class System:
    """One way to serve the device: a module with its arguments."""

    name: str
    configuration: str
    module: str
    arguments: tuple[str, ...]
    settings: Mapping[str, str]
    target: str
    ready_path: str

    def launch(self) -> AbstractContextManager[Service]:
        """Start it; it ends with the block."""
        # Several processes with a pool of torch's threads each would fight for the cores.
        environment = {} if self.name == "service" else {"OMP_NUM_THREADS": "1"}
        return launch(
            self.settings,
            self.module,
            self.arguments,
            ready_path=self.ready_path,
            environment=environment,
        )


def measure_host(options: Options, provenance: Provenance) -> Iterator[list[ServingRow]]:
    """Rows of all systems, each peer in the fastest of its configurations."""
    systems = [_ours(options), _fastest(options, _peers(options, "naive", _NAIVE))]
    if options.peer_python is None:
        logger.warning("skipped litserve: --peer-python names no environment that has it")
    else:
        systems.insert(1, _fastest(options, _peers(options, "litserve", _LITSERVE)))
    counts = (options.clients, 2 * options.clients)
    trials: defaultdict[tuple[str, int], list[Trial]] = defaultdict(list)
    for number in range(options.rounds):
        for system in systems:
            with system.launch() as service:
                run_client(_load(options, system, service, options.clients, _FIRST_S))
                for clients in counts:
                    load = _load(options, system, service, clients, options.duration_s)
                    trial = run_trial(service, load)
                    trials[system.name, clients].append(trial)
                    logger.info(
                        "round %d, %s, %d clients: %.1f images/s, %.2f ms of CPU per request (%s)",
                        number + 1,
                        system.name,
                        clients,
                        images_per_s([trial]),
                        trial.cpu_ms_per_request,
                        ", ".join(f"{part} {trial.part_cpu_ms_per_request(part):.2f}" for part in PARTS),
                    )
    yield list(_rows(provenance, systems, counts, trials))


def _rows(
    provenance: Provenance,
    systems: Sequence[System],
    counts: Sequence[int],
    trials: Mapping[tuple[str, int], Sequence[Trial]],
) -> Iterator[ServingRow]:
    """A row for every system and number of clients; ours has one for each peer."""
    ours, *peers = systems
    for clients in counts:
        for peer in peers:
            yield row_of_trials(
                provenance,
                "host",
                peer.name,
                trials[peer.name, clients],
                clients=clients,
                configuration=peer.configuration,
            )
        for peer in peers:
            row = row_of_trials(
                provenance,
                "host",
                ours.name,
                trials[ours.name, clients],
                clients=clients,
                configuration=ours.configuration,
            )
            ratio = row.images_per_s / images_per_s(trials[peer.name, clients])
            yield row.held_to(Bar(f"{peer.name} images/s", ratio, BARS[peer.name]))


def _ours(options: Options) -> System:
    settings = {**options.service_settings, **_OUR_SETTINGS, **options.settings}
    shown = {name: value for name, value in settings.items() if name not in ("checkpoint", "log_level")}
    return System(
        "service",
        " ".join(f"{name}={value}" for name, value in shown.items()),
        "benchmarks.serving.simulated",
        (f"--device-ms={options.device_ms:g}",),
        settings,
        "/encode?format=raw",
        "/readyz",
    )


def _peers(options: Options, name: str, configurations: Mapping[str, tuple[str, ...]]) -> list[System]:
    common = [f"--device-ms={options.device_ms:g}"]
    if name == "litserve":
        common += [f"--lock-file={options.folder / 'device.lock'}", f"--python={options.peer_python}"]
    base = System(
        name,
        "",
        "benchmarks.serving.peers",
        (),
        {"checkpoint": options.checkpoint},
        "/encode",
        "/health",
    )
    return [
        replace(base, configuration=text, arguments=(*arguments, *common))
        for text, arguments in configurations.items()
    ]


def _fastest(options: Options, systems: Sequence[System]) -> System:
    """The configuration that is best in a short trial."""
    rates = {}
    for system in systems:
        with system.launch() as service:
            run_client(_load(options, system, service, options.clients, _FIRST_S))
            duration_s = _CHOICE_SHARE * options.duration_s
            report = run_client(_load(options, system, service, options.clients, duration_s))
        rates[system.configuration] = report.ok_per_s
        logger.info("%s, %s: %.1f images/s", system.name, system.configuration, report.ok_per_s)
    return max(systems, key=lambda system: rates[system.configuration])


def _load(options: Options, system: System, service: Service, clients: int, duration_s: float) -> Load:
    folder = str(options.folder)
    return Load(service.url, system.target, folder, clients, duration_s, warmup_s=options.warmup_s)
