"""The protocol of runners: a runner launches batches on a device; waiting for a batch gives its outcome.

Each runner is used by one thread.

Shape legend: n items of a batch, S image side, C h w a latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from service.engine.operations import BatchKey, Operation


@dataclass(frozen=True)
class Outcome:
    """The outcome of a batch.

    Attributes:
        results: [n, ...] of the batch's dtype, on the CPU.
        finite: for each item whether all of its numbers were, in the model's type.
        fits: likewise in the type of the results.
        started_s: when the device began, on the clock of `time.monotonic`.
        device_s: how long it took, seconds.
    """

    results: Tensor
    finite: Sequence[bool]
    fits: Sequence[bool]
    started_s: float
    device_s: float

    @classmethod
    def judged(cls, results: Tensor, largest: Tensor, started_s: float, device_s: float) -> Self:
        """An outcome whose items are judged by their largest magnitudes [n], in the model's type."""
        in_type = largest.to(results.dtype) if results.is_floating_point() else largest
        finite, fits = largest.isfinite().tolist(), in_type.isfinite().tolist()
        return cls(results, finite, fits, started_s, device_s)


class Launched(Protocol):
    """A batch on its way."""

    def wait(self) -> Outcome:
        """Wait for the device.

        Raises:
            Exception: whatever the model or the device raised.
        """
        ...


class Runner(Protocol):
    """One device, or one worker of the CPU, with the model on it.

    Attributes:
        name: such as ``cuda:0`` or ``cpu:1``.
        buckets: sizes that batches are padded to, ascending.
        depth: batches that may be launched and not yet waited for.
    """

    name: str
    buckets: Sequence[int]
    depth: int

    def warm(self) -> Mapping[Operation, float]:
        """Run every bucket, so that no request pays for compilation, capture or first allocations.

        Buckets that turn out too slow are left out of `buckets`, except the smallest.

        Returns:
            Seconds that a batch of the largest bucket then takes, by operation.
        """
        ...

    def launch(self, key: BatchKey, inputs: Sequence[Tensor]) -> Launched:
        """Begin a batch of at most the largest bucket's size.

        Args:
            key: kind of the batch.
            inputs: images [3, S, S] uint8 or float32 in [0, 1], or latents [C, h, w] float32; on the CPU.
        """
        ...

    def free_memory(self) -> None:
        """Give cached memory back after the device ran out of memory."""
        ...
