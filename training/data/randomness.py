"""Randomness of a training step, drawn for each sample by itself.

Every draw is a function of (seed, purpose, step, sample), where the sample is its index in the step's global
batch. So neither the number of ranks nor of micro-batches changes what a sample sees, and a resumed run
needs no saved state. Tensors are drawn on the CPU unless a device is named; CPUs and GPUs draw differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a draw is for. `training.data.batches` uses the numbers 0 and 1 for order and augmentation."""

    NOISE = 2
    PERCEPTUAL_CROP = 3
    AUGMENT_FOR_GENERATOR = 4
    AUGMENT_REAL = 5
    AUGMENT_FAKE = 6


@dataclass(frozen=True)
class StepRandomness:
    """The draws of optimizer step ``step`` (from 0)."""

    seed: int
    step: int

    def shared(self, purpose: Purpose) -> torch.Generator:
        """A CPU generator for what all samples of the step share."""
        seed = int(self._numbers(purpose).integers(2**62))
        return torch.Generator().manual_seed(seed)

    def uniform(self, purpose: Purpose, samples: Sequence[int], count: int) -> Tensor:
        """``count`` uniform numbers in [0, 1) for each sample, [B, count] float32."""
        rows = [self._numbers(purpose, sample).random(count, dtype=np.float32) for sample in samples]
        return torch.from_numpy(np.stack(rows))

    def normal(
        self, purpose: Purpose, samples: Sequence[int], shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """Standard normal numbers for each sample, [B, *shape] float32 on ``device``."""
        generator = torch.Generator(device)
        drawn = []
        for sample in samples:
            # The first numbers of this stream may already have been drawn by `uniform`.
            generator.manual_seed(int(self._numbers(purpose, sample).spawn(1)[0].integers(2**62)))
            drawn.append(torch.randn(shape, generator=generator, device=device))
        return torch.stack(drawn)

    def _numbers(self, purpose: Purpose, *sample: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(purpose), self.step, *sample))
