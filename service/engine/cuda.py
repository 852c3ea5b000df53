"""The runner of a GPU: pinned buffers, copies beside the computation, captured graphs.

A batch is launched before the last one has ended, so that the host's work and the copies overlap with the
device's work.

Shape legend: n items of a batch, S image side, C h w a latent.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cuda_graphs import CapturedBuckets
from model.images.tensors import to_unit
from model.tokenizer import Tokenizer, finite_items
from service.engine.operations import OPERATIONS, BatchKey, Operation
from service.engine.runners import Outcome
from service.engine.warming import fast_buckets, measure


class CudaRunner:
    """Runs batches on one GPU: pinned buffers, asynchronous copies, every bucket a captured graph.

    The model runs on one stream, copies in and out on two others. Two batches are on their way at a time:
    while the device runs one, the host fills the buffers of the next. Each holds a slot of buffers, from its
    launch until it has been waited for or has failed, so that no batch's results are overwritten.

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
        side = tokenizer.config.image_size
        item_numel = max(3 * side * side, torch.Size(tokenizer.config.latent_shape).numel())
        self._free = [_Slot(buckets[-1], item_numel) for _ in range(self.depth)]
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
        assert self._free, f"more than {self.depth} batches launched and not waited for"
        slot = self._free.pop()
        try:
            return self._queue(slot, key, inputs)
        except BaseException:
            self.reclaim(slot)
            raise

    def release(self, slot: "_Slot") -> None:
        """Take back the slot of a batch whose copies have ended."""
        assert slot not in self._free
        self._free.append(slot)

    def reclaim(self, slot: "_Slot") -> None:
        """Take back the slot of a batch that failed, once the device no longer copies into or out of it."""
        try:
            for stream in (self._upload, self._compute, self._download):
                with torch.cuda.stream(stream):
                    reached = torch.cuda.Event(blocking=True)
                    reached.record()
                reached.synchronize()
        finally:  # a device that cannot even wait is broken, and copies nothing
            self.release(slot)

    def _queue(self, slot: "_Slot", key: BatchKey, inputs: Sequence[Tensor]) -> "CudaLaunched":
        """Queue the copies and kernels of one batch on the streams."""
        num_items = len(inputs)
        with torch.cuda.device(self._device), torch.inference_mode():
            began, ended, copied = (
                torch.cuda.Event(enable_timing=timed, blocking=True) for timed in (True, True, False)
            )
            with torch.cuda.stream(self._upload):
                batch = slot.fill(inputs).to(self._device, non_blocking=True)
            self._compute.wait_stream(self._upload)
            with torch.cuda.stream(self._compute):
                began.record()
                batch.record_stream(self._compute)
                results = self._captured[key](to_unit(batch, self._tokenizer.dtype))
                finite = finite_items(results)
                ended.record()
            self._download.wait_stream(self._compute)
            with torch.cuda.stream(self._download):
                for tensor in (results, finite):
                    tensor.record_stream(self._download)
                host_results = slot.results(results).copy_(results, non_blocking=True)
                host_finite = slot.finite[:num_items].copy_(finite, non_blocking=True)
                copied.record()
        return CudaLaunched(self, slot, host_results, host_finite, began, ended, copied)

    def free_memory(self) -> None:
        torch.cuda.empty_cache()

    def _function(self, key: BatchKey) -> Callable[[Tensor], Tensor]:
        return lambda batch: key.operation.run_unchecked(self._tokenizer, batch, key)


class _Slot:
    """Page-locked memory of one batch on its way, its input and its result."""

    def __init__(self, num_items: int, item_numel: int) -> None:
        num_bytes = num_items * item_numel * torch.float32.itemsize
        self._input = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._output = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.finite = torch.empty(num_items, dtype=torch.bool, pin_memory=True)

    def fill(self, inputs: Sequence[Tensor]) -> Tensor:
        """Copy items into the buffer; a view [n, ...] of it comes back."""
        dtypes = {tensor.dtype for tensor in inputs}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        batch = _view(self._input, (len(inputs), *inputs[0].shape), dtype)
        for place, tensor in zip(batch, inputs, strict=True):
            place.copy_(tensor)
            if tensor.dtype == torch.uint8 != dtype:
                place.div_(255)
        return batch

    def results(self, like: Tensor) -> Tensor:
        """A view of the buffer with the shape and dtype of a device's tensor."""
        return _view(self._output, tuple(like.shape), like.dtype)


def _view(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return buffer[:num_bytes].view(dtype).view(*shape)


@dataclass(frozen=True)
class CudaLaunched:
    """A batch whose copies and kernels are queued on the GPU. It holds a slot until it is waited for."""

    runner: CudaRunner
    slot: _Slot
    host_results: Tensor
    host_finite: Tensor
    began: torch.cuda.Event
    ended: torch.cuda.Event
    copied: torch.cuda.Event

    def wait(self) -> Outcome:
        try:
            self.copied.synchronize()
            device_s = self.began.elapsed_time(self.ended) / 1e3
            # The next batch overwrites the buffers, so results are copied, and become float32 on the way.
            results = self.host_results.to(torch.float32, copy=True)
            outcome = Outcome(results, self.host_finite.tolist(), time.monotonic() - device_s, device_s)
        except BaseException:
            self.runner.reclaim(self.slot)
            raise
        self.runner.release(self.slot)
        return outcome
