"""Image similarity, PSNR and SSIM per image, and whether a reconstruction is a mosaic.

Shape legend: B batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
FLAT = 1e-4  # mean absolute difference, in [0, 1], below which patches count as this


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over RGB.

    Args:
        images, references: [B, 3, H, W] in [0, 1].

    Returns:
        [B] float32; identical images give infinity.
    """
    error = (images.float() - references.float()).square().flatten(1).mean(dim=1)
    return -10.0 * torch.log10(error)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), Gaussian window 11x11 of sigma 1.5, mean over RGB.

    Equals scikit-image's ``structural_similarity`` with ``gaussian_weights=True``, ``sigma=1.5``,
    ``use_sample_covariance=False``, ``data_range=1``.

    Args:
        images, references: [B, 3, H, W] in [0, 1], H and W at least 11.

    Returns:
        [B] float32.
    """
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64, device=images.device)
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window = window / window.sum()

    def blur(planes: Tensor) -> Tensor:
        rows = F.conv2d(planes, window.view(1, 1, -1, 1))
        return F.conv2d(rows, window.view(1, 1, 1, -1))

    # float64: the variances are differences of nearly equal numbers.
    x, y = (batch.double().flatten(0, 1).unsqueeze(1) for batch in (images, references))
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x**2
    var_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).unflatten(0, images.shape[:2]).flatten(1).mean(dim=1).float()


def edge_ratio(images: Tensor, patch_size: int) -> Tensor:
    """Mean absolute difference of neighbouring pixels across patch borders over that inside patches.

    Photos have about 1.04; a mosaic has several times that.

    Args:
        images: [B, 3, S, S], S a multiple of ``patch_size``.
        patch_size: side of a patch, pixels.

    Returns:
        [B] float32.
    """
    across, inside = neighbour_differences(images, patch_size)
    return across / inside.clamp_min(FLAT)


def detail(images: Tensor, references: Tensor, patch_size: int) -> Tensor:
    """Mean absolute difference of neighbouring pixels inside patches, as a share of the references'.

    Args:
        images, references: [B, 3, S, S], S a multiple of ``patch_size``.
        patch_size: side of a patch, pixels.

    Returns:
        [B] float32.
    """
    inside, wanted = (neighbour_differences(pixels, patch_size)[1] for pixels in (images, references))
    return inside / wanted.clamp_min(FLAT)


def neighbour_differences(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Mean absolute difference of neighbouring pixels, across patch borders and inside patches.

    Args:
        images: [B, 3, S, S], S a multiple of ``patch_size``; an image, or an error.
        patch_size: side of a patch, pixels.

    Returns:
        Two of [B] float32.
    """
    across, inside = [], []
    for pixels in (images.float(), images.float().transpose(2, 3)):
        steps = pixels.diff(dim=3).abs()  # [B, 3, S, S - 1]
        is_border = torch.arange(1, pixels.shape[3], device=pixels.device) % patch_size == 0
        across.append(steps[..., is_border].flatten(1))
        inside.append(steps[..., ~is_border].flatten(1))
    across_B, inside_B = (torch.cat(parts, dim=1).mean(dim=1) for parts in (across, inside))
    return across_B, inside_B
