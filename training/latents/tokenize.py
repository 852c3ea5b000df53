"""``drorae tokenize``: a data set to a folder of latents."""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tqdm import tqdm

from kernels.dispatch import FusionSetting
from model.checkpoints.tokenizers import OpenedCheckpoint, open_checkpoint, resolve_checkpoint
from model.images.files import Fit
from model.process import num_cpus
from model.tokenizer import LatentKind
from training.errors import LatentsError
from training.latents.engine import Event, LocalEngine
from training.latents.jobs import Job, complete_job, explaining_a_full_disk, open_job, start_job, verify
from training.latents.lanes import Done, Encoded, LaneConfig, Ready
from training.latents.manifest import DtypeName, Identity, ManifestOf, ShardRecord
from training.latents.planning import Plan, describe_left_out, plan_units
from training.latents.shards import read_header
from training.latents.storage.objects import ObjectStore
from training.latents.storage.places import is_remote
from training.latents.store import FolderStore, Store
from training.latents.units import Unit

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_SOME_BROKEN = 0, 3
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 8, 64
MAX_BROKEN = 10_000
NUM_SHOWN = 5
"""Broken images that the summary names."""
_HEADER_BYTES = 150
"""Of one image in a file's header, about."""


class Engine(Protocol):
    """Encodes units somewhere.

    Attributes:
        num_lanes: encoders that run side by side.
    """

    num_lanes: int

    def run(self) -> Iterator[Event]:
        """Events, until all units are done."""


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of ``drorae tokenize``; see its help.

    Attributes:
        data, output: paths, or URLs of `as_place`.
        devices: one lane runs on each GPU, and several on a CPU.
        batch_size: None for what suits the device.
        precision: in which the tokenizer runs; ``auto`` is bfloat16 on a GPU.
        part: i and n of ``--shard i/n``.
        num_workers: decoder processes, or lanes of a CPU; None for one per core.
    """

    data: Sequence[Path]
    output: Path
    checkpoint: str = "mini"
    devices: Sequence[str] = ("cpu",)
    fusion: FusionSetting = "auto"
    batch_size: int | None = None
    latent: LatentKind = "enriched"
    normalize: bool = False
    dtype: DtypeName = "float16"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    fit: Fit = "crop"
    flip: bool = False
    part: tuple[int, int] = (0, 1)
    num_workers: int | None = None
    max_broken: int = MAX_BROKEN
    verify: bool = False
    retry_broken: bool = False
    dry_run: bool = False

    @property
    def is_on_gpu(self) -> bool:
        return self.devices[0] != "cpu"


MakeEngine = Callable[[TokenizeOptions, Job, Sequence[Unit]], Engine]


def tokenize_command(options: TokenizeOptions, make_engine: MakeEngine | None = None) -> int:
    """Encode what is missing of a folder of latents.

    Args:
        options: of the command.
        make_engine: gives the engine; None for that of this machine.

    Returns:
        Exit status: 0, or 3 where the folder lacks images that could not be read.

    Raises:
        TrainingError, model.errors.ModelError, OSError: one sentence that names what is at fault.
    """
    remote = is_remote(options.output)
    store: Store = ObjectStore(str(options.output)) if remote else FolderStore(options.output)
    job, plan = make_job(options, store)
    finished = open_job(job, options.retry_broken)
    if options.verify:
        finished = verify(job, finished)
    index, count = options.part
    missing = [unit for unit in job.units[index::count] if unit.file_name not in finished]
    _say_size(job, plan, missing, finished)
    engine = (make_engine or local_engine)(options, job, [] if options.dry_run else missing)
    if options.dry_run:
        ready = [event for event in engine.run() if isinstance(event, Ready)]
        if ready:
            _say_time(ready[0], engine, job, missing)
        return EXIT_OK
    if missing:
        store.remove_remains()
        start_job(job, finished)
        with explaining_a_full_disk():
            finished |= _encode(engine, job, missing, options.max_broken)
    return _say_result(job, plan, complete_job(job, finished), options)


def make_job(options: TokenizeOptions, store: Store) -> tuple[Job, Plan]:
    """List the data, and say what is to be made of it.

    Raises:
        DataError: the data cannot be used.
        LatentsError: the checkpoint does not offer what is asked for.
        ModelError: the checkpoint cannot be opened.
    """
    opened = open_checkpoint(resolve_checkpoint(options.checkpoint))
    _check_normalizable(opened, options)
    batch_size = options.batch_size or (GPU_BATCH_SIZE if options.is_on_gpu else CPU_BATCH_SIZE)
    auto: DtypeName = "bfloat16" if options.is_on_gpu else "float32"
    identity = Identity(
        model=opened.config.name,
        checkpoint_sha256=opened.info.sha256,
        latent=options.latent,
        normalized=options.normalize,
        dtype=options.dtype,
        shape=opened.config.latent_shape,
        flip=options.flip,
        fit=options.fit,
        image_size=opened.config.image_size,
        precision=auto if options.precision == "auto" else options.precision,
        batch_size=batch_size,
        images_per_shard=1,
    )
    plan = plan_units(options.data, identity.image_bytes, batch_size)
    identity = identity.model_copy(update={"images_per_shard": plan.images_per_unit})
    return Job(store, identity, plan.units, plan.inputs, plan.classes), plan


def local_engine(options: TokenizeOptions, job: Job, units: Sequence[Unit]) -> LocalEngine:
    """The engine of this machine: a lane per GPU with a share of the decoders, or lanes on the CPU."""
    workers = options.num_workers or num_cpus()
    devices = list(options.devices)
    num_decoders = max(1, workers // len(devices)) if options.is_on_gpu else 0
    if not options.is_on_gpu:
        devices *= min(workers, max(1, len(job.units)))
    checkpoint = str(resolve_checkpoint(options.checkpoint))
    configs = [
        LaneConfig(checkpoint, device, options.fusion, job.identity, job.store, num_decoders)
        for device in devices
    ]
    return LocalEngine(configs, units)


def _encode(engine: Engine, job: Job, units: Sequence[Unit], max_broken: int) -> dict[str, ShardRecord]:
    """Run the engine, with a bar; gives the records of the files it made."""
    records: dict[str, ShardRecord] = {}
    num_broken = 0
    has_time = False
    total = sum(len(unit) for unit in units)
    every_s = 0.5 if sys.stderr.isatty() else 30.0  # a log keeps every line
    with tqdm(total=total, unit="image", desc="tokenize", mininterval=every_s, dynamic_ncols=True) as bar:
        for event in engine.run():
            match event:
                case Ready():
                    if not has_time:
                        _say_time(event, engine, job, units)
                    has_time = True
                case Encoded():
                    num_broken += event.num_broken
                    bar.set_postfix(broken=num_broken, refresh=False)
                    bar.update(event.num_images)
                case Done():
                    records[event.record.name] = event.record
            if num_broken > max_broken:
                raise LatentsError(
                    f"more than {max_broken} images could not be read: the data may be damaged as a "
                    "whole; what is written is whole, and --max-broken N allows more"
                )
    return records


def _say_size(job: Job, plan: Plan, missing: Sequence[Unit], finished: dict[str, ShardRecord]) -> None:
    """Print what there is to do, and refuse it where there is no room.

    Raises:
        LatentsError: the files would not fit.
    """
    identity, num_images = job.identity, sum(len(unit) for unit in missing)
    needed = expected_bytes(identity, missing)
    free = job.store.free_bytes()
    units = _count(len(job.units), "unit")
    _say(f"{_count(plan.num_images, 'image')} in {units}{describe_left_out(plan.left_out)}")
    if finished:
        _say(f"{len(finished):,} of {_count(len(job.units), 'file')} there already")
    room = "" if free is None else f"; {_bytes(free)} are free"
    each = _bytes(identity.image_bytes)
    shape = " x ".join(map(str, identity.shape))
    _say(
        f"to do: {_count(num_images, 'image')}, {_bytes(needed)} of {identity.dtype} {identity.latent} "
        f"latents {shape} ({each} per image){room}"
    )
    if free is not None and needed > free:
        raise LatentsError(
            f"{job.store.path('')} has {_bytes(free)} free and needs {_bytes(needed)}: make room, or use "
            "another --output or a smaller --dtype"
        )


def expected_bytes(identity: Identity, units: Sequence[Unit]) -> int:
    """Size of the files of units, about: latents, labels, names and moments."""
    channels, rows, columns = identity.shape
    moments = 2 * 8 * channels * rows * columns
    num_images = sum(len(unit) for unit in units)
    return num_images * (identity.image_bytes + _HEADER_BYTES) + len(units) * moments


def _say_time(ready: Ready, engine: Engine, job: Job, units: Sequence[Unit]) -> None:
    rate = engine.num_lanes * job.identity.batch_size / ready.batch_s
    seconds = round(sum(len(unit) for unit in units) / rate)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    shown = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"
    _say(f"encoding takes about {shown} at {rate:,.0f} images/s, if decoding keeps up")


def _say_result(job: Job, plan: Plan, manifest: ManifestOf[Identity] | None, options: TokenizeOptions) -> int:
    place = job.store.path("")
    if manifest is None:
        there = sum(job.store.size(unit.file_name) is not None for unit in job.units)
        index, count = options.part
        _say(f"part {index}/{count} is done: {there:,} of {len(job.units):,} files are in {place}")
        return EXIT_OK
    totals = manifest.totals
    files = _count(len(manifest.shards), "file")
    _say(f"{place}: {_count(totals.images, 'image')} in {files}, {_bytes(totals.bytes)}")
    if plan.left_out:
        _say(f"not listed{describe_left_out(plan.left_out).removeprefix('; left out')}")
    if not totals.broken:
        return EXIT_OK
    _say(f"left out {_count(totals.broken, 'image')} that could not be read; --retry-broken tries again:")
    for line in _broken_lines(job.store, manifest):
        _say(f"  {line}")
    return EXIT_SOME_BROKEN


def _broken_lines(store: Store, manifest: ManifestOf[Identity]) -> Iterator[str]:
    """The first broken images; the files name all of them."""
    shown = 0
    for record in manifest.shards:
        if record.broken and shown < NUM_SHOWN:
            info = read_header(store, record.name).info
            for broken in info.broken[: NUM_SHOWN - shown]:
                shown += 1
                yield f"{broken.key} in {info.input}: {broken.reason}"
    if manifest.totals.broken > shown:
        yield f"and {manifest.totals.broken - shown:,} more, which the files name"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(count: float) -> str:
    power = min(4, int(math.log10(max(1, count))) // 3)
    return f"{count / 1000**power:,.{0 if power < 2 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stdout)


def _check_normalizable(opened: OpenedCheckpoint, options: TokenizeOptions) -> None:
    if not options.normalize:
        return
    if "statistics" not in opened.files:
        raise LatentsError(f"checkpoint {opened.config.name!r} has no latent statistics to normalise with")
    if options.latent == "base" and opened.config.fusion is not None:
        raise LatentsError("the statistics describe enriched latents: --normalize is not offered for base")
