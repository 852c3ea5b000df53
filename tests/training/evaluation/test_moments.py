"""Streaming moments against two passes over all the data, in float64."""

import pytest
import torch

from training.evaluation.moments import FeatureMoments, PointwiseMoments

LARGE_MEAN = 1e4


def data(num_items: int = 101, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return LARGE_MEAN + torch.randn(num_items, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[101], [1, 100], [32, 32, 32, 5], [1] * 101])
def test_pointwise_equals_two_passes(sizes: list[int]) -> None:
    items = data(101, 3, 4)
    moments = PointwiseMoments((3, 4))
    for batch in items.split(sizes):
        moments.update(batch)
    assert moments.count == 101
    torch.testing.assert_close(moments.mean, items.mean(dim=0), rtol=0, atol=1e-9)
    torch.testing.assert_close(moments.variance, items.var(dim=0, correction=0), rtol=0, atol=1e-9)


def test_float32_items_of_large_mean_keep_their_variance() -> None:
    items = data(64, 5).float()
    moments = PointwiseMoments((5,))
    for batch in items.split(7):
        moments.update(batch)
    exact = items.double()
    torch.testing.assert_close(moments.variance, exact.var(dim=0, correction=0), rtol=1e-10, atol=0)


def test_covariance_equals_two_passes() -> None:
    items = data(60, 7)
    moments = FeatureMoments(7)
    for batch in items.split(13):
        moments.update(batch)
    torch.testing.assert_close(moments.covariance, torch.cov(items.T), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [PointwiseMoments, FeatureMoments])
def test_parts_merge_to_the_whole(kind) -> None:
    items = data(40, 6)
    make = (lambda: kind((6,))) if kind is PointwiseMoments else (lambda: kind(6))
    whole, merged = make(), make()
    whole.update(items)
    for part in (items[:3], items[:0], items[3:33], items[33:]):
        own = make()
        own.update(part)
        merged.merge(make().restore(own.tensors("x"), "x"))
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(merged.second, whole.second, rtol=0, atol=1e-7)


def test_tensors_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has shape \[3\], expected \[2\]"):
        PointwiseMoments((2,)).restore(PointwiseMoments((3,)).tensors("x"), "x")
