"""How the fused operator's kernels are launched: tiles, splits and compile-time constants.

Pure functions of the problem's sizes, shared by the launcher and by the ahead-of-time check
(`kernels.resources`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from kernels import device_code

ROUTE_ELEMENTS = 1024  # of a program's block, rows x logit columns
FINISH_ROWS = 4
MAX_COLUMNS = 256  # widest tile of a product
HOPPER = 9  # major compute capability; its tiles need up to 147 of its 227 KiB of shared memory a program
SMALL_TILES = 128  # work for fewer than so many small tiles takes small tiles
FIRST_TILE = 0.25  # of a tile: statistics and logits, which every split of the basis computes
OPERATIONS_PER_BYTE = 200  # of a product and of device memory: 600 TFLOP/s and 2.8 TB/s on an H100


class Gpu(NamedTuple):
    """Facts about a device that the plan depends on."""

    capability: int
    """Major compute capability."""
    num_multiprocessors: int


H100 = Gpu(HOPPER, 132)
A100 = Gpu(8, 108)


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
    is_small = num_tokens * width <= 64 * 128 * SMALL_TILES
    if capability == HOPPER:
        if is_small:
            return Tile(64, column_block(width, 128), 64, num_warps=4, num_stages=4)
        return Tile(128, column_block(width, MAX_COLUMNS), 64, num_warps=8, num_stages=3)
    if is_small:
        return Tile(64, column_block(width, 128), 32, num_warps=4, num_stages=4)
    return Tile(128, column_block(width, 128), 32, num_warps=8, num_stages=4)


class Split(NamedTuple):
    """One program's work spread over several, and the time that takes in parts of that work."""

    num_splits: int
    duration: float


def best_split(
    programs: int,
    num_parts: int,
    gpu: Gpu,
    repeated: float = 0,
    per_split: float = 0,
    evenly: bool = False,
) -> Split:
    """Over how many programs the parts of one program's work are spread, for the shortest time.

    The busiest multiprocessor decides: it runs ``ceil(programs * splits / multiprocessors)`` programs of
    ``ceil(parts / splits)`` parts each. No split is empty.

    Args:
        programs: before the split.
        num_parts: of each program, alike in size.
        gpu: the device.
        repeated: work that every program of a split does again, in parts.
        per_split: time that each further split costs the device, in parts.
        evenly: whether all splits must have the same number of parts.
    """

    def split(parts: int) -> Split:
        splits = -(-num_parts // parts)
        waves = -(-programs * splits // gpu.num_multiprocessors)
        return Split(splits, waves * (parts + repeated) + per_split * (splits - 1))

    sizes = (parts for parts in range(1, num_parts + 1) if not (evenly and num_parts % parts))
    return min(map(split, sizes), key=lambda found: found[::-1])


def split_basis(tile: Tile, problem: "FusedProblem", gpu: Gpu) -> Split:
    """How ``measure`` spreads the basis' column tiles of one token tile and layer over programs."""
    programs = -(-problem.num_tokens // tile.rows) * problem.num_layers
    return best_split(programs, problem.basis_rows // tile.columns, gpu, repeated=FIRST_TILE, evenly=True)


def split_layers(tile: Tile, problem: "FusedProblem", gpu: Gpu) -> Split:
    """Into how many sums of layers ``combine`` splits one output tile.

    Each further sum is written in float32, and read by ``finish``.
    """
    programs = -(-problem.num_tokens // tile.rows) * (problem.width // tile.columns)
    layer_operations = 2 * tile.rows * tile.columns * problem.width
    moved_bytes = 2 * problem.num_tokens * problem.width * torch.float32.itemsize
    per_split = moved_bytes * OPERATIONS_PER_BYTE / gpu.num_multiprocessors / layer_operations
    return best_split(programs, problem.num_layers, gpu, per_split=per_split)


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
    fp8_norms: bool = False


def plan_launches(problem: FusedProblem, gpu: Gpu) -> dict[str, Launch]:
    """Grid, constants and pipeline of every kernel, by name, in launching order.

    Args:
        problem: the fusion.
        gpu: the device.
    """
    tokens, layers, width = problem.num_tokens, problem.num_layers, problem.width
    tile = product_tile(problem.dtype, width, tokens, gpu.capability)
    basis_splits = split_basis(tile, problem, gpu).num_splits
    splits = split_layers(tile, problem, gpu).num_splits
    precision = {"PRECISION": _dot_precision(problem.dtype)}
    shapes = {"C": width, "HAS_SHIFT": problem.has_shift, **precision}
    product = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, **shapes}
    columns = logit_columns(layers)
    blocks = triton.cdiv(tokens, tile.rows)
    return {
        "measure": Launch(
            (blocks, layers, basis_splits),
            {
                "L": layers,
                "R": problem.basis_rows,
                "P": columns,
                "TERMS": router_terms(problem.dtype, layers),
                "SPLITS": basis_splits,
                "COLUMNS_PER_SPLIT": problem.basis_rows // basis_splits,
                "ROUTER_NORM": problem.router_input_norm,
                "FP8": problem.fp8_norms,
                **product,
            },
            tile.num_warps,
            tile.num_stages,
        ),
        "route": Launch(
            (triton.cdiv(tokens, ROUTE_ELEMENTS // columns),),
            {
                "L": layers,
                "P": columns,
                "C": width,
                "SPLITS": basis_splits,
                "SOFTMAX": problem.routing == "softmax",
                "HAS_SHIFT": problem.has_shift,
                "BM": ROUTE_ELEMENTS // columns,
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
                "L": layers,
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


def router_terms(dtype: torch.dtype, num_layers: int) -> int:
    """Terms that the router is a sum of: one of half precision loses digits where large logits cancel.

    Two terms of more than 32 layers are more columns than the registers hold.
    """
    return 1 if dtype == torch.float32 or num_layers > 32 else 2


def _dot_precision(dtype: torch.dtype) -> str:
    if is_interpreted():
        return "interpreted"
    # Three TF32 products give float32 products nearly full precision at a multiple of its rate.
    return "tf32x3" if dtype == torch.float32 else "ieee"
