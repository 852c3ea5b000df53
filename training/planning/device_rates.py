"""Matrix rates of devices: what a step's operations are divided by to estimate its time."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
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
    """Of one device, and where the figures are from."""

    bfloat16_tflops: float
    float32_tflops: float
    source: str

    def seconds(self, bfloat16: int, float32: int) -> float:
        """Of so many operations in each precision."""
        return (bfloat16 / self.bfloat16_tflops + float32 / self.float32_tflops) / 1e12


def find_matrix_rate(device: torch.device, stated_tflops: Mapping[str, float]) -> MatrixRate:
    """The stated rates, or those of the device's data sheet, or measured ones.

    A GPU that the recipe names and this machine lacks is taken for an H100.

    Args:
        device: of the run.
        stated_tflops: by precision, ``bfloat16`` and ``float32``; what is not in it is found.
    """
    found = _find_tflops(device, set(PRECISIONS) - set(stated_tflops))
    sources = [found[0]] if found[1] else []
    rates = found[1] | dict(stated_tflops)
    sources += [f"{name} as stated" for name in PRECISIONS if name in stated_tflops]
    return MatrixRate(rates["bfloat16"], rates["float32"], ", ".join(sources))


def _find_tflops(device: torch.device, wanted: Collection[str]) -> tuple[str, dict[str, float]]:
    if not wanted:
        return "", {}
    if device.type == "cuda":
        is_here = (device.index or 0) < torch.cuda.device_count()
        name = torch.cuda.get_device_name(device) if is_here else ASSUMED_GPU
        known = next((rates for key, rates in KNOWN_TFLOPS.items() if key in name), None)
        if known is not None:
            source = f"{name}, data sheet" + ("" if is_here else "; assumed, as there is none here")
            rates = dict(zip(PRECISIONS, known, strict=True))
            return source, {precision: rates[precision] for precision in wanted}
    return "large products measured here", {
        precision: _measured_tflops(device, PRECISIONS[precision]) for precision in wanted
    }


def _measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    side = MATRIX_SIDES["cuda" if device.type == "cuda" else "cpu"]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(NUM_RUNS):
        begin = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds) / 1e12
