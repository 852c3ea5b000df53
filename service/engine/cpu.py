"""The CPU's runner: a batch runs in the thread that launches it.

Shape legend: B items of a bucket (the last item fills it up), n items of a batch.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cuda_graphs import bucket_for
from model.images.tensors import collate
from model.tokenizer import Tokenizer, largest_magnitudes
from service.engine.operations import BatchKey, Operation, finished
from service.engine.runners import Outcome
from service.engine.warming import fast_buckets, measure


class CpuRunner:
    """Runs batches in the calling thread.

    Args:
        tokenizer: on the CPU; runners may share one.
        buckets: sizes that batches are padded to.
        name: for logs and metrics.
        num_threads: cores that one batch uses.
        limit_s: duration after which a batch counts as hung, seconds.
    """

    depth = 1

    def __init__(
        self,
        tokenizer: Tokenizer,
        buckets: Sequence[int],
        name: str,
        num_threads: int,
        limit_s: float = math.inf,
    ) -> None:
        self.name = name
        self.buckets = buckets
        self._tokenizer = tokenizer
        self._num_threads = num_threads
        self._limit_s = limit_s

    def warm(self) -> Mapping[Operation, float]:
        torch.set_num_threads(self._num_threads)  # PyTorch keeps the number per thread
        self.buckets = fast_buckets(self, self._tokenizer, self._limit_s)
        return measure(self, self._tokenizer)

    def launch(self, key: BatchKey, inputs: Sequence[Tensor]) -> "Done":
        started_s = time.monotonic()
        num_items = len(inputs)
        padding = bucket_for(num_items, self.buckets) - num_items
        batch = collate([*inputs, *itertools.repeat(inputs[-1], padding)])
        with torch.inference_mode():
            results = key.operation.run(self._tokenizer, batch, key)[:num_items]
            largest = largest_magnitudes(results)
            kept = finished(results, key.dtype)
            return Done(Outcome.judged(kept, largest, started_s, time.monotonic() - started_s))

    def free_memory(self) -> None:
        pass


@dataclass(frozen=True)
class Done:
    """A batch that has already ended."""

    outcome: Outcome

    def wait(self) -> Outcome:
        return self.outcome
