"""Streaming mean and (co)variance in float64: batches and ranks are merged without a loss.

Chan, Golub and LeVeque's pairwise update (1983): sums of squares are taken about each part's own mean, so
that data far from zero cancel nothing.

Shape legend: B batch, D width of features.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor


class Moments(ABC):
    """Count, mean and second moment about the mean of the items seen so far.

    Attributes:
        count: number of items.
        mean: of an item's shape, float64.
        second: sum over items of the (outer) square of ``item - mean``, float64.
    """

    def __init__(self, mean: Tensor, second: Tensor, count: int = 0) -> None:
        self.count = count
        self.mean = mean
        self.second = second

    @abstractmethod
    def _square(self, deviations: Tensor) -> Tensor:
        """Sum over B of the square of deviations [B, ...]."""

    def update(self, items: Tensor) -> None:
        """Add items [B, ...], of any dtype and on any device."""
        if len(items) == 0:
            return
        exact = items.detach().to(self.mean)
        mean = exact.mean(dim=0)
        self._merge(len(exact), mean, self._square(exact - mean))

    def merge(self, other: Self) -> None:
        """Add the items that another object has seen."""
        if other.count:
            self._merge(other.count, other.mean.to(self.mean), other.second.to(self.second))

    def _merge(self, count: int, mean: Tensor, second: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.second = self.second + second + self._square(delta.unsqueeze(0)) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors for `restore`, named ``<prefix>.count`` and so on."""
        return {
            f"{prefix}.count": torch.tensor([self.count], dtype=torch.int64),
            f"{prefix}.mean": self.mean.cpu(),
            f"{prefix}.second": self.second.cpu(),
        }

    def restore(self, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        """Take over what `tensors` gave.

        Raises:
            KeyError, ValueError: a tensor is missing or has another shape.
        """
        mean, second = tensors[f"{prefix}.mean"], tensors[f"{prefix}.second"]
        if mean.shape != self.mean.shape or second.shape != self.second.shape:
            raise ValueError(f"{prefix} has shape {list(mean.shape)}, expected {list(self.mean.shape)}")
        self.count = int(tensors[f"{prefix}.count"].item())
        self.mean, self.second = mean.to(self.mean), second.to(self.second)
        return self


class PointwiseMoments(Moments):
    """Mean and variance of each position of an item."""

    def __init__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        zeros = torch.zeros(tuple(shape), dtype=torch.float64, device=device)
        super().__init__(zeros, zeros.clone())

    @property
    def variance(self) -> Tensor:
        """Biased variance (the sum of squares over the count), of an item's shape."""
        return self.second / max(1, self.count)

    def _square(self, deviations: Tensor) -> Tensor:
        return deviations.square().sum(dim=0)


class FeatureMoments(Moments):
    """Mean and covariance of features [B, D]."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        mean = torch.zeros(width, dtype=torch.float64, device=device)
        super().__init__(mean, torch.zeros(width, width, dtype=torch.float64, device=device))

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D], as FID's definition takes it; at least two items."""
        return self.second / (self.count - 1)

    def _square(self, deviations: Tensor) -> Tensor:
        return deviations.T @ deviations
