"""Randomness of a training step, drawn for each sample by itself.

Every draw is a function of (seed, purpose, step, sample), where the sample is its index in the step's global
batch. So neither the number of ranks nor of micro-batches changes what a sample sees, and a resumed run
needs no saved state. Tensors are drawn on the CPU unless a device is named; CPUs and GPUs draw differently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

SAMPLES_PER_BLOCK = 32


class Purpose(IntEnum):
    """Purpose of a draw. `training.data.batches` uses the numbers 0, 1 and 7."""

    NOISE = 2
    PERCEPTUAL_CROP = 3
    AUGMENT_FOR_GENERATOR = 4
    AUGMENT_REAL = 5
    AUGMENT_FAKE = 6
    GENERATION_NOISE = 8
    GENERATION_CHOICES = 9
    VALIDATION_NOISE = 10


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

    def normal_block(
        self, purpose: Purpose, samples: range, shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """Standard normal numbers for consecutive samples, [B, *shape] float32, drawn on ``device``.

        Like `normal`, but with one generator per block of samples, so that a GPU is asked a few times per
        step instead of once per sample. The streams are others than those of `normal`.
        """
        return self._in_blocks(purpose, samples, shape, device, torch.randn)

    def uniform_block(self, purpose: Purpose, samples: range, count: int, device: torch.device) -> Tensor:
        """``count`` uniform numbers in [0, 1) per sample, [B, count] float32, as `normal_block`."""
        return self._in_blocks(purpose, samples, (count,), device, torch.rand)

    def _in_blocks(
        self,
        purpose: Purpose,
        samples: range,
        shape: tuple[int, ...],
        device: torch.device,
        draw: Callable[..., Tensor],
    ) -> Tensor:
        generator = torch.Generator(device)
        first = samples.start // SAMPLES_PER_BLOCK
        blocks = []
        for block in range(first, -(-samples.stop // SAMPLES_PER_BLOCK)):
            generator.manual_seed(int(self._numbers(purpose, block).integers(2**62)))
            size = (SAMPLES_PER_BLOCK, *shape)
            blocks.append(draw(size, generator=generator, device=device, dtype=torch.float32))
        start = samples.start - first * SAMPLES_PER_BLOCK
        return torch.cat(blocks)[start : start + len(samples)]

    def _numbers(self, purpose: Purpose, *sample: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(purpose), self.step, *sample))
