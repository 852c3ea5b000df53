"""The Frechet distance against its formula with scipy's matrix square root."""

import numpy as np
import pytest
import torch

from training.evaluation.frechet import bias_note, frechet_distance
from training.evaluation.moments import FeatureMoments

linalg = pytest.importorskip("scipy.linalg")


def features(num_items: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(num_items, width, generator=generator, dtype=torch.float64) @ mixing + shift


def moments(items: torch.Tensor) -> FeatureMoments:
    result = FeatureMoments(items.shape[1])
    result.update(items)
    return result


def by_scipy(x: torch.Tensor, y: torch.Tensor) -> float:
    """FID's definition as it is usually written down."""
    c1, c2 = (np.atleast_2d(np.cov(items.numpy(), rowvar=False)) for items in (x, y))
    root = linalg.sqrtm(c1 @ c2)
    offset = (x.mean(dim=0) - y.mean(dim=0)).square().sum().item()
    return float(offset + np.trace(c1) + np.trace(c2) - 2 * np.trace(root.real))


@pytest.mark.parametrize(("width", "shift"), [(1, 0.0), (6, 0.3), (24, 0.0), (24, 2.0)])
def test_equals_the_formula(width: int, shift: float) -> None:
    x, y = features(200, width, 1), features(150, width, 2, shift)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(by_scipy(x, y), rel=1e-9)


def test_fewer_items_than_features() -> None:
    """Rank-deficient: the formula with a ridge too small to matter, which sqrtm needs, and we do not."""
    x, y = features(10, 32, 1), features(12, 32, 2)
    c1, c2 = (np.cov(items.numpy(), rowvar=False) for items in (x, y))
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    offset = (x.mean(dim=0) - y.mean(dim=0)).square().sum().item()
    expected = offset + np.trace(c1) + np.trace(c2) - 2 * trace
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-6)


def test_known_distances() -> None:
    x = features(50, 8, 3)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments(x), moments(x + 2)) == pytest.approx(4 * 8, rel=1e-9)
    scaled = (x - x.mean(dim=0)) * 3 + x.mean(dim=0)  # commuting: tr(C) (1 - 3)^2
    variance = torch.cov(x.T).trace().item()
    assert frechet_distance(moments(x), moments(scaled)) == pytest.approx(4 * variance, rel=1e-9)


def test_constant_features_and_too_few() -> None:
    flat = torch.ones(5, 4)
    assert frechet_distance(moments(flat), moments(flat + 1)) == pytest.approx(4)
    assert frechet_distance(moments(flat[:1]), moments(flat)) is None


def test_the_note_says_how_many_images() -> None:
    assert "250 images, fewer than its 1280 features" in str(bias_note(250, 1280))
    assert "fewer" not in str(bias_note(5000, 1280))
    assert bias_note(50_000, 2048) is None
