"""Processes that decode images: started by every method, deaf to what stops a run, gone with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
METHODS = ["fork", "spawn", "forkserver"]

# Signals arrive while the workers start, and while they work; in the end the parent is killed.
SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path

def main():
    from training.data.batches import random_crop, random_resized_crop, training_batches
    from training.data.sources import list_samples
    from training.recipes.recipe import DataConfig

    multiprocessing.set_start_method(sys.argv[1])
    heard = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: heard.append(number))
    data = DataConfig(train=[Path(sys.argv[2])], resize_short_side=(32, 40), num_workers=2)
    for make in (random_crop, random_resized_crop):
        stream = training_batches(list_samples(data.train), data, make(data, 32), 4, seed=0, start_batch=0)
        for _ in range(2):
            os.killpg(0, signal.SIGTERM)
            os.killpg(0, signal.SIGINT)
            for _ in range(12):
                assert next(stream).images.shape == (4, 3, 32, 32)
    assert {signal.SIGINT, signal.SIGTERM} <= set(heard)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", METHODS)
def test_workers_outlive_signals_to_the_group_but_not_their_parent(
    method: str, photos: Path, tmp_path: Path
) -> None:
    script = tmp_path / "load.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), method, str(photos)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) >= 2
    deadline = time.monotonic() + 120
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)


def test_an_exit_with_an_unfinished_stream_does_not_wait_for_its_workers(photos: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from training.data.batches import random_crop, training_batches\n"
        "from training.data.sources import list_samples\n"
        "from training.recipes.recipe import DataConfig\n"
        "data = DataConfig(train=[Path(sys.argv[1])], resize_short_side=(32, 40), num_workers=2)\n"
        "samples = list_samples(data.train)\n"
        "stream = training_batches(samples, data, random_crop(data, 32), 4, seed=0, start_batch=0)\n"
        "next(stream)\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(photos)], cwd=ROOT, timeout=200, check=False)
    assert done.returncode == 3


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
