"""CUDA graphs of whole encodes and decodes: one capture a batch size, replayed without launch overhead.

An encode is some 200 small launches; at small batches the host cannot issue them as fast as the GPU
runs them. A captured graph replays them as one.
"""

import bisect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_WARMUP_RUNS = 3

_capturing = threading.Lock()
"""Held by the one capture of the process, its warm-up included: what a warm-up allocates or sets up would
spoil the capture of another thread."""


def bucket_for(num_items: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds a batch.

    Args:
        num_items: items in the batch, at least 1.
        buckets: batch sizes, ascending.

    Raises:
        ValueError: the batch is empty or larger than every bucket.
    """
    if not 1 <= num_items <= buckets[-1]:
        raise ValueError(f"a batch of {num_items} items fits none of the buckets {list(buckets)}")
    return buckets[bisect.bisect_left(buckets, num_items)]


class CapturedBuckets:
    """A function of a batch, captured in CUDA graphs for fixed batch sizes.

    A batch is padded to the smallest bucket that holds it. All graphs share one pool of memory and one
    input, so that they take what the largest needs; they must not run at the same time.

    Args:
        function: [B, ...] to [B, ...], such as `Tokenizer.encode`, or to several such tensors; must not wait
            for the device, and the weights that it uses must not be moved or replaced afterwards.
        example: a batch on a CUDA device, with the largest bucket's size and the dtype of all inputs.
        buckets: batch sizes to capture, ascending.
        pool: memory shared with other captures that never run at the same time
            (`torch.cuda.graph_pool_handle`); by default one of its own.

    Raises:
        ValueError: the example is not on a CUDA device, or the buckets are not ascending batch sizes that
            end in its own.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
        example: Tensor,
        buckets: Sequence[int],
        pool: Any = None,
    ) -> None:
        if example.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, the example is on {example.device}")
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"buckets must be ascending batch sizes, not {list(buckets)}")
        if len(example) != buckets[-1]:
            raise ValueError(f"the example has {len(example)} items, the largest of {list(buckets)} differs")
        self.buckets = tuple(buckets)
        self._function = function
        self._inputs = example.clone()
        with _capturing, torch.cuda.device(example.device):
            self._pool = pool or torch.cuda.graph_pool_handle()
            # The largest first: the others then fit into its memory.
            self._graphs = {bucket: self._capture(bucket) for bucket in reversed(self.buckets)}

    def inputs(self, num_items: int) -> Tensor:
        """The memory [B, ...] that the next replay reads, to be written on the stream of the replay."""
        return self._inputs[:num_items]

    def replay(self, num_items: int) -> tuple[Tensor, ...]:
        """Replay on what `inputs` holds, on the current stream.

        Returns:
            What the function gives, [B, ...] each, in memory that the next replay of any bucket overwrites.

        Raises:
            ValueError: B fits no bucket.
        """
        graph, results = self._graphs[bucket_for(num_items, self.buckets)]
        with torch.cuda.device(self._inputs.device):
            graph.replay()
        return tuple(tensor[:num_items] for tensor in results)

    def __call__(self, batch: Tensor) -> Tensor:
        """Replay on a batch, for a function of one result.

        Args:
            batch: [B, ...], on any device; B at most the largest bucket.

        Returns:
            [B, ...], a tensor of its own; queued on the current stream.

        Raises:
            ValueError: B fits no bucket, or the items have another shape.
        """
        num_items = batch.shape[0]
        if batch.shape[1:] != self._inputs.shape[1:]:
            wanted = ", ".join(str(size) for size in self._inputs.shape[1:])
            raise ValueError(f"the batch has shape {list(batch.shape)}, expected [B, {wanted}]")
        bucket_for(num_items, self.buckets)
        with torch.cuda.device(self._inputs.device):
            self.inputs(num_items).copy_(batch, non_blocking=True)
            (results,) = self.replay(num_items)
            return results.clone()

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        inputs = self._inputs[:bucket]
        # Off the main stream, as PyTorch asks: kernels compile and libraries set themselves up
        # before the capture, which allows neither.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARMUP_RUNS):
                self._function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device: PyTorch's default is the first capture's, whatever its device was.
        # What other threads do meanwhile, such as batches of another device, is no part of it.
        with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            results = self._function(inputs)
        return graph, results if isinstance(results, tuple) else (results,)
