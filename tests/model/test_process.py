"""The CPUs that a process may use, in file systems made up for the purpose, and the memory that it keeps."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from model.process import limit_threads, num_cpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def make_root(root: Path, membership: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": membership, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    return root


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        pytest.param("0::/", {}, 16, id="no quota"),
        pytest.param("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 16, id="v2 max"),
        pytest.param("0::/", {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4, id="v2"),
        pytest.param("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"}, 1, id="v2 one and a half"),
        pytest.param("0::/", {"sys/fs/cgroup/cpu.max": "20000 100000"}, 1, id="v2 a fifth"),
        pytest.param("0::/", {"sys/fs/cgroup/cpu.max": "9900000 100000"}, 16, id="v2 more than there are"),
        pytest.param("0::/", {"sys/fs/cgroup/cpu.max": "broken"}, 16, id="v2 unreadable"),
        pytest.param(
            "0::/jobs/one",
            {"sys/fs/cgroup/jobs/cpu.max": "300000 100000", "sys/fs/cgroup/jobs/one/cpu.max": "max 100000"},
            3,
            id="v2 of a group around",
        ),
        pytest.param(
            "0::/docker/host-path", {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2, id="v2 in a container"
        ),
        pytest.param(
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/",
            {
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "50000",
            },
            5,
            id="v1",
        ),
        pytest.param(
            "1:cpu:/",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            16,
            id="v1 no quota",
        ),
    ],
)
def test_cpus_are_the_least_of_affinity_and_quotas(
    tmp_path: Path, membership: str, files: dict[str, str], cpus: int
) -> None:
    assert num_cpus(make_root(tmp_path, membership, files)) == cpus


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert num_cpus(tmp_path) == 16


@pytest.mark.parametrize(
    ("before", "quota", "num_threads"),
    [({}, "max", None), ({}, "400000", "4"), ({"OMP_NUM_THREADS": "3"}, "400000", "3")],
)
def test_openmp_heeds_the_quota_where_nothing_is_set(
    tmp_path: Path, before: dict[str, str], quota: str, num_threads: str | None
) -> None:
    environment = dict(before)
    limit_threads(environment, make_root(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": f"{quota} 100000"}))
    assert environment.get("OMP_NUM_THREADS") == num_threads
    assert environment["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize("module", ["model.process", "service.processes.startup", "cli.main"])
def test_processes_are_prepared_before_pytorch_is_imported(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_freed_is_used_again_without_page_faults() -> None:
    code = """
import resource, sys
from model.process import keep_freed_memory
keep_freed_memory()
bytearray(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    bytearray(8 << 20)
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > 1000)  # 4,000 where it is given back
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
