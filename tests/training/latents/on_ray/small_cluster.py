"""A Ray cluster of this machine, as small as one can be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

OBJECT_STORE_BYTES = 80 * 2**20


@contextmanager
def small_cluster(num_cpus: int = 2) -> Iterator[str]:
    """A cluster that this process is connected to; gives its address."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
