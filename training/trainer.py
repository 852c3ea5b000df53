"""The loop that every phase shares: steps, logs, validation, atomic state, resume."""

import csv
import errno
import io
import json
import logging
import math
import os
import pickle
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.data import Batch
from training.errors import DivergenceError, TrainingError
from training.recipe import BaseRecipe

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"


class Task(ABC):
    """What one phase trains, and how. The trainer calls it; it knows nothing of files or logs."""

    recipe: BaseRecipe
    networks: dict[str, str]

    @abstractmethod
    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        """Micro-batches of step ``start_step`` and of every step after it."""

    @abstractmethod
    def train_step(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns its losses."""

    @abstractmethod
    def evaluate(self, step: int, directory: Path) -> dict[str, float]:
        """Validation figures with the averaged weights; may write pictures under ``directory``."""

    @abstractmethod
    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the averaged weights as a tokenizer checkpoint."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the recipe; tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""

    @abstractmethod
    def check_invariants(self) -> None:
        """Called before every export; raises if what must not change has changed."""


class Trainer:
    """Runs a task from its last saved state to the recipe's end."""

    def __init__(self, task: Task, output: Path) -> None:
        self.task = task
        self.recipe = task.recipe
        self.output = output
        self.num_broken = 0
        self.seconds_before = 0.0

    def run(self, resume: bool) -> dict[str, float]:
        """Train to the end and export to ``<output>/checkpoint``.

        Returns:
            The last validation figures.

        Raises:
            TrainingError: bad data, divergence, a full disk, or an output that holds another run.
        """
        try:
            start_step = self._prepare(resume)
            self.started = time.monotonic()
            self._train(start_step)
            return self._finish()
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise TrainingError(
                    f"no space left under {self.output}; its last state is whole: free some and use --resume"
                ) from exc
            raise

    def _prepare(self, resume: bool) -> int:
        state_file = self.output / STATE_FILE
        if state_file.exists() and not resume:
            raise TrainingError(
                f"{self.output} holds a run: continue it with --resume, or choose another --output"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        self._write_recipe(is_resumed=state_file.exists())
        if not state_file.exists():
            _keep_rows(self.output, last_step=-1)
            return 0
        return self._restore(state_file)

    def _write_recipe(self, is_resumed: bool) -> None:
        """Keep the recipe beside its results; say so where a resumed run departs from it."""
        file = self.output / "recipe.json"
        fields = json.loads(self.recipe.model_dump_json())
        if is_resumed and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [name for name in fields if fields[name] != before.get(name)]
            if changed:
                logger.warning("resumed with another recipe than before: %s changed", ", ".join(changed))
        _write_atomically(file, (json.dumps(fields, indent=2) + "\n").encode())

    def _restore(self, state_file: Path) -> int:
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            step = int(state["step"])
            self.num_broken = int(state["num_broken"])
            self.seconds_before = float(state["seconds"])
            self.task.load_state_dict(state["task"])
        except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
            raise TrainingError(f"{state_file}: not a state of this recipe: {exc}") from exc
        _keep_rows(self.output, last_step=step - 1)
        logger.info("resumed %s at step %d", self.output, step)
        return step

    def _train(self, start_step: int) -> None:
        recipe = self.recipe
        steps = range(start_step, recipe.num_steps)
        batches = self.task.batches(start_step)
        with tqdm(
            total=recipe.num_steps, initial=start_step, desc=recipe.name, unit="step", dynamic_ncols=True
        ) as bar:
            for step in steps:
                micro_batches = next(batches)
                self.num_broken += sum(batch.num_broken for batch in micro_batches)
                losses = self.task.train_step(step, micro_batches)
                _check_finite(step, losses)
                self._after_step(step, losses, bar)

    def _after_step(self, step: int, losses: dict[str, float], bar: "tqdm[Any]") -> None:
        done = step + 1
        bar.update()
        if done % self.recipe.log_every_steps == 0 or done == self.recipe.num_steps:
            bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()})
            row = {"seconds": round(self._seconds(), 1), "num_broken": self.num_broken, **losses}
            _append_row(self.output / "train.csv", step, row)
        # The state is written before validation: a crash in it costs no training.
        if done % self.recipe.checkpoint_every_steps == 0 or done == self.recipe.num_steps:
            self._save_state(done)
        if done % self.recipe.evaluate_every_steps == 0 and done != self.recipe.num_steps:
            self._evaluate(step)

    def _evaluate(self, step: int) -> dict[str, float]:
        figures = self.task.evaluate(step + 1, self.output)
        _append_row(self.output / "validation.csv", step, figures)
        tqdm.write(f"step {step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        return figures

    def _finish(self) -> dict[str, float]:
        self.task.check_invariants()
        figures = self._evaluate(self.recipe.num_steps - 1)
        provenance = {
            "recipe": json.loads(self.recipe.model_dump_json()),
            "networks": self.task.networks,
            "validation": figures,
            "training_seconds": round(self._seconds()),
            "num_broken_images": self.num_broken,
            "device": device_name(self.recipe.device),
            "torch": torch.__version__,
        }
        self.task.export(self.output / "checkpoint", provenance)
        _write_atomically(self.output / "run.json", (json.dumps(provenance, indent=2) + "\n").encode())
        return figures

    def _save_state(self, step: int) -> None:
        buffer = io.BytesIO()
        state = {
            "step": step,
            "num_broken": self.num_broken,
            "seconds": self._seconds(),
            "task": self.task.state_dict(),
        }
        torch.save(state, buffer)
        _write_atomically(self.output / STATE_FILE, buffer.getvalue())

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


def device_name(name: str) -> str:
    """Human name of a recipe's device."""
    if name != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _check_finite(step: int, losses: Mapping[str, float]) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise DivergenceError(f"step {step}: {name} is {value}; lower the learning rate and resume")


def _write_atomically(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _append_row(file: Path, step: int, values: Mapping[str, float]) -> None:
    row = {"step": step + 1, **{name: _rounded(value) for name, value in values.items()}}
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _rounded(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _keep_rows(output: Path, last_step: int) -> None:
    """Drop the rows that a killed run wrote after its last saved state."""
    for file in (output / "train.csv", output / "validation.csv"):
        if not file.exists():
            continue
        header, *rows = file.read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if int(row.split(",")[0]) <= last_step + 1]
        if kept:
            _write_atomically(file, ("\n".join([header, *kept]) + "\n").encode())
        else:
            file.unlink()
