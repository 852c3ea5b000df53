"""PSNR and SSIM against scikit-image."""

import pytest
import torch

from model.images.similarity import detail, edge_ratio, psnr, ssim

skimage_metrics = pytest.importorskip("skimage.metrics")


def pair(noise: float, height: int = 48, width: int = 40):
    generator = torch.Generator().manual_seed(2)
    smooth = torch.rand(3, 3, 6, 5, generator=generator)
    reference = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear")
    image = reference + noise * torch.randn(reference.shape, generator=generator)
    return image.clamp(0, 1), reference


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.5])
def test_psnr_equals_scikit_image(noise):
    image, reference = pair(noise)
    for ours, x, y in zip(psnr(image, reference), image.numpy(), reference.numpy(), strict=True):
        expected = skimage_metrics.peak_signal_noise_ratio(y, x, data_range=1.0)
        assert ours.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.05, 0.5])
@pytest.mark.parametrize("size", [(48, 40), (11, 13)])
def test_ssim_equals_scikit_image(noise, size):
    image, reference = pair(noise, *size)
    for ours, x, y in zip(ssim(image, reference), image.double(), reference.double(), strict=True):
        expected = skimage_metrics.structural_similarity(
            x.numpy(),
            y.numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=0,
        )
        assert ours.item() == pytest.approx(expected, abs=1e-4)


def test_identical_images():
    _, reference = pair(0)
    assert torch.isinf(psnr(reference, reference)).all()
    assert torch.equal(ssim(reference, reference), torch.ones(3))


def test_flat_images_of_16_bit_floats_do_not_lose_the_variance():
    flat = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float16)
    assert ssim(flat, flat).item() == 1
    assert psnr(flat, flat + 0.25).item() == pytest.approx(12.0412, abs=1e-3)


def test_edge_ratio_tells_a_mosaic_from_a_ramp() -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    mosaic = ramp.unflatten(3, (4, 8)).mean(dim=4, keepdim=True).expand(-1, -1, -1, -1, 8).flatten(3)
    noisy = mosaic + 0.01 * (torch.arange(32) % 2)
    assert edge_ratio(ramp + 0.5 * ramp.transpose(2, 3), 8).item() == pytest.approx(1, abs=1e-4)
    assert edge_ratio(noisy, 8).item() > 3
    assert torch.isfinite(edge_ratio(torch.zeros(1, 3, 32, 32), 8)).all()


def test_detail_is_the_share_of_the_references() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(detail(images, images, 8), torch.ones(2))
    torch.testing.assert_close(detail(images * 0.25, images, 8), torch.full((2,), 0.25))
    assert torch.isfinite(detail(images, torch.zeros_like(images), 8)).all()
