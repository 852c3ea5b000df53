"""Which implementation runs, over made-up platforms."""

from dataclasses import replace

import pytest
import torch

from kernels.dispatch import FusionProblem, Platform, choose_path, detect_platform

WIDE = FusionProblem(num_layers=12, width=768, hidden_width=1536, dtype=torch.bfloat16)
CPU = Platform("cpu")
H100 = Platform("cuda", capability=(9, 0))
A100 = Platform("cuda", capability=(8, 0))
T4 = Platform("cuda", capability=(7, 5))


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """Choosing looks at nothing but its arguments."""

    def refuse(*args, **kwargs):
        raise AssertionError("asked the device")

    for name in ("is_available", "get_device_capability", "current_device", "device_count"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


AUTO = {
    "cpu": (WIDE, CPU, "folded", "the device is cpu"),
    "cpu, the hidden width at which folding pays": (
        replace(WIDE, hidden_width=576),
        CPU,
        "folded",
        "884736 multiply-adds folded against 884736 unfolded",
    ),
    "cpu, one below": (
        replace(WIDE, hidden_width=575),
        CPU,
        "reference",
        "883200 multiply-adds unfolded against 884736 folded",
    ),
    "cpu, float64": (replace(WIDE, dtype=torch.float64), CPU, "folded", "the device is cpu"),
    "mps": (WIDE, Platform("mps"), "folded", "the device is mps"),
    "sm_90": (WIDE, H100, "triton", "the device runs"),
    "sm_80": (WIDE, A100, "triton", "the device runs"),
    "sm_100": (WIDE, Platform("cuda", (10, 0)), "triton", "the device runs"),
    "sm_90, narrow experts": (replace(WIDE, hidden_width=128), H100, "triton", "the device runs"),
    "sm_75": (WIDE, T4, "folded", "compute capability 7.5, the Triton kernels need 8.0"),
    "sm_75, narrow experts": (replace(WIDE, hidden_width=128), T4, "reference", "compute capability 7.5"),
    "no triton": (WIDE, replace(H100, has_triton=False), "folded", "triton is not installed"),
    "odd width": (replace(WIDE, width=100), H100, "folded", "multiples of 64 up to 2048 as width, not 100"),
    "too wide": (replace(WIDE, width=4096, hidden_width=8192), H100, "folded", "not 4096"),
    "many layers": (replace(WIDE, num_layers=65), H100, "folded", "up to 64 layers, not 65"),
    "float64": (replace(WIDE, dtype=torch.float64), H100, "folded", "do not take torch.float64"),
    "affine norm": (replace(WIDE, has_plain_norm=False), H100, "folded", "without affine part"),
    "cross attention": (replace(WIDE, has_experts=False), H100, "reference", "no experts to fold"),
    "cross attention on cpu": (replace(WIDE, has_experts=False), CPU, "reference", "no experts to fold"),
    "interpreter on cpu": (WIDE, replace(CPU, is_interpreted=True), "folded", "interpreter is slow"),
    "interpreter on cuda": (WIDE, replace(H100, is_interpreted=True), "folded", "interpreter is slow"),
}


@pytest.mark.parametrize(("problem", "platform", "path", "reason"), AUTO.values(), ids=AUTO)
def test_auto(problem, platform, path, reason):
    choice = choose_path("auto", problem, platform)
    assert choice.path == path
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("setting", "problem", "platform"),
    [
        ("reference", WIDE, H100),
        ("reference", replace(WIDE, has_experts=False), CPU),
        ("folded", WIDE, H100),
        ("folded", replace(WIDE, hidden_width=8, has_plain_norm=False, dtype=torch.float64), CPU),
        ("triton", WIDE, H100),
        ("triton", replace(WIDE, hidden_width=8, dtype=torch.float32), A100),
        ("triton", WIDE, replace(CPU, is_interpreted=True)),
        ("triton_fp8", WIDE, H100),
        ("triton_fp8", replace(WIDE, dtype=torch.float16), Platform("cuda", (8, 9))),
    ],
)
def test_an_order_is_followed(setting, problem, platform):
    choice = choose_path(setting, problem, platform)
    assert choice.path == setting
    assert "forced" in choice.reason


@pytest.mark.parametrize(
    ("setting", "problem", "platform", "reason"),
    [
        ("folded", replace(WIDE, has_experts=False), CPU, "cross_attention"),
        ("triton", replace(WIDE, has_experts=False), H100, "cross_attention"),
        ("triton", WIDE, CPU, "the device is cpu, the Triton kernels need CUDA"),
        ("triton", WIDE, T4, "compute capability 7.5"),
        ("triton", WIDE, replace(H100, has_triton=False), "triton is not installed"),
        ("triton", replace(WIDE, width=96), H100, "not 96"),
        ("triton", replace(WIDE, width=2112), H100, "not 2112"),
        ("triton", replace(WIDE, num_layers=65), H100, "not 65"),
        ("triton", replace(WIDE, dtype=torch.float64), H100, "torch.float64"),
        ("triton", replace(WIDE, has_plain_norm=False), H100, "affine"),
        ("triton", replace(WIDE, width=96), replace(CPU, is_interpreted=True), "not 96"),
        ("triton_fp8", WIDE, A100, "compute capability 8.0, the Triton kernels need 8.9"),
        ("triton_fp8", replace(WIDE, dtype=torch.float32), H100, "for bfloat16 and float16"),
        ("triton_fp8", replace(WIDE, width=96), H100, "not 96"),
    ],
)
def test_an_order_that_cannot_be_followed_says_why(setting, problem, platform, reason):
    with pytest.raises(ValueError, match=f"fusion={setting} cannot run: .*{reason}"):
        choose_path(setting, problem, platform)


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True), ("true", True)])
def test_platform_of_the_cpu(monkeypatch, value, expected):
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    platform = detect_platform(torch.device("cpu"))
    assert platform == Platform("cpu", None, platform.has_triton, expected)


@pytest.mark.gpu
def test_platform_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    platform = detect_platform(torch.device("cuda"))
    assert platform.device_type == "cuda"
    assert platform.capability == torch.cuda.get_device_capability()
