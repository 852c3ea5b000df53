"""Spectra of reconstructions: at which spatial frequencies they hold more or less than the original.

Shape legend: B batch, S image side.
"""

import torch
from torch import Tensor

from model.images.similarity import psnr

NUM_BANDS = 16


def log_spectrum(images: Tensor) -> Tensor:
    """Logarithm of the 2-D Fourier magnitude, the zero frequency in the middle.

    ``log(1 + |F|)`` of pixels in 0 ... 255, so that the 1 is far below the rounding noise of 8-bit
    pixels (about S / 3.5) and only keeps empty frequencies finite; the mean of the three channels.

    Args:
        images: [B, 3, S, S] in [0, 1].

    Returns:
        [B, S, S] float32, natural logarithm.
    """
    magnitudes = torch.fft.fft2(images.float() * 255).abs()
    return torch.fft.fftshift(magnitudes.log1p(), dim=(-2, -1)).mean(dim=1)


class SpectrumDifference:
    """Log spectrum of reconstructions less that of their originals, averaged over images."""

    def __init__(self, side: int) -> None:
        self.num_images = 0
        self.total_map = torch.zeros(side, side, dtype=torch.float64)
        self.total_deviation = 0.0
        self.total_psnr_db = 0.0

    def update(self, reconstructions: Tensor, originals: Tensor, original_spectra: Tensor) -> None:
        """Add images [B, 3, S, S] in [0, 1]; ``original_spectra`` is `log_spectrum` of the originals."""
        difference = (log_spectrum(reconstructions) - original_spectra).double().cpu()
        self.num_images += len(difference)
        self.total_map += difference.sum(dim=0)
        self.total_deviation += float(difference.abs().mean(dim=(1, 2)).sum())
        self.total_psnr_db += float(psnr(reconstructions, originals).double().sum())

    @property
    def map(self) -> Tensor:
        """Mean difference per frequency, [S, S] float64; negative where energy is missing."""
        return self.total_map / self.num_images

    @property
    def deviation(self) -> float:
        """Mean absolute deviation of the averaged map: systematic error of the spectrum."""
        return float(self.map.abs().mean())

    @property
    def deviation_per_image(self) -> float:
        """Mean over images of each one's mean absolute deviation: systematic and chance errors."""
        return self.total_deviation / self.num_images

    @property
    def psnr_db(self) -> float:
        """Mean PSNR, dB."""
        return self.total_psnr_db / self.num_images

    def profile(self) -> Tensor:
        """Mean difference in each of `band_centres`, [NUM_BANDS] float64."""
        bands = _bands(self.map.shape[0])
        inside = bands < NUM_BANDS  # the square's corners lie beyond its largest circle
        sums = torch.bincount(bands[inside], weights=self.map[inside], minlength=NUM_BANDS)
        return sums / torch.bincount(bands[inside], minlength=NUM_BANDS).clamp(min=1)


def band_centres() -> Tensor:
    """Radial frequency of each band, cycles per pixel up to 0.5, [NUM_BANDS] float64."""
    return (torch.arange(NUM_BANDS, dtype=torch.float64) + 0.5) / (2 * NUM_BANDS)


def _bands(side: int) -> Tensor:
    """Number of the radial band that each frequency is in, [S, S] int64."""
    frequency = torch.fft.fftshift(torch.fft.fftfreq(side, dtype=torch.float64))
    radius = (frequency[:, None].square() + frequency[None].square()).sqrt()
    return (radius * 2 * NUM_BANDS).long()
