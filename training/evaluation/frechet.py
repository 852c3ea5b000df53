"""Frechet distance between Gaussians, exact in float64.

Shape legend: D width of features.
"""

import torch
from torch import Tensor

from training.evaluation.moments import FeatureMoments

# Enough images for the covariance of Inception's 2048 features; the field's figures are over this many.
CUSTOMARY_NUM_IMAGES = 50_000


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float | None:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Dowson and Landau 1982; Heusel et al. 2017, FID).

    With C1 = A1^T A1 and C2 = A2^T A2 from their eigenvalues, the trace of the root is the sum of the
    singular values of A1 A2^T. So nothing complex appears, and covariances of fewer items than features,
    whose products have no well-conditioned root, lose no digits.

    Returns:
        The distance, or None with fewer than two items on a side.
    """
    if min(first.count, second.count) < 2:
        return None
    c1, c2 = first.covariance, second.covariance
    root_trace = torch.linalg.svdvals(_factor(c1) @ _factor(c2).T).sum()
    offset = (first.mean - second.mean).square().sum()
    distance = offset + c1.trace() + c2.trace() - 2 * root_trace
    return max(0.0, float(distance))


def bias_note(num_images: int, width: int) -> str | None:
    """A warning that a distance over few images is biased; None over enough images."""
    if num_images >= CUSTOMARY_NUM_IMAGES:
        return None
    rank = f", fewer than its {width} features," if num_images <= width else ""
    return (
        f"over {num_images} images{rank} the distance is biased upwards: compare it only with distances "
        f"over the same images (the custom is {CUSTOMARY_NUM_IMAGES})"
    )


def _factor(covariance: Tensor) -> Tensor:
    """A [rank, D] with A^T A = ``covariance``; eigenvalues that are rounding alone are dropped."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
    kept = values > floor.clamp(min=0)
    return values[kept].sqrt().unsqueeze(1) * vectors[:, kept].T
