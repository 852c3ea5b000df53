"""Streaming summaries in float64: range, histogram, principal components.

Shape legend: T values or tokens of one batch, K columns, C latent width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.evaluation.moments import FeatureMoments, PointwiseMoments


class ColumnMoments(PointwiseMoments):
    """Mean, deviation, range and share of negative values of each column of rows [T, K]."""

    def __init__(self, num_columns: int) -> None:
        super().__init__((num_columns,))
        self.num_negative = torch.zeros(num_columns, dtype=torch.int64)
        self.minimum = torch.full_like(self.mean, torch.inf)
        self.maximum = torch.full_like(self.mean, -torch.inf)

    def update(self, items: Tensor) -> None:
        """Add rows [T, K], at least one."""
        values = items.detach().to(self.mean)
        super().update(values)
        self.num_negative += (values < 0).sum(dim=0)
        self.minimum = torch.minimum(self.minimum, values.amin(dim=0))
        self.maximum = torch.maximum(self.maximum, values.amax(dim=0))

    @property
    def std(self) -> Tensor:
        """Biased standard deviation, [K]."""
        return self.variance.sqrt()

    @property
    def negative_share(self) -> Tensor:
        """Share of values below zero, [K]."""
        return self.num_negative.double() / self.count


class Histogram:
    """Counts in equal bins; values outside the range fall into the bins at its ends."""

    def __init__(self, low: float, high: float, num_bins: int) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(num_bins, dtype=torch.int64)
        self.moments = ColumnMoments(1)

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        flat = values.detach().double().cpu().flatten()
        self.moments.update(flat[:, None])
        num_bins = len(self.counts)
        bins = ((flat - self.low) / (self.high - self.low) * num_bins).long().clamp(0, num_bins - 1)
        self.counts += torch.bincount(bins, minlength=num_bins)

    @property
    def edges(self) -> Tensor:
        """Bin edges, [bins + 1]."""
        return torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the values lie, to the width of a bin."""
        cumulative = self.counts.cumsum(0).double() / self.counts.sum()
        index = int((cumulative < share).sum().clamp(max=len(self.counts) - 1))
        before = float(cumulative[index - 1]) if index else 0.0
        inside = (share - before) / max(float(cumulative[index]) - before, 1e-300)
        value = float(self.edges[index] + (self.edges[index + 1] - self.edges[index]) * inside)
        return min(max(value, float(self.moments.minimum)), float(self.moments.maximum))


@dataclass(frozen=True)
class PrincipalComponents:
    """Directions of largest variance, in order.

    Attributes:
        mean: [C] float64.
        directions: [C, C] float64, a unit column each; its entry of largest magnitude is positive.
        explained_ratio: [C] float64, share of the total variance, descending.
    """

    mean: Tensor
    directions: Tensor
    explained_ratio: Tensor

    def project(self, tokens: Tensor, num_components: int) -> Tensor:
        """Coordinates of tokens [..., C] on the first components, [..., num_components]."""
        return (tokens.double().cpu() - self.mean) @ self.directions[:, :num_components]

    @property
    def participation_ratio(self) -> float:
        """``(sum v)^2 / sum v^2`` of the variances: as how many equal directions the spread counts."""
        return float(self.explained_ratio.sum() ** 2 / self.explained_ratio.square().sum())


def principal_components(tokens: FeatureMoments) -> PrincipalComponents:
    """Eigenvectors of the covariance; signs are fixed, so that the same data gives the same colours."""
    variances, directions = torch.linalg.eigh(tokens.second / tokens.count)
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    largest = directions.abs().argmax(dim=0)
    signs = directions.gather(0, largest[None]).sign()
    total = variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return PrincipalComponents(tokens.mean.clone(), directions * signs, variances / total)
