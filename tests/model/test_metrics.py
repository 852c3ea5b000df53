"""PSNR and SSIM against scikit-image."""

import pytest
import torch

from model.metrics import psnr, ssim

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
