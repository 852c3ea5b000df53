"""The runner of a GPU: page-locked memory, copies beside the computation, captured graphs.

A batch is launched before the last one has ended, so that the host's work and the copies overlap with the
device's work. The host does no arithmetic: bytes go in as they were decoded, and results leave the device in
the type of the answer.

Shape legend: B items of a bucket, n items of a batch, S image side, C h w a latent.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.cuda_graphs import CapturedBuckets
from model.images.tensors import collate, write_unit
from model.tokenizer import Tokenizer, largest_magnitudes
from service.engine.operations import OPERATIONS, BatchKey, Operation, finished
from service.engine.runners import Outcome
from service.engine.warming import fast_buckets, measure


class CudaRunner:
    """Runs batches on one GPU: page-locked memory, asynchronous copies, every bucket a captured graph.

    The model runs on one stream, copies in and out on two others. Two batches are on their way at a time:
    while the device runs one, the host fills the memory of the next. PyTorch keeps page-locked memory that
    is let go, and gives it out again once the copies that used it have ended.

    Args:
        tokenizer: on the GPU.
        buckets: sizes that batches are padded to.
        limit_s: duration after which a batch counts as hung, seconds.
    """

    depth = 2

    def __init__(self, tokenizer: Tokenizer, buckets: Sequence[int], limit_s: float = math.inf) -> None:
        self.name = str(tokenizer.device)
        self.buckets = buckets
        self._limit_s = limit_s
        self._tokenizer = tokenizer
        self._device = tokenizer.device
        with torch.cuda.device(self._device):
            self._compute, self._upload, self._download = (torch.cuda.Stream() for _ in range(3))
        self._captured: dict[BatchKey, CapturedBuckets] = {}

    def warm(self) -> Mapping[Operation, float]:
        pool = torch.cuda.graph_pool_handle()
        keys = [key for operation in OPERATIONS for key in operation.keys(self._tokenizer)]
        with torch.cuda.device(self._device), torch.inference_mode(), torch.cuda.stream(self._compute):
            for key in keys:
                example = torch.stack([key.operation.sample(self._tokenizer)] * self.buckets[-1])
                example = example.to(self._device, self._tokenizer.dtype)
                self._captured[key] = CapturedBuckets(self._function(key), example, self.buckets, pool)
        self.buckets = fast_buckets(self, self._tokenizer, self._limit_s)
        for key in keys:
            self.launch(key, [key.operation.sample(self._tokenizer)] * self.buckets[-1]).wait()
        return measure(self, self._tokenizer)

    def launch(self, key: BatchKey, inputs: Sequence[Tensor]) -> "CudaLaunched":
        with torch.cuda.device(self._device), torch.inference_mode():
            began, ended, copied = (
                torch.cuda.Event(enable_timing=timed, blocking=True) for timed in (True, True, False)
            )
            with torch.cuda.stream(self._upload):
                batch = collate(inputs, pin_memory=True).to(self._device, non_blocking=True)
            self._compute.wait_stream(self._upload)
            with torch.cuda.stream(self._compute):
                began.record()
                batch.record_stream(self._compute)
                on_device = self._compute_batch(key, batch)
                ended.record()
            self._download.wait_stream(self._compute)
            with torch.cuda.stream(self._download):
                results, largest = (_downloaded(tensor, self._download) for tensor in on_device)
                copied.record()
        return CudaLaunched(results, largest, began, ended, copied)

    def free_memory(self) -> None:
        torch.cuda.empty_cache()

    def _compute_batch(self, key: BatchKey, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Queue a batch [n, ...]; its results and their magnitudes [n], in memory of their own."""
        captured = self._captured[replace(key, dtype=key.operation.usual.dtype)]
        write_unit(batch, captured.inputs(len(batch)))
        *results, largest = captured.replay(len(batch))
        ready = next((tensor for tensor in results if tensor.dtype == key.dtype), None)
        return finished(results[0], key.dtype) if ready is None else ready.clone(), largest.clone()

    def _function(self, key: BatchKey) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The captured work: results [B, ...] in the model's type and in the key's, and magnitudes [B]."""

        def run(batch: Tensor) -> tuple[Tensor, ...]:
            results = key.operation.run_unchecked(self._tokenizer, batch, key)
            return results, finished(results, key.dtype), largest_magnitudes(results)

        return run


def _downloaded(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Page-locked memory that a device's tensor is being copied to, on the current stream."""
    tensor.record_stream(stream)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class CudaLaunched:
    """A batch whose copies and kernels are queued on the GPU.

    Attributes:
        results: [n, ...] on the host, there once ``copied`` is reached.
        largest: [n], likewise: the largest magnitude of each item, in the model's type.
        began, ended: around the computation.
        copied: behind the copies to the host.
    """

    results: Tensor
    largest: Tensor
    began: torch.cuda.Event
    ended: torch.cuda.Event
    copied: torch.cuda.Event

    def wait(self) -> Outcome:
        self.copied.synchronize()
        device_s = self.began.elapsed_time(self.ended) / 1e3
        return Outcome.judged(self.results, self.largest, time.monotonic() - device_s, device_s)
