"""Ranks: the processes that ``torchrun`` starts, and what they tell each other.

Everything here also works in a process that nobody launched so, as a world of one, at no cost. Code asks
`current` for the ranks instead of asking torch.distributed.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.errors import RankError, TrainingError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Every method that exchanges something is collective: all ranks call it, in the same order.

    Attributes:
        rank: this process, from 0.
        size: number of processes.
        local_rank: this process among those of its machine; the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``size``-th item from ``rank`` on: over all ranks each item once, in near-equal shares."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def all_gather_object(self, value: Item) -> list[Item]:
        """Values of all ranks, in the order of ranks; anything that pickles."""
        if self.size == 1:
            return [value]
        gathered: list[Item] = [value] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: Item) -> Item:
        """Value of rank 0, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], Item]) -> Item:
        """Rank 0's result of ``work``, on every rank; an error of it is raised on every rank too.

        Raises:
            TrainingError, OSError: raised by ``work``.
        """
        outcome: tuple[Item | None, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except (TrainingError, OSError) as exc:
                outcome = (None, exc)
        result, failure = self.broadcast_object(outcome)
        if failure is not None:
            raise failure
        return cast(Item, result)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place where there are several; returns the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, in place where there are several; returns the tensor."""
        return self.all_reduce_sum(tensor).div_(self.size) if self.size > 1 else tensor

    def mean_figures(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Mean over ranks of each figure; all ranks give the same names in the same order."""
        if self.size == 1:
            return dict(figures)
        means = self.all_reduce_mean(torch.tensor(list(figures.values()), dtype=torch.float64))
        return dict(zip(figures, means.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag."""
        return bool(self.all_reduce_sum(torch.tensor(int(flag))).item()) if self.size > 1 else flag

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Mean over ranks of the gradients, as one message, for modules outside of DDP and FSDP."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = self.all_reduce_mean(torch.cat([gradient.flatten() for gradient in gradients]))
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def current() -> Ranks:
    """The ranks of the process group, or a world of one where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def is_launched() -> bool:
    """Whether ``torchrun``, or a launcher that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def process_group(device: str = "auto", timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Ranks]:
    """Join the other ranks for as long as the context lasts; without a launcher, a world of one.

    Tensors on a GPU travel by NCCL, tensors in memory and Python objects by gloo.

    Args:
        device: a recipe's device; a GPU is the one of this process's ``LOCAL_RANK``.
        timeout_s: after which a rank that waits for the others gives up, seconds.

    Raises:
        RankError: the ranks cannot meet, there is no GPU for this one, or within the context another rank
            ended or did not answer in time.
    """
    if not is_launched() or dist.is_initialized():
        yield current()
        return
    has_gpu = device != "cpu" and (device != "auto" or torch.cuda.is_available())
    if has_gpu:
        _claim_gpu(device)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as exc:
        raise RankError(f"the ranks could not meet within {timeout_s:g} s: {exc}") from exc
    ranks = current()
    try:
        yield ranks
    except RuntimeError as exc:
        if not _is_of_peers(exc):
            raise
        reason = str(exc).splitlines()[0]
        raise RankError(
            f"rank {ranks.rank} of {ranks.size} gave up: another rank ended or did not answer within "
            f"{timeout_s:g} s, and has its own message where it failed ({reason})"
        ) from exc
    finally:
        dist.destroy_process_group()


def _is_of_peers(error: RuntimeError) -> bool:
    """Whether communication failed; gloo raises bare errors that name its source files."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _claim_gpu(device: str) -> None:
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if device not in ("auto", "cuda"):
        raise RankError(f"field 'device': {device} names one GPU for all ranks; use cuda or auto")
    if index >= torch.cuda.device_count():
        raise RankError(
            f"rank {os.environ['RANK']} has no GPU: this machine has {torch.cuda.device_count()}; "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(index)
