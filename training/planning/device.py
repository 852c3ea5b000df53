"""Devices of a plan: memory and matrix rates."""

import os
import time

import torch

# Dense TFLOP/s from NVIDIA's data sheets: tensor cores in bfloat16, and float32 without TF32.
KNOWN_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "RTX 4090": (165.2, 82.6),
}


def device_bytes(device: torch.device) -> int | None:
    """Memory of a device; None where it is not here."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    is_here = (device.index or 0) < torch.cuda.device_count()
    return torch.cuda.get_device_properties(device).total_memory if is_here else None


def matrix_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix rate of a device: its data sheet's, else measured. A GPU that is not here counts as an H100."""
    if device.type == "cuda":
        is_here = (device.index or 0) < torch.cuda.device_count()
        name = torch.cuda.get_device_name(device) if is_here else "H100"
        known = next((rates for key, rates in KNOWN_TFLOPS.items() if key in name), None)
        if known is not None:
            return known[dtype == torch.float32]
    return _measured_tflops(device, dtype)


def _measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    side, seconds = (8192 if device.type == "cuda" else 1024), []
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(4):
        begin = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds) / 1e12
