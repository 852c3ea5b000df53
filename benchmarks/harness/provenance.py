"""Where a result comes from: device, libraries, commit. No time stamps: the commit dates a result."""

import importlib.util
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Provenance:
    """First columns of every result."""

    device: str
    """Name of the GPU, or of the CPU with the number of threads."""
    dtype: str
    torch: str
    triton: str
    """Empty where triton is not installed."""
    commit: str
    """``-dirty`` where tracked files were changed, results aside; ``unknown`` outside a checkout."""


def read_provenance(device: torch.device, dtype: torch.dtype, commit: str | None = None) -> Provenance:
    """Provenance of results measured now in this process.

    Args:
        device: where the work runs.
        dtype: of operands and activations.
        commit: recorded instead of git's, for copies of the files without their history.
    """
    return Provenance(
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        triton=_triton_version(),
        commit=commit or _git_commit(),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return ""
    import triton

    return str(triton.__version__)


def _git_commit() -> str:
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
