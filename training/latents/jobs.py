"""A job: all units of one folder. What is done is seen from its files, so a killed job goes on where it was.

Any number of processes may work on one folder at a time, each on its own units (``--shard``). The last one to
finish completes the folder: it merges the statistics and writes the table of files.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from training.errors import DataError, LatentsError
from training.evaluation.moments import PointwiseMoments
from training.latents.manifest import (
    MANIFEST_FILE,
    Identity,
    InputRecord,
    Manifest,
    ShardRecord,
    read_manifest,
    write_manifest,
)
from training.latents.shards import (
    read_header,
    read_receipt,
    read_record,
    read_tensors,
    receipt_name,
    write_statistics,
)
from training.latents.store import Store
from training.latents.units import Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The units of a folder, and how to encode them.

    Attributes:
        store: the folder.
        identity: what latents depend on.
        units: all of them.
        inputs, classes: of the manifest.
    """

    store: Store
    identity: Identity
    units: Sequence[Unit]
    inputs: tuple[InputRecord, ...]
    classes: tuple[str, ...]

    @property
    def manifest(self) -> Manifest:
        """The manifest at the beginning."""
        return Manifest(identity=self.identity, inputs=self.inputs, classes=self.classes, complete=False)


def open_job(job: Job, retry_broken: bool = False) -> dict[str, ShardRecord]:
    """Compare a folder with the job; gives the records of its finished files, by name. Writes nothing.

    A file that is cut off, or of something else, is not finished.

    Args:
        job: the job.
        retry_broken: whether files that lack broken images count as unfinished. The images of inputs that
            had some may then have other sizes.

    Raises:
        LatentsError: the folder is of another job, and says what differs, or of something else.
    """
    manifest = read_manifest(job.store)
    if manifest is None:
        if others := job.store.names():
            raise LatentsError(
                f"{job.store.path('')} holds other files ({min(others)}) and no {MANIFEST_FILE}: name a new "
                "or an empty folder"
            )
        return {}
    _check_same(job, manifest, retry_broken)
    known = {record.name: record for record in manifest.shards}
    found = {}
    for unit in job.units:
        record = _record_of(job, unit, known.get(unit.file_name))
        if record is not None and not (retry_broken and record.broken):
            found[record.name] = record
    return found


def start_job(job: Job, finished: dict[str, ShardRecord]) -> None:
    """Write the manifest of a job that has something to do.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    records = [finished[unit.file_name] for unit in job.units if unit.file_name in finished]
    write_manifest(job.store, job.manifest.with_shards(records, complete=False))


def verify(job: Job, finished: dict[str, ShardRecord]) -> dict[str, ShardRecord]:
    """The finished files whose contents are still those that were written; reads them all."""
    sound = {}
    for name, record in finished.items():
        try:
            found = read_record(job.store, name)
        except LatentsError as exc:
            logger.warning("%s", exc)
            continue
        if found == record:
            sound[name] = record
        else:
            logger.warning("%s: its checksum is another than when it was written", job.store.path(name))
    return sound


def complete_job(job: Job, finished: dict[str, ShardRecord]) -> Manifest | None:
    """Complete the folder where all its files are there, else give None.

    Args:
        job: the job.
        finished: records that are known; those of other processes are read from their receipts.

    Raises:
        DataError: not one image could be read.
        OSError: a file cannot be written.
    """
    records = []
    for unit in job.units:
        record = finished.get(unit.file_name) or _record_of(job, unit, None)
        if record is None:
            return None
        records.append(record)
    _write_statistics(job, records)
    manifest = job.manifest.with_shards(records, complete=True)
    write_manifest(job.store, manifest)
    for record in records:
        job.store.remove(receipt_name(record.name))
    job.store.remove_remains()
    return manifest


def _record_of(job: Job, unit: Unit, known: ShardRecord | None) -> ShardRecord | None:
    """The record of a unit's file; None where it must be made (again)."""
    name = unit.file_name
    size = job.store.size(name)
    if size is None:
        return None
    record = read_receipt(job.store, name) or known
    try:
        if not read_header(job.store, name).info.is_of(unit, job.identity):
            raise LatentsError(f"{job.store.path(name)}: holds something else")
        return record if record is not None and record.bytes == size else read_record(job.store, name)
    except LatentsError as exc:
        logger.warning("%s: it is made again", exc)
        return None


def _check_same(job: Job, manifest: Manifest, retry_broken: bool) -> None:
    place = job.store.path("")
    if changed := _input_changes(manifest, job.inputs, retry_broken):
        raise LatentsError(
            f"{place} was made from other data: {changed[0]}: give the same data, or name another --output"
        )
    if changed := manifest.identity.differences(job.identity):
        raise LatentsError(
            f"{place} was made with other settings ({', '.join(changed)}): give the same, or name another "
            "--output"
        )
    if manifest.classes != job.classes:
        raise LatentsError(f"{place} was made with other classes: give the same, or name another --output")


def _input_changes(manifest: Manifest, now: Sequence[InputRecord], retry_broken: bool) -> list[str]:
    before = {record.name: record for record in manifest.inputs}
    after = {record.name: record for record in now}
    found = [f"{name} is no longer there" for name in before if name not in after]
    found += [f"{name} is new" for name in after if name not in before]
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        if one.images != other.images:
            found.append(f"{name} had {one.images} images, and has {other.images}")
        elif one.sha256 != other.sha256:
            found.append(f"{name} has other names or labels")
        elif one.num_bytes != other.num_bytes and not retry_broken:
            found.append(
                f"the images of {name} had {one.num_bytes} bytes, and have {other.num_bytes} (where broken "
                "ones were repaired, add --retry-broken)"
            )
    if not found and list(before) != list(after):
        found.append("its inputs came in another order")
    return sorted(found)


def _write_statistics(job: Job, records: Sequence[ShardRecord]) -> None:
    """Merge the moments of all files, in their order."""
    total = PointwiseMoments(job.identity.shape)
    for record in records:
        names = [f"moments.{part}" for part in ("count", "mean", "second")]
        total.merge(
            PointwiseMoments(job.identity.shape).restore(
                read_tensors(job.store, record.name, names), "moments"
            )
        )
    if total.count == 0:
        num_images = sum(len(unit) for unit in job.units)
        raise DataError(f"none of the {num_images} images could be read")
    write_statistics(job.store, total, job.identity.flip)
