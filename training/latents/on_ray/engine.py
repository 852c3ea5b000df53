"""The engine of a Ray cluster: every actor holds a lane, and writes files where all machines see them."""

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

import torch

from model.checkpoints.tokenizers import BUNDLED_DIRECTORY, open_checkpoint, resolve_checkpoint
from training.errors import ClusterError
from training.latents.jobs import Job
from training.latents.lanes import (
    PREFETCHED_BATCHES,
    Done,
    Encoded,
    LaneConfig,
    Message,
    encode_all,
    load_encoder,
)
from training.latents.manifest import MANIFEST_FILE, ShardRecord
from training.latents.on_ray.actors import Team, cluster_resources, connection, work_on_ray
from training.latents.tokenize import TokenizeOptions, tokenize_command
from training.latents.units import Unit


@dataclass(frozen=True)
class ClusterOptions:
    """Where the command's units are encoded.

    Attributes:
        address: of the cluster, or ``local``.
        hang_limit_s: seconds in which an actor must get ready, and then finish one unit after another.
    """

    address: str
    hang_limit_s: float = 1800.0


def tokenize_on_ray(options: TokenizeOptions, cluster: ClusterOptions) -> int:
    """As `tokenize_command`, on the devices of a cluster; ``options.devices`` does not count.

    Raises:
        ClusterError: there is no cluster, or its machines do not share the folder.
        Exception: as `tokenize_command`.
    """
    with connection(cluster.address):
        num_cpus, num_gpus = cluster_resources()
        devices = ["cuda"] * num_gpus or ["cpu"] * min(options.num_workers or num_cpus, num_cpus)
        options = replace(options, devices=devices, output=options.output.absolute())
        num_decoders = (options.num_workers or max(1, num_cpus // num_gpus)) if num_gpus else 0
        return tokenize_command(options, partial(_engine, cluster, num_decoders))


def _engine(
    cluster: ClusterOptions, num_decoders: int, options: TokenizeOptions, job: Job, units: Sequence[Unit]
) -> "RayEngine":
    path = resolve_checkpoint(options.checkpoint)
    # A bundled checkpoint lies elsewhere on other machines, and has the same name.
    checkpoint = path.name if path.parent == BUNDLED_DIRECTORY else str(path.absolute())
    config = LaneConfig(checkpoint, options.devices[0], options.fusion, job.identity, job.store, num_decoders)
    return RayEngine(config, units, len(options.devices), cluster.hang_limit_s)


class RayEngine:
    """Runs units on the actors of the Ray cluster that this process is connected to.

    Args:
        config: of every lane.
        units: to be encoded.
        num_lanes: actors.
        hang_limit_s: as `ClusterOptions` has it.
    """

    def __init__(
        self, config: LaneConfig, units: Sequence[Unit], num_lanes: int, hang_limit_s: float
    ) -> None:
        self.num_lanes = num_lanes
        self._build = partial(CalledLane, config)
        self._units = units
        # What the decoders work ahead, and a unit whose file is being written meanwhile.
        images_ahead = PREFETCHED_BATCHES * config.num_decoders * config.identity.batch_size
        units_ahead = 1 + -(-images_ahead // config.identity.images_per_shard)
        self._team = Team(num_lanes, units_ahead, hang_limit_s)

    def run(self) -> Iterator[Encoded | Done]:
        """Events of finished units.

        Raises:
            WorkerError: a unit ended several actors.
            TrainingError, ModelError, OSError: the lane's own error.
        """
        for number, record in work_on_ray(self._build, self._units, self._team):
            yield Encoded(number, record.n + record.broken, record.broken)
            yield Done(number, record)


class CalledLane:
    """A lane that gets its units by calls, from several threads; each waits for its unit's file.

    Raises:
        ClusterError: this machine does not see the folder of latents, or has another checkpoint.
        ModelError: the checkpoint cannot be loaded, or the fusion cannot run here.
    """

    def __init__(self, config: LaneConfig) -> None:
        if config.device == "cpu":
            torch.set_num_threads(1)
        _check_machine(config)
        self._config = config
        self._encode = load_encoder(config)
        self._units: SimpleQueue[Unit] = SimpleQueue()
        self._next: Unit | None = None
        self._files: dict[int, Future[ShardRecord]] = {}
        Thread(target=self._run, name="lane", daemon=True).start()

    def __call__(self, unit: Unit) -> tuple[int, ShardRecord]:
        """Encode a unit; its number and the record of its file."""
        file: Future[ShardRecord] = Future()
        self._files[unit.number] = file
        self._units.put(unit)
        return unit.number, file.result()

    def _ask(self) -> Unit | None:
        """The next unit; None where none waits, so that those that were begun are finished."""
        try:
            unit, self._next = self._next or self._units.get_nowait(), None
        except Empty:
            return None
        return unit

    def _take(self, message: Message) -> None:
        if isinstance(message, Done):
            self._files.pop(message.unit).set_result(message.record)

    def _run(self) -> None:
        try:
            while True:
                self._next = self._units.get()
                encode_all(self._config, self._encode, self._ask, self._take)
        except Exception as exc:  # the thread's boundary: the calls that wait raise it
            for file in list(self._files.values()):
                file.set_exception(exc)


def _check_machine(config: LaneConfig) -> None:
    host, place = socket.gethostname(), config.store.path("")
    if config.store.size(MANIFEST_FILE) is None:
        raise ClusterError(f"{host} sees no {MANIFEST_FILE} in {place}: all machines must share that folder")
    found = open_checkpoint(resolve_checkpoint(config.checkpoint)).info.sha256
    if found != config.identity.checkpoint_sha256:
        raise ClusterError(
            f"{host} has another checkpoint at {config.checkpoint}: sha256 {found[:12]}..., not "
            f"{config.identity.checkpoint_sha256[:12]}..."
        )
