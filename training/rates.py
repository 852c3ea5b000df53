"""Matrix rates of devices: what a step's operations are divided by to estimate its time."""

import time
from dataclasses import dataclass

import torch

from training.recipe import BaseRecipe

# Dense TFLOP/s from NVIDIA's data sheets: tensor cores in bfloat16, and float32 without TF32.
KNOWN_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "RTX 4090": (165.2, 82.6),
}
ASSUMED_GPU = "H100"
MATRIX_SIDES = {"cuda": 8192, "cpu": 1024}
NUM_RUNS = 4


@dataclass(frozen=True)
class MatrixRate:
    """Of one device in one precision, and where the figure is from."""

    tflops: float
    source: str


def find_matrix_rate(recipe: BaseRecipe, device: torch.device, stated_tflops: float | None) -> MatrixRate:
    """The stated rate, or that of the device's data sheet, or a measured one.

    A GPU that the recipe names and this machine lacks is taken for an H100.
    """
    if stated_tflops is not None:
        return MatrixRate(stated_tflops, "as stated")
    is_narrow = recipe.precision == "bfloat16" or (recipe.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if is_narrow else torch.float32
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        is_here = (device.index or 0) < torch.cuda.device_count()
        name = torch.cuda.get_device_name(device) if is_here else ASSUMED_GPU
        known = next((rates for key, rates in KNOWN_TFLOPS.items() if key in name), None)
        if known is not None:
            remark = "data sheet" if is_here else "data sheet; assumed, as there is none here"
            return MatrixRate(known[0] if is_narrow else known[1], f"{name}, {precision}, {remark}")
    return MatrixRate(_measured_tflops(device, dtype), f"a large {precision} product measured here")


def _measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    side = MATRIX_SIDES["cuda" if device.type == "cuda" else "cpu"]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(NUM_RUNS):
        begin = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds) / 1e12
