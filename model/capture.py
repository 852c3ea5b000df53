"""Whole-encode CUDA graphs: one capture a batch size, replayed without launch overhead.

An encode is some 200 small launches; at small batches the host cannot issue them as fast as the GPU
runs them. A captured graph replays them as one.
"""

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from model.tokenizer import LatentKind, Tokenizer

DEFAULT_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
NUM_WARMUP_RUNS = 3


def bucket_for(num_images: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds a batch.

    Args:
        num_images: images in the batch, at least 1.
        buckets: batch sizes, ascending.

    Raises:
        ValueError: the batch is empty or larger than every bucket.
    """
    if not 1 <= num_images <= buckets[-1]:
        raise ValueError(f"a batch of {num_images} images fits none of the buckets {list(buckets)}")
    return buckets[bisect.bisect_left(buckets, num_images)]


class CapturedEncode:
    """`Tokenizer.encode` for fixed batch sizes, captured in CUDA graphs.

    A batch is padded to the smallest bucket that holds it. All graphs share one pool of memory and one
    input, so that they take what the largest needs; they must not run at the same time.

    Args:
        tokenizer: on a CUDA device; its weights must not be moved or replaced afterwards.
        buckets: batch sizes to capture, ascending.
        latent: as in `Tokenizer.encode`.
        normalize: as in `Tokenizer.encode`.

    Raises:
        ValueError: the tokenizer is not on a CUDA device, or the buckets are not ascending.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        buckets: Sequence[int] = DEFAULT_BUCKETS,
        latent: LatentKind = "enriched",
        normalize: bool = False,
    ) -> None:
        if tokenizer.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, the tokenizer is on {tokenizer.device}")
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"buckets must be ascending batch sizes, not {list(buckets)}")
        self.tokenizer = tokenizer
        self.buckets = tuple(buckets)
        self.latent = latent
        self.normalize = normalize
        side = tokenizer.config.image_size
        self._images = torch.zeros(
            (self.buckets[-1], 3, side, side), dtype=tokenizer.dtype, device=tokenizer.device
        )
        self._pool = torch.cuda.graph_pool_handle()
        # The largest first: the others then fit into its memory.
        self._graphs = {bucket: self._capture(bucket) for bucket in reversed(self.buckets)}

    def __call__(self, images: Tensor) -> Tensor:
        """Tokenize images.

        Args:
            images: [B, 3, S, S] in [0, 1], on any device; B at most the largest bucket.

        Returns:
            [B, C, h, w], a tensor of its own.

        Raises:
            ValueError: B fits no bucket, or the images have another shape.
        """
        num_images = images.shape[0]
        if images.shape[1:] != self._images.shape[1:]:
            wanted = list(self._images.shape[1:])
            raise ValueError(f"images have shape {list(images.shape)}, expected [B, {str(wanted)[1:]}")
        graph, latents = self._graphs[bucket_for(num_images, self.buckets)]
        with torch.cuda.device(self.tokenizer.device):
            self._images[:num_images].copy_(images, non_blocking=True)
            graph.replay()
            return latents[:num_images].clone()

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        images = self._images[:bucket]
        with torch.cuda.device(self.tokenizer.device):
            # Off the main stream, as PyTorch asks: kernels compile and libraries set themselves up
            # before the capture, which allows neither.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARMUP_RUNS):
                    self._encode(images)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                latents = self._encode(images)
        return graph, latents

    def _encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images, self.latent, self.normalize)
