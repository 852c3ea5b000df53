"""A job: all units of one folder. What is done is seen from its files, so a killed job goes on where it was.

Any number of processes may work on one folder at a time, each on its own units (``--shard``). The last one to
finish completes the folder: it merges the statistics and writes the table of files.
"""

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

from training.errors import DataError, LatentsError
from training.evaluation.moments import PointwiseMoments
from training.latents.manifest import (
    MANIFEST_FILE,
    Identity,
    InputRecord,
    Kind,
    Manifest,
    ManifestOf,
    ShardRecord,
    read_manifest_of,
    write_manifest,
)
from training.latents.shards import (
    ShardInfo,
    ShardInfoOf,
    read_info,
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
class JobOf(Generic[Kind]):
    """The units of a folder, and what their files depend on.

    Attributes:
        store: the folder.
        identity: what files depend on.
        units: all of them.
        inputs, classes: of the manifest.
    """

    manifest_class: ClassVar[type[ManifestOf[Any]]]
    info_class: ClassVar[type[ShardInfoOf[Any]]]
    setting: ClassVar[str]
    """Names the folder, for messages."""
    advice: ClassVar[str] = ""
    """Of images whose sizes changed."""
    store: Store
    identity: Kind
    units: Sequence[Unit]
    inputs: tuple[InputRecord, ...]
    classes: tuple[str, ...] = ()

    @property
    def manifest(self) -> ManifestOf[Kind]:
        """The manifest at the beginning."""
        return self.manifest_class(
            identity=self.identity, inputs=self.inputs, classes=self.classes, complete=False
        )


class Job(JobOf[Identity]):
    """A folder of latents."""

    manifest_class = Manifest
    info_class = ShardInfo
    setting = "--output"
    advice = " (where broken ones were repaired, add --retry-broken)"


def open_job(job: JobOf[Kind], retry_broken: bool = False) -> dict[str, ShardRecord]:
    """Compare a folder with the job; gives the records of its finished files, by name. Writes nothing.

    A file that is cut off, or of something else, is not finished.

    Args:
        job: the job.
        retry_broken: whether files that lack broken images count as unfinished. The images of inputs that
            had some may then have other sizes.

    Raises:
        LatentsError: the folder is of another job, and says what differs, or of something else.
    """
    manifest = read_manifest_of(job.store, job.manifest_class)
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


def start_job(job: JobOf[Kind], finished: dict[str, ShardRecord]) -> None:
    """Write the manifest of a job that has something to do.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    records = [finished[unit.file_name] for unit in job.units if unit.file_name in finished]
    write_manifest(job.store, job.manifest.with_shards(records, complete=False))


def verify(job: JobOf[Kind], finished: dict[str, ShardRecord]) -> dict[str, ShardRecord]:
    """The finished files whose contents are still those that were written; reads them all."""
    sound = {}
    for name, record in finished.items():
        try:
            found = read_record(job.store, name, job.info_class)
        except LatentsError as exc:
            logger.warning("%s", exc)
            continue
        if found == record:
            sound[name] = record
        else:
            logger.warning("%s: its checksum is another than when it was written", job.store.path(name))
    return sound


def complete_job(job: JobOf[Kind], finished: dict[str, ShardRecord]) -> ManifestOf[Kind] | None:
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
    manifest = job.manifest.with_shards(records, complete=True)
    names = job.store.names()
    if read_manifest_of(job.store, job.manifest_class) != manifest:
        if isinstance(job.identity, Identity):
            _write_statistics(job.store, job.identity, records)
        write_manifest(job.store, manifest)
    for name in names & {receipt_name(record.name) for record in records}:
        job.store.remove(name)
    job.store.remove_remains()
    return manifest


@contextmanager
def explaining_a_full_disk() -> Iterator[None]:
    """Let the error of a full disk say what to do."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = f"{exc.strerror}: files that are there are whole; make room and give the command again"
        raise OSError(exc.errno, reason, exc.filename) from exc


def _record_of(job: JobOf[Kind], unit: Unit, known: ShardRecord | None) -> ShardRecord | None:
    """The record of a unit's file; None where it must be made (again)."""
    name = unit.file_name
    size = job.store.size(name)
    if size is None:
        return None
    record = read_receipt(job.store, name) or known
    try:
        if not read_info(job.store, name, job.info_class).is_of(unit, job.identity):
            raise LatentsError(f"{job.store.path(name)}: holds something else")
        return (
            record
            if record is not None and record.bytes == size
            else read_record(job.store, name, job.info_class)
        )
    except LatentsError as exc:
        logger.warning("%s: it is made again", exc)
        return None


def _check_same(job: JobOf[Kind], manifest: ManifestOf[Kind], retry_broken: bool) -> None:
    place, advice = job.store.path(""), f"give the same, or name another {job.setting}"
    if changed := _input_changes(job, manifest, retry_broken):
        raise LatentsError(f"{place} was made from other data: {changed[0]}: {advice}")
    if changed := manifest.identity.differences(job.identity):
        raise LatentsError(f"{place} was made with other settings ({', '.join(changed)}): {advice}")
    if manifest.classes != job.classes:
        raise LatentsError(f"{place} was made with other classes: {advice}")


def _input_changes(job: JobOf[Kind], manifest: ManifestOf[Kind], retry_broken: bool) -> list[str]:
    before = {record.name: record for record in manifest.inputs}
    after = {record.name: record for record in job.inputs}
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
                f"the images of {name} had {one.num_bytes} bytes, and have {other.num_bytes}{job.advice}"
            )
    if not found and list(before) != list(after):
        found.append("its inputs came in another order")
    return sorted(found)


def _write_statistics(store: Store, identity: Identity, records: Sequence[ShardRecord]) -> None:
    """Merge the moments of all files, in their order."""
    total = PointwiseMoments(identity.shape)
    for record in records:
        names = [f"moments.{part}" for part in ("count", "mean", "second")]
        tensors = read_tensors(store, record.name, names)
        total.merge(PointwiseMoments(identity.shape).restore(tensors, "moments"))
    if total.count == 0:
        first = read_info(store, records[0].name, ShardInfo).broken[0]
        count = sum(record.broken for record in records)
        raise DataError(f"no image could be read, of {count:,}: the first is {first.key} ({first.reason})")
    write_statistics(store, total, identity.flip)
