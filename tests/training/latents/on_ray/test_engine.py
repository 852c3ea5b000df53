"""Work on a Ray cluster: one small cluster of real processes for all tests of this file."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("ray", reason="needs the extra drorae[ray]")

from tests.training.conftest import ROOT
from tests.training.latents.conftest import digests
from tests.training.latents.on_ray.small_cluster import small_cluster
from tests.training.latents.test_tokenize import command_line
from training.errors import ClusterError, DataError, LatentsError, WorkerError
from training.latents.jobs import start_job
from training.latents.lanes import LaneConfig
from training.latents.manifest import ShardRecord
from training.latents.on_ray import engine
from training.latents.on_ray.actors import LOCAL, MAX_ATTEMPTS, Team, connection, work_on_ray
from training.latents.on_ray.engine import CalledLane, ClusterOptions, tokenize_on_ray
from training.latents.store import FolderStore
from training.latents.tokenize import EXIT_SOME_BROKEN, local_engine, make_job
from training.latents.units import Unit

pytestmark = pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
TEAM = Team(num_actors=2, limit_s=60)
STRUCK = 5
"""The unit at which a fault comes."""


@pytest.fixture(scope="module", autouse=True)
def address() -> Iterator[str]:
    with small_cluster() as address:
        yield address


class Task(NamedTuple):
    """A unit whose faults strike once; each attempt leaves a file in ``folder``."""

    name: str
    folder: str

    def attempt(self) -> int:
        number = len(list(Path(self.folder).glob(f"{self.name}-*")))
        Path(self.folder, f"{self.name}-{number}").touch()
        return number


def do(task: Task) -> str:
    is_first = task.attempt() == 0
    if task.name == "error":
        raise DataError("no tar")
    if task.name == "poison" or (task.name == "killed" and is_first):
        os.kill(os.getpid(), signal.SIGKILL)
    if task.name == "hangs" and is_first:
        time.sleep(3600)
    return task.name


def build() -> Callable[[Task], str]:
    return do


def build_with(fault: str, folder: str) -> Callable[[Task], str]:
    do(Task(fault, folder))
    return do


def attempts(folder: Path) -> Counter[str]:
    return Counter(file.name.rpartition("-")[0] for file in folder.iterdir())


def test_units_of_actors_that_were_killed_or_hang_are_done_by_others(tmp_path):
    names = ["a", "killed", "b", "hangs", "c", "d"]
    results = list(
        work_on_ray(build, [Task(name, str(tmp_path)) for name in names], replace(TEAM, limit_s=2))
    )
    assert sorted(results) == sorted(names)
    assert attempts(tmp_path) == {"a": 1, "killed": 2, "b": 1, "hangs": 2, "c": 1, "d": 1}


def test_a_unit_that_ends_every_actor_ends_the_job(tmp_path):
    with pytest.raises(WorkerError, match="poison"):
        list(work_on_ray(build, [Task("poison", str(tmp_path))], TEAM))
    assert attempts(tmp_path) == {"poison": MAX_ATTEMPTS}


def test_an_exception_ends_the_job_as_it_was_raised(tmp_path):
    with pytest.raises(DataError, match=r"^no tar$"):
        list(work_on_ray(build, [Task("error", str(tmp_path))], TEAM))
    with pytest.raises(DataError, match=r"^no tar$"):
        list(work_on_ray(partial(build_with, "error", str(tmp_path)), [Task("a", str(tmp_path))], TEAM))


def test_actors_that_end_while_they_start_are_replaced(tmp_path):
    build_killed = partial(build_with, "killed", str(tmp_path))
    assert list(work_on_ray(build_killed, [Task("a", str(tmp_path))], TEAM)) == ["a"]


def test_an_address_without_a_cluster_is_told_at_once():
    with socket.socket() as probe:  # bound, not listening
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(ClusterError, match=str(port)), connection(f"127.0.0.1:{port}"):
            pass


class StruckLane(CalledLane):
    """A lane to which something happens at one unit; a file in its folder says that it did.

    A ``fault`` is ``kill`` or ``hang``, of one attempt alone.
    """

    def __init__(self, fault: str, mark: str, config: LaneConfig) -> None:
        super().__init__(replace(config, num_decoders=2))  # as beside a GPU
        self.fault, self.mark = fault, Path(mark)

    def __call__(self, unit: Unit) -> tuple[int, ShardRecord]:
        if unit.number == STRUCK and not self.mark.exists():
            self.mark.touch()
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return super().__call__(unit)


def strike(monkeypatch: pytest.MonkeyPatch, fault: str, mark: Path) -> None:
    monkeypatch.setattr(engine, "CalledLane", partial(StruckLane, fault, str(mark)))


def test_an_actor_killed_in_the_middle_does_not_change_a_byte(
    expected, options, monkeypatch, tmp_path, caplog
):
    strike(monkeypatch, "kill", tmp_path / "mark")
    assert tokenize_on_ray(replace(options, num_workers=2), ClusterOptions(LOCAL)) == EXIT_SOME_BROKEN
    assert (tmp_path / "mark").exists()
    assert "another one takes its place" in caplog.text
    assert digests(options.output) == expected


def test_a_killed_command_leaves_whole_files_and_goes_on(expected, options, address, tmp_path):
    mark = tmp_path / "mark"
    driver = [sys.executable, "-c", DRIVER, str(mark), address]
    command = command_line(options)
    process = subprocess.Popen([*driver, *command[command.index("tokenize") :]], cwd=ROOT)
    while not mark.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    there = {name: digest for name, digest in digests(options.output).items() if name.startswith("latents-")}
    assert 0 < len(there) < len(expected)
    assert there.items() <= expected.items()
    assert tokenize_on_ray(options, ClusterOptions(LOCAL)) == EXIT_SOME_BROKEN
    assert digests(options.output) == expected


DRIVER = """
import sys
from functools import partial
from cli.main import main
from tests.training.latents.on_ray.test_engine import StruckLane
from training.latents.on_ray import engine
_, mark, address, *command = sys.argv
engine.CalledLane = partial(StruckLane, "hang", mark)
main([*command, "--ray", address])
"""


def test_too_many_broken_images_end_the_job(options):
    with pytest.raises(LatentsError, match="more than 0 images"):
        tokenize_on_ray(replace(options, max_broken=0), ClusterOptions(LOCAL))


def test_a_machine_without_the_folder_or_with_another_checkpoint_is_told(options):
    job, _ = make_job(options, FolderStore(options.output))
    config = local_engine(options, job, job.units)._configs[0]
    with pytest.raises(ClusterError, match="must share"):
        CalledLane(config)
    start_job(job, {})
    other = job.identity.model_copy(update={"checkpoint_sha256": "0" * 64})
    with pytest.raises(ClusterError, match="another checkpoint"):
        CalledLane(replace(config, identity=other))
