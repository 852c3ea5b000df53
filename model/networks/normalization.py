"""Normalisation of latents per position: ``(z - mean) / sqrt(var + 1e-5)`` (RAE).

Shape legend: B batch, C latent width, h w latent grid.
"""

import torch
from torch import Tensor, nn

from model.errors import LatentError

STATISTICS_EPS = 1e-5


class NormalizesLatents(nn.Module):
    """Base of modules that carry the statistics of their latents."""

    latent_mean: Tensor | None
    latent_var: Tensor | None

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self._latent_shape = latent_shape
        self.register_buffer("latent_mean", None)
        self.register_buffer("latent_var", None)

    @property
    def has_statistics(self) -> bool:
        """Whether latents can be normalised per position."""
        return self.latent_mean is not None

    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Set the latents' mean and variance per position, each [C, h, w].

        Raises:
            LatentError: wrong shape, or a negative or non-finite value.
        """
        for name, tensor in (("mean", mean), ("var", var)):
            if tuple(tensor.shape) != self._latent_shape:
                found, wanted = list(tensor.shape), list(self._latent_shape)
                raise LatentError(f"statistics {name} has shape {found}, expected {wanted}")
            if not torch.isfinite(tensor).all():
                raise LatentError(f"statistics {name} has a non-finite value")
        if (var < 0).any():
            raise LatentError("statistics var has a negative value")
        example = next(self.parameters())
        self.latent_mean = mean.to(device=example.device, dtype=example.dtype)
        self.latent_var = var.to(device=example.device, dtype=example.dtype)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """``(z - mean) / sqrt(var + 1e-5)`` per position, [B, C, h, w]."""
        assert self.latent_mean is not None
        assert self.latent_var is not None
        return (latents - self.latent_mean) / torch.sqrt(self.latent_var + STATISTICS_EPS)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize_latents`."""
        assert self.latent_mean is not None
        assert self.latent_var is not None
        return latents * torch.sqrt(self.latent_var + STATISTICS_EPS) + self.latent_mean
