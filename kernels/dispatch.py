"""Which implementation of the fusion runs: one pure predicate over setting, problem and platform."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

FusionPath = Literal["triton", "triton_fp8", "folded", "reference"]
FusionSetting = Literal["auto", "triton", "triton_fp8", "folded", "reference"]

MIN_CAPABILITY = (8, 0)
MIN_FP8_CAPABILITY = (8, 9)
WIDTH_MULTIPLE = 64
MAX_WIDTH = 2048
MAX_LAYERS = 64
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FusionProblem:
    """Sizes and options of a fusion."""

    num_layers: int
    width: int
    hidden_width: int
    dtype: torch.dtype
    has_experts: bool = True
    """False for the cross-attention ablation."""
    has_plain_norm: bool = True
    """Whether LN_bb is without affine part."""


@dataclass(frozen=True)
class Platform:
    """Device and libraries that a fusion runs on."""

    device_type: str
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA device."""
    has_triton: bool = True
    is_interpreted: bool = False
    """Whether Triton's interpreter (``TRITON_INTERPRET=1``) runs the kernels, on any device."""


@dataclass(frozen=True)
class Choice:
    """A path, and why it was taken."""

    path: FusionPath
    reason: str


def detect_platform(device: torch.device) -> Platform:
    """Facts about a device and this process, for `choose_path`."""
    return Platform(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        has_triton=importlib.util.find_spec("triton") is not None,
        is_interpreted=os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"),
    )


def choose_path(setting: FusionSetting, problem: FusionProblem, platform: Platform) -> Choice:
    """Choose an implementation.

    ``auto`` takes the Triton kernels on every GPU that runs them, since there the definition is limited
    by memory traffic at small expert widths too; elsewhere whichever of folded and definition has fewer
    multiply-adds; the definition where nothing else can run. Any other setting is an order.

    Args:
        setting: ``auto``, or a path to force.
        problem: the fusion.
        platform: the machine.

    Raises:
        ValueError: the forced path cannot run; says why.
    """
    if setting != "auto":
        if reason := obstacle(setting, problem, platform):
            raise ValueError(f"fusion={setting} cannot run: {reason}")
        return Choice(setting, "forced by the setting")
    kernel_obstacle = obstacle("triton", problem, platform)
    if kernel_obstacle is None and not platform.is_interpreted:
        return Choice("triton", "the device runs the fused kernels")
    why_not = "Triton's interpreter is slow" if kernel_obstacle is None else kernel_obstacle
    if reason := obstacle("folded", problem, platform):
        return Choice("reference", reason)
    folded, published = (
        folded_multiply_adds(problem.width),
        multiply_adds(problem.width, problem.hidden_width),
    )
    if published < folded:
        return Choice("reference", f"{why_not}; {published} multiply-adds unfolded against {folded} folded")
    return Choice("folded", f"{why_not}; {folded} multiply-adds folded against {published} unfolded")


def obstacle(path: FusionPath, problem: FusionProblem, platform: Platform) -> str | None:
    """Why a path cannot run; None when it can."""
    if path == "reference":
        return None
    if not problem.has_experts:
        return "the cross_attention mixer has no experts to fold"
    if path == "folded":
        return None
    if path == "triton_fp8" and problem.dtype not in (torch.bfloat16, torch.float16):
        return f"norms in FP8 are for bfloat16 and float16, not {problem.dtype}"
    return _kernel_obstacle(problem, platform, MIN_FP8_CAPABILITY if path == "triton_fp8" else MIN_CAPABILITY)


def multiply_adds(width: int, hidden_width: int) -> int:
    """Multiply-adds of one expert on one token as published, ``2 C H``."""
    return 2 * width * hidden_width


def folded_multiply_adds(width: int) -> int:
    """Multiply-adds of one folded expert on one token, ``C^2 + C^2 / 2``, whatever its hidden width."""
    return width**2 + width**2 // 2


def _kernel_obstacle(
    problem: FusionProblem, platform: Platform, min_capability: tuple[int, int]
) -> str | None:
    if not platform.has_triton:
        return "triton is not installed"
    if not platform.is_interpreted:
        if platform.device_type != "cuda":
            return f"the device is {platform.device_type}, the Triton kernels need CUDA"
        if platform.capability is not None and platform.capability < min_capability:
            found, wanted = (".".join(map(str, pair)) for pair in (platform.capability, min_capability))
            return f"the GPU has compute capability {found}, the Triton kernels need {wanted}"
    if problem.dtype not in KERNEL_DTYPES:
        return f"the Triton kernels do not take {problem.dtype}"
    if not problem.has_plain_norm:
        return "the Triton kernels take LN_bb without affine part only"
    return shape_obstacle(problem.width, problem.num_layers)


def shape_obstacle(width: int, num_layers: int) -> str | None:
    """Why the Triton kernels cannot take a token width or a number of layers; None when they can."""
    if width % WIDTH_MULTIPLE or width > MAX_WIDTH:
        return (
            f"the Triton kernels take multiples of {WIDTH_MULTIPLE} up to {MAX_WIDTH} as width, not {width}"
        )
    if num_layers > MAX_LAYERS:
        return f"the Triton kernels take up to {MAX_LAYERS} layers, not {num_layers}"
    return None
