"""Devices, mixed precision and per-step generators, by the names that recipes give them."""

from contextlib import AbstractContextManager, nullcontext

import torch


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision: bfloat16 products on CUDA, or on request; float32 otherwise."""
    if products_dtype(device, precision) == torch.bfloat16:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def products_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Type of the matrix products under `autocast`."""
    is_mixed = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if is_mixed else torch.float32


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Randomness of one step, a function of (seed, step) alone, so that resuming needs no saved state."""
    return torch.Generator(device).manual_seed((seed + 1) * 1_000_003 + step)
