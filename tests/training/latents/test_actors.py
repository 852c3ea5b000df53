"""Work on a Ray cluster: one small cluster of real processes for all tests of this file."""

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.training.latents.cluster import small_cluster
from training.errors import ClusterError, DataError
from training.latents.actors import MAX_ATTEMPTS, Team, connection, work_on_ray

pytestmark = pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
TEAM = Team(num_actors=2, limit_s=10)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with small_cluster():
        yield


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
    with pytest.raises(ClusterError, match="poison"):
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
