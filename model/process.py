"""What a process sets for itself: the CPUs that it uses, how OpenMP's threads wait, what becomes of memory.

PyTorch reads the variables that `limit_threads` sets once, at its import. So this module imports none of it.
"""

import ctypes
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 2**25


def keep_freed_memory(num_bytes: int = 2**30) -> None:
    """Let the C library keep freed memory, up to ``num_bytes``. Nothing happens where it is not glibc.

    For processes that do the same again and again. Else the tensors of a layer are handed back to the system,
    and come zeroed anew: an encode of eight images with ``mini`` met 9,000 page faults, 4 % of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MALLOC_MMAP_THRESHOLD, min(_LARGEST_MMAP_THRESHOLD, num_bytes // 2))
        mallopt(_MALLOC_TRIM_THRESHOLD, num_bytes)


def num_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may keep busy: its affinity, and the quotas of its control groups.

    A quota of one and a half CPUs counts as one: threads beyond a quota are all stopped when it is used up.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return max(1, min([_allowed_cpus(), *map(int, _quotas(root))]))


def limit_threads(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Let OpenMP heed the quota, and wait without spinning for long. Variables that are set stay.

    By default a thread that waits for the others of its team spins for milliseconds. Beside other processes
    those it waits for then lack the CPU: a load of ``mini`` took 17 s instead of 0.3 on two busy cores.
    """
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    cpus = num_cpus(root)
    if cpus < _allowed_cpus():  # PyTorch heeds the affinity by itself, and takes one thread a core
        environment.setdefault("OMP_NUM_THREADS", str(cpus))


def _allowed_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """Quotas of CPU time, in CPUs, of the groups that this process is in, and of those around them."""
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = Path(path.lstrip("/"))
        # Within a container the path may be the host's: then the container's own group is the mount itself.
        for folder in (mount / group, *(mount / parent for parent in group.parents)):
            quota = _quota_v1(folder) if controllers else _quota_v2(folder)
            if quota is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return quota / period if quota > 0 and period > 0 else None
    except (OSError, ValueError):
        return None
