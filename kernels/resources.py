"""Compile the fused operator's kernels ahead of time and report the resources that they take, without a GPU.

``python -m kernels.resources`` prints registers, spills and shared memory for an A100 and an H100.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import device_code
from kernels.dispatch import shape_obstacle
from kernels.launches import (
    A100,
    H100,
    FusedProblem,
    Launch,
    is_interpreted,
    padded_basis_rows,
    plan_launches,
)

MATRICES = ("states_ptr", "router_ptr", "basis_ptr", "product_ptr", "out_ptr")
GPUS = {80: A100, 90: H100}
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # a block's largest shared memory, by compute capability
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """Resources of one program of a compiled kernel."""

    kernel: str
    capability: int
    num_warps: int
    registers: int
    """Per thread; a multiprocessor has 65,536."""
    spilled_bytes: int
    """Stack and local memory per thread; anything but 0 is slow."""
    shared_bytes: int
    matrix_instruction: str
    """``wgmma`` (Hopper's full rate), ``mma``, or empty where the kernel has no matrix product."""
    step_instructions: float | None
    """Instructions that a warp issues per step of depth BK in the tightest loop of a half-precision product.

    Beside the products: loads, addresses, barriers, and a share of all that the loop does less often.
    """


def compile_kernels(problem: FusedProblem, capability: int) -> list[Resources]:
    """Compile every kernel of the operator as the launcher would.

    Args:
        problem: sizes and options.
        capability: compute capability as one number: 80, 90.
    """
    assert not is_interpreted()
    plan = plan_launches(problem, GPUS[capability])
    return [_compile(name, launch, problem, capability) for name, launch in plan.items()]


def _compile(name: str, launch: Launch, problem: FusedProblem, capability: int) -> Resources:
    source = _source(getattr(device_code, name), launch.constants, problem)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        kernel=name,
        capability=capability,
        num_warps=launch.num_warps,
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        matrix_instruction=_matrix_instruction(compiled.asm["ptx"]),
        step_instructions=_step_instructions(compiled.asm["cubin"], launch),
    )


def _source(kernel: Any, constants: dict[str, Any], problem: FusedProblem) -> ASTSource:
    """The kernel with the argument types and alignments of a launch at the problem's sizes."""
    dtype = f"*{TRITON_NAMES[problem.dtype]}"
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            is_fp8 = name == "basis_ptr" and problem.fp8_norms
            signature[name] = "*fp8e4nv" if is_fp8 else dtype if name in MATRICES else "*fp32"
            attributes[(index,)] = ALIGNED
        elif name == "beta" or name.endswith("_eps"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in device_code.NOT_SPECIALIZED:
                attributes[(index,)] = ALIGNED
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a cubin's kernel, by the cuobjdump that comes with Triton."""
    text = _run_on(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _step_instructions(cubin: bytes, launch: Launch) -> float | None:
    """Per loop that multiplies: its instructions over the steps that it holds; the fewest of all loops."""
    per_step = []
    for loop in _loops(_run_on(cubin, knobs.nvidia.nvdisasm.path, "-c")):
        if multiply_adds := launch.num_warps * sum(map(_multiply_adds, loop)):
            tile = math.prod(launch.constants[name] for name in ("BM", "BN", "BK"))
            per_step.append(len(loop) * tile / multiply_adds)
    return min(per_step, default=None)


def _loops(sass: str) -> Iterator[list[str]]:
    """Instructions from each label to a branch back to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?) ?;", line):
            code.append(instruction[1])
            target = re.search(r"\bBRA.*(\.L_\w+)", instruction[1])
            if target and target[1] in labels:
                yield code[labels[target[1]] :]


def _multiply_adds(instruction: str) -> float:
    """Of one warp, in one matrix instruction of half-precision operands; 0 for any other."""
    if wgmma := re.search(r"\b[HQ]GMMA\.(\d+)x(\d+)x(\d+)\.F32(?:\.BF16|\.E4M3\.E4M3)? ", instruction):
        rows, columns, depth = map(int, wgmma.groups())
        return rows * columns * depth / 4  # four warps issue it together
    return 16 * 8 * 16 if re.search(r"\bHMMA\.16816\.", instruction) else 0


def _run_on(cubin: bytes, *command: str) -> str:
    """What a tool that comes with Triton prints of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stdout


def _matrix_instruction(ptx: str) -> str:
    if "wgmma.mma_async" in ptx:
        return "wgmma"
    return "mma" if "mma.sync" in ptx else ""


def main() -> int:
    """Command line; prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.resources",
        description="Registers, spills and shared memory of the fused operator, compiled without a GPU.",
    )
    parser.add_argument("--capability", type=int, nargs="+", choices=sorted(SHARED_BYTES), default=[80, 90])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64 * 256, help="tokens in a batch (default 16384)")
    parser.add_argument("--layers", type=int, default=12, help="fused layers L (default 12)")
    parser.add_argument("--width", type=int, default=768, help="token width C (default 768)")
    parser.add_argument("--hidden-width", type=int, default=1536, help="expert width H (default 1536)")
    parser.add_argument("--fp8-norms", action="store_true", help="take the experts' norms in FP8")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    if reason := shape_obstacle(arguments.width, arguments.layers):
        parser.error(reason)
    problem = FusedProblem(
        num_tokens=arguments.tokens,
        num_layers=arguments.layers,
        width=arguments.width,
        basis_rows=padded_basis_rows(min(arguments.hidden_width, arguments.width), arguments.width),
        dtype=getattr(torch, arguments.dtype),
        fp8_norms=arguments.fp8_norms,
    )
    rows = [row for capability in arguments.capability for row in compile_kernels(problem, capability)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))  # noqa: T201 - the command's own output
        return 0
    header = f"{'kernel':10} {'sm':>4} {'warps':>6} {'registers':>10} {'spilled B':>10}"
    print(f"{header} {'shared B':>10} {'product':>8} {'a step':>8}")  # noqa: T201
    for row in rows:
        print(  # noqa: T201
            f"{row.kernel:10} {row.capability:4} {row.num_warps:6} {row.registers:10} "
            f"{row.spilled_bytes:10} {row.shared_bytes:10} {row.matrix_instruction:>8} "
            f"{'' if row.step_instructions is None else round(row.step_instructions):>8}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
