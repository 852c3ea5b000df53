"""One rank of a launched test: runs a list of phases in one process group, in float64.

    torchrun --nproc-per-node 2 tests/training/ranks.py JOBS.json

A job names a phase, its recipe, output and overrides; ``fault`` is what befalls it: ``cut`` stops every rank
before step 4, ``killed`` kills rank 1 before step 3, ``terminated`` asks rank 0 and its group to stop then.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cli.main import main
from model.config import PRESETS
from tests.training.conftest import TINY, in_float64
from training.distributed.ranks import process_group
from training.phases.distillation import DistillationTask
from training.phases.generation import GenerationTask
from training.phases.reconstruction import ReconstructionTask

TASKS: tuple[Any, ...] = (ReconstructionTask, DistillationTask, GenerationTask)


class CutError(Exception):
    """A run that ends without a word."""


def strike(fault: str, step: int, rank: int) -> None:
    if fault == "cut" and step == 4:
        raise CutError
    if fault == "killed" and step == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "terminated" and step == 3 and rank == 0:
        os.killpg(os.getpid(), signal.SIGTERM)  # with the processes that decode its images


def run_job(job: dict[str, Any]) -> int:
    steps = {kind: kind.train_step for kind in TASKS}

    def faulty(self: Any, step: int, batches: Any) -> dict[str, float]:
        strike(job["fault"], step, self.ranks.rank)
        return steps[type(self)](self, step, batches)

    overrides = [word for override in job["overrides"] for word in ("--set", override)]
    resume = ["--resume"] if job["resume"] else []
    for kind in steps:
        kind.train_step = faulty  # type: ignore[method-assign]
    try:
        paths = ["--config", job["recipe"], "--output", job["output"]]
        return main(["--debug", "train", job["phase"], *paths, *overrides, *resume])
    except CutError:
        return 0
    finally:
        for kind, step_once in steps.items():
            kind.train_step = step_once  # type: ignore[method-assign]


if __name__ == "__main__":
    PRESETS["tiny"] = TINY
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with process_group("cpu", timeout_s=60), in_float64():
        for job in jobs:
            assert run_job(job) == 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as cli.main does
