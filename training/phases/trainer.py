"""The loop that every phase shares: steps, logs, validation, atomic state, resume."""

import errno
import json
import logging
import math
import os
import platform
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from training.data.shards import listing_sha256
from training.data.sources import Sample
from training.distributed.ranks import current
from training.errors import DivergenceError, TrainingError
from training.output.files import write_json
from training.output.logs import RunLog
from training.phases.states import (
    RUN_FILE,
    STATE_FILE,
    check_run_directory,
    holds_state,
    newest_whole_state,
    read_state,
    save_state,
)
from training.recipes.recipe import BaseRecipe

logger = logging.getLogger(__name__)

BatchType = TypeVar("BatchType", bound="TrainingBatch")


class TrainingBatch(Protocol):
    """The one thing that the trainer reads from a micro-batch."""

    @property
    def num_broken(self) -> int: ...


class Task(ABC, Generic[BatchType]):
    """Training of one phase. The trainer calls it; a task knows nothing of files or logs.

    Every rank has its own, and calls every method at the same time as the others; files are written by the
    main rank alone.
    """

    recipe: BaseRecipe
    networks: dict[str, str]
    samples: Sequence[Sample]
    """The listing of the recipe's ``data.train``."""

    def listing(self) -> dict[str, Any]:
        """Number and digest of the training images, by which a resumed run sees that they changed."""
        return {"num_images": len(self.samples), "sha256": listing_sha256(self.samples)}

    @abstractmethod
    def batches(self, start_step: int) -> Iterator[list[BatchType]]:
        """This rank's share of the micro-batches of step ``start_step`` and of every step after it."""

    @abstractmethod
    def train_step(self, step: int, micro_batches: list[BatchType]) -> dict[str, float]:
        """One optimizer step; returns its losses, means over the whole batch and alike on every rank.

        A task may leave them out of steps that are not `is_reported`, so that no step waits for the device.
        """

    @abstractmethod
    def evaluate(self, step: int, directory: Path) -> dict[str, float]:
        """Validation figures with the averaged weights; may write pictures under ``directory``."""

    @abstractmethod
    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the averaged weights as a tokenizer checkpoint."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the recipe, whatever its number of ranks.

        Tensors, whole, and plain values.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""

    @abstractmethod
    def check_invariants(self) -> None:
        """Called before every export; raises if what must not change has changed."""


class Trainer:
    """Runs a task from its last saved state to the recipe's end.

    SIGINT and SIGTERM save the state after the step under way, on whichever rank they arrive, and stop at
    once where nothing would be lost. A second SIGINT stops at once in any case.
    """

    def __init__(self, task: Task[Any], output: Path) -> None:
        self.task = task
        self.recipe = task.recipe
        self.output = output
        self.ranks = current()
        self.log = RunLog(output, self.recipe.tensorboard)
        self.num_broken = 0  # of this rank's images; the main rank's holds those before a resume too
        self.is_stopping = False
        self.saved_step = 0
        self.is_saved = True  # whether a run that ends here loses nothing
        self.seconds_before = 0.0

    def run(self, resume: bool) -> dict[str, float]:
        """Train to the end and export to ``<output>/checkpoint``.

        Returns:
            The last validation figures.

        Raises:
            TrainingError: bad data, divergence, a full disk, or an output that holds another run.
            KeyboardInterrupt: a signal asked the run to stop; its state is saved.
        """
        try:
            start_step = self._prepare(resume)
            self.started = time.monotonic()
            with self._stop_on_signals():
                self._train(start_step)
            return self._finish()
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise TrainingError(
                    f"no space left under {self.output}; its last state is whole: free some and use --resume"
                ) from exc
            raise

    def _prepare(self, resume: bool) -> int:
        check_run_directory(self.output, resume)
        exists = self.ranks.all_gather_object(holds_state(self.output))
        if any(exists) and not all(exists):
            raise TrainingError(
                f"{self.output / STATE_FILE}: seen by some ranks only: the run directory must be on a disk "
                "that all share"
            )
        self.listing = self.task.listing()
        self.saved_step = self._restore() if all(exists) else 0
        if self.ranks.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            self._write_recipe(is_resumed=all(exists))
            self.log.begin(self.saved_step)
        return self.saved_step

    def _write_recipe(self, is_resumed: bool) -> None:
        """Keep the recipe beside its results; say so where a resumed run departs from it."""
        file = self.output / "recipe.json"
        fields = json.loads(self.recipe.model_dump_json())
        if is_resumed and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [name for name in fields if fields[name] != before.get(name)]
            if changed:
                logger.warning("resumed with another recipe than before: %s changed", ", ".join(changed))
        write_json(file, fields)

    def _restore(self) -> int:
        found = newest_whole_state(self.output) if self.ranks.is_main else self.output
        file = self.ranks.broadcast_object(found)
        state = read_state(file)
        try:
            step = int(state["step"])
            self.num_broken = int(state["num_broken"]) if self.ranks.is_main else 0
            self.seconds_before = float(state["seconds"])
            self.task.load_state_dict(state["task"])
        except (RuntimeError, KeyError, TypeError, ValueError) as exc:
            raise TrainingError(f"{file}: not a state of this recipe: {exc}") from exc
        logger.info("resumed %s at step %d", self.output, step)
        before = state.get("listing", self.listing)
        if before != self.listing and self.ranks.is_main:
            logger.warning(
                "the list of training images changed since the state was saved (%s images then, %s now): the "
                "run goes on with the new list, so its batches are not those of an uninterrupted run",
                before["num_images"],
                self.listing["num_images"],
            )
        return step

    def _train(self, start_step: int) -> None:
        recipe = self.recipe
        steps = range(start_step, recipe.num_steps)
        batches = self.task.batches(start_step)
        with tqdm(
            total=recipe.num_steps,
            initial=start_step,
            desc=recipe.name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.ranks.is_main,
        ) as bar:
            for step in steps:
                micro_batches = self._next_batches(step, batches)
                self.num_broken += sum(batch.num_broken for batch in micro_batches)
                self.is_saved = False
                losses = self.task.train_step(step, micro_batches)
                _check_finite(step, losses)
                self._after_step(step, losses, bar)

    def _next_batches(self, step: int, batches: Iterator[list[TrainingBatch]]) -> list[TrainingBatch]:
        """The next step's; where a process that decodes them was killed, what was trained is saved first."""
        try:
            return next(batches)
        except RuntimeError as exc:
            if "DataLoader worker" not in str(exc):
                raise
            if self.ranks.size == 1 and step > self.saved_step:
                self._save_state(step)
            raise TrainingError(
                f"a process that decodes images ended before step {step + 1}, killed for want of memory "
                f"perhaps ({exc}): go on with --resume, with fewer data.num_workers"
            ) from exc

    def _after_step(self, step: int, losses: dict[str, float], bar: "tqdm[Any]") -> None:
        done = step + 1
        is_last = done == self.recipe.num_steps
        bar.update()
        if is_logged(step, self.recipe):
            bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()})
            row = {"seconds": round(self._seconds(), 1), "num_broken": self._total_broken(), **losses}
            self._log("train", done, row)
        # The state is written before validation: whatever ends the run in it costs no training.
        must_evaluate = done % self.recipe.evaluate_every_steps == 0 and not is_last
        must_stop = self.ranks.any(self.is_stopping)
        if done % self.recipe.checkpoint_every_steps == 0 or is_last or must_evaluate or must_stop:
            self._save_state(done)
        if must_stop and not is_last:
            self._stop(done)
        if must_evaluate:
            self._evaluate(step)
            if self.ranks.any(self.is_stopping):
                self._stop(done)

    def _stop(self, step: int) -> None:
        self.ranks.barrier()  # a rank that ended makes the launcher end those that still write
        logger.warning("stopped after step %d, which is saved: go on with --resume", step)
        raise KeyboardInterrupt

    def _evaluate(self, step: int) -> dict[str, float]:
        figures = self.task.evaluate(step + 1, self.output)
        self._log("validation", step + 1, figures)
        if self.ranks.is_main:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            tqdm.write(f"step {step + 1}: {shown}")
        return figures

    def _finish(self) -> dict[str, float]:
        self.task.check_invariants()
        figures = self._evaluate(self.recipe.num_steps - 1)
        provenance = {
            "recipe": json.loads(self.recipe.model_dump_json()),
            "networks": self.task.networks,
            "validation": figures,
            "training_seconds": round(self._seconds()),
            "num_broken_images": self._total_broken(),
            "device": device_name(self.recipe.device),
            "num_ranks": self.ranks.size,
            "torch": torch.__version__,
        }
        self.task.export(self.output / "checkpoint", provenance)
        if self.ranks.is_main:
            write_json(self.output / RUN_FILE, provenance)
        self.ranks.barrier()  # whoever returns finds everything written
        return figures

    def _save_state(self, step: int) -> None:
        state = {
            "step": step,
            "num_broken": self._total_broken(),
            "seconds": self._seconds(),
            "listing": self.listing,
            "task": self.task.state_dict(),
        }
        if self.ranks.is_main:
            save_state(self.output, state)
        self.saved_step, self.is_saved = step, True

    def _log(self, table: str, num_steps: int, values: Mapping[str, float]) -> None:
        if self.ranks.is_main:
            self.log.append(table, num_steps, values)

    def _total_broken(self) -> int:
        return sum(self.ranks.all_gather_object(self.num_broken))

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step under way."""
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            yield
            return

        owner = os.getpid()

        def stop(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:  # a process that decodes images, which the last step still needs
                return
            if number == signal.SIGINT and self.is_stopping:
                raise KeyboardInterrupt
            if self.is_saved and self.ranks.size == 1:  # several ranks stop together, after a step
                logger.warning(
                    "%s: stopped, nothing is lost: go on with --resume", signal.Signals(number).name
                )
                raise KeyboardInterrupt
            self.is_stopping = True
            logger.warning("%s: stopping after this step", signal.Signals(number).name)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


def is_logged(step: int, recipe: BaseRecipe) -> bool:
    """Whether the losses of step ``step`` (from 0) become a row of the log."""
    return (step + 1) % recipe.log_every_steps == 0 or step + 1 == recipe.num_steps


def is_reported(step: int, recipe: BaseRecipe) -> bool:
    """Whether the losses of step ``step`` are logged, or looked at because its weights are saved."""
    return (
        is_logged(step, recipe)
        or (step + 1) % recipe.checkpoint_every_steps == 0
        or (step + 1) % recipe.evaluate_every_steps == 0
    )


def device_name(name: str) -> str:
    """Human name of a recipe's device."""
    if name != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _check_finite(step: int, losses: Mapping[str, float]) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise DivergenceError(f"step {step}: {name} is {value}; lower the learning rate and resume")
