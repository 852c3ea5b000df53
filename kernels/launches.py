"""How the fused operator's kernels are launched: tiles, splits and compile-time constants.

Pure functions of the problem's sizes, shared by the launcher and by the ahead-of-time check
(`kernels.resources`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from kernels import device_code

ROUTE_ROWS = 64
FINISH_ROWS = 4
MAX_COLUMNS = 256  # widest tile of a product
HOPPER = 9  # major compute capability; its tiles need up to 147 of its 227 KiB of shared memory a program
TARGET_PROGRAMS = 128  # about the multiprocessors of an A100 (108) and an H100 (132)


class Tile(NamedTuple):
    """Shape of one program's work and its pipeline."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` at import): slowly, anywhere."""
    return not isinstance(device_code.measure, triton.JITFunction)


def column_block(width: int, limit: int) -> int:
    """Widest tile of at most ``limit`` columns that divides the width: no tile then has idle columns."""
    block = limit
    while width % block:
        block //= 2
    return block


def padded_basis_rows(num_rows: int, width: int) -> int:
    """Rows of a basis padded to whole tiles, for whichever tile will read it."""
    block = column_block(width, MAX_COLUMNS)
    return int(triton.cdiv(num_rows, block)) * block


def product_tile(dtype: torch.dtype, width: int, num_tokens: int, capability: int) -> Tile:
    """Tile of the two products, ``measure`` and ``combine``.

    128 x 256 with 8 warps is the largest accumulator that leaves registers for the left operand
    (241 and 228 of 255 on sm_90, none spilled); other GPUs get half of it, which fits 99 KiB. Few tokens
    take small tiles, to spread over the multiprocessors.

    Args:
        dtype: of hidden states and matrices.
        width: C.
        num_tokens: T.
        capability: major compute capability.
    """
    if dtype == torch.float32:
        rows = 64 if capability == HOPPER else 32
        return Tile(rows, column_block(width, 64), 32, num_warps=4, num_stages=3)
    is_small = num_tokens * width <= 64 * 128 * TARGET_PROGRAMS
    if capability == HOPPER:
        if is_small:
            return Tile(64, column_block(width, 128), 64, num_warps=4, num_stages=4)
        return Tile(128, column_block(width, MAX_COLUMNS), 64, num_warps=8, num_stages=3)
    if is_small:
        return Tile(64, column_block(width, 128), 32, num_warps=4, num_stages=4)
    return Tile(128, column_block(width, 128), 32, num_warps=8, num_stages=4)


def num_splits(tile: Tile, width: int, num_tokens: int, num_layers: int) -> int:
    """Into how many sums of layers ``combine`` is split, so that few tokens still fill the device."""
    programs = triton.cdiv(num_tokens, tile.rows) * (width // tile.columns)
    wanted = min(max(TARGET_PROGRAMS // programs, 1), num_layers)
    layers_per_split = triton.cdiv(num_layers, wanted)
    return int(triton.cdiv(num_layers, layers_per_split))


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched."""

    grid: tuple[int, ...]
    constants: dict[str, Any]
    """Compile-time arguments."""
    num_warps: int = 4
    num_stages: int = 3

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class FusedProblem:
    """Sizes and options that decide how the kernels are compiled and launched."""

    num_tokens: int
    num_layers: int
    width: int
    basis_rows: int
    dtype: torch.dtype
    has_shift: bool = True
    router_input_norm: bool = True
    routing: str = "energy"
    correction: str = "incremental"


def plan_launches(problem: FusedProblem, capability: int) -> dict[str, Launch]:
    """Grid, constants and pipeline of every kernel, by name, in launching order.

    Args:
        problem: the fusion.
        capability: major compute capability.
    """
    tokens, layers, width = problem.num_tokens, problem.num_layers, problem.width
    tile = product_tile(problem.dtype, width, tokens, capability)
    splits = num_splits(tile, width, tokens, layers)
    precision = {"PRECISION": _dot_precision(problem.dtype)}
    shapes = {"C": width, "HAS_SHIFT": problem.has_shift, **precision}
    product = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, **shapes}
    columns = logit_columns(layers)
    blocks = triton.cdiv(tokens, tile.rows)
    return {
        "measure": Launch(
            (blocks, layers),
            {"R": problem.basis_rows, "P": columns, "ROUTER_NORM": problem.router_input_norm, **product},
            tile.num_warps,
            tile.num_stages,
        ),
        "route": Launch(
            (triton.cdiv(tokens, ROUTE_ROWS),),
            {
                "L": layers,
                "P": columns,
                "SOFTMAX": problem.routing == "softmax",
                "HAS_SHIFT": problem.has_shift,
                "BM": ROUTE_ROWS,
            },
        ),
        "combine": Launch(
            (blocks * (width // tile.columns), splits),
            {"L": layers, "LAYERS_PER_SPLIT": triton.cdiv(layers, splits), **product},
            tile.num_warps,
            tile.num_stages,
        ),
        "finish": Launch(
            (triton.cdiv(tokens, FINISH_ROWS),),
            {
                "SPLITS": splits,
                "C": width,
                "REPLACE": problem.correction == "replace",
                "BM": FINISH_ROWS,
                "BLOCK_C": triton.next_power_of_2(width),
                **precision,
            },
        ),
    }


def logit_columns(num_layers: int) -> int:
    """P: the layers padded to a power of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(num_layers)))


def _dot_precision(dtype: torch.dtype) -> str:
    if is_interpreted():
        return "interpreted"
    # Three TF32 products give float32 products nearly full precision at a multiple of its rate.
    return "tf32x3" if dtype == torch.float32 else "ieee"
