"""The launch plans: every layer, column and row is somebody's work, whatever the sizes."""

import itertools

import pytest
import torch

from kernels.dispatch import KERNEL_DTYPES, MAX_LAYERS, MAX_WIDTH, WIDTH_MULTIPLE
from kernels.launches import (
    A100,
    FINISH_ROWS,
    H100,
    MAX_COLUMNS,
    FusedProblem,
    Gpu,
    best_split,
    column_block,
    logit_columns,
    padded_basis_rows,
    plan_launches,
    product_tile,
    split_basis,
    split_layers,
)

WIDTHS = range(WIDTH_MULTIPLE, MAX_WIDTH + 1, WIDTH_MULTIPLE)
TOKENS = (1, 256, 257, 16_384, 65_536)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("capability", [8, 9, 10])
def test_tiles_divide_every_width(dtype, capability):
    for width, tokens in itertools.product(WIDTHS, TOKENS):
        tile = product_tile(dtype, width, tokens, capability)
        assert width % tile.columns == 0
        assert width % tile.depth == 0
        # The basis is padded once, for whichever tile will read it.
        assert column_block(width, MAX_COLUMNS) % tile.columns == 0


def images(batch: int, **sizes: int) -> FusedProblem:
    """A batch of 256 tokens per image at DINOv2-B's sizes."""
    return FusedProblem(
        **{"num_tokens": 256 * batch, "num_layers": 12, "width": 768, "basis_rows": 768} | sizes,
        dtype=torch.bfloat16,
    )


def fill(programs: int, num_parts: int, num_splits: int, gpu: Gpu) -> float:
    """Part of the device's time that is work, where every program of a wave takes as long as the longest."""
    waves = -(-programs * num_splits // gpu.num_multiprocessors)
    return programs * num_parts / (waves * -(-num_parts // num_splits) * gpu.num_multiprocessors)


def programs_of(problem: FusedProblem, gpu: Gpu) -> tuple[int, int, int]:
    """Programs before any split: of ``measure``, and of ``combine``; and column tiles of the basis."""
    tile = product_tile(problem.dtype, problem.width, problem.num_tokens, gpu.capability)
    blocks = -(-problem.num_tokens // tile.rows)
    return blocks * 12, blocks * (problem.width // tile.columns), problem.basis_rows // tile.columns


def split(problem: FusedProblem, gpu: Gpu = H100) -> tuple[int, int]:
    """Splits of ``measure`` and of ``combine``."""
    tile = product_tile(problem.dtype, problem.width, problem.num_tokens, gpu.capability)
    return split_basis(tile, problem, gpu).num_splits, split_layers(tile, problem, gpu).num_splits


@pytest.mark.parametrize("num_layers", range(1, MAX_LAYERS + 1))
def test_splits_hold_every_layer_and_row_once_and_none_is_empty(num_layers):
    for width, tokens in itertools.product((64, 320, 768, 2048), TOKENS):
        rows = padded_basis_rows(width, width)
        problem = images(1, num_tokens=tokens, num_layers=num_layers, width=width, basis_rows=rows)
        plan = plan_launches(problem, H100)
        splits, per_split = plan["combine"].grid[1], plan["combine"].constants["LAYERS_PER_SPLIT"]
        assert (splits - 1) * per_split < num_layers <= splits * per_split
        measure = plan["measure"].constants
        assert measure["SPLITS"] * measure["COLUMNS_PER_SPLIT"] == rows
        assert measure["COLUMNS_PER_SPLIT"] % measure["BN"] == 0


@pytest.mark.parametrize("gpu", [H100, A100])
def test_a_split_never_fills_the_device_less(gpu):
    """Against splitting the layers until there are 128 programs, and against a basis in one piece."""
    for batch in range(1, 300):
        problem = images(batch)
        measure, combine, tiles = programs_of(problem, gpu)
        basis_splits, layer_splits = split(problem, gpu)
        wanted = min(max(128 // combine, 1), 12)
        simple = -(-12 // -(-12 // wanted))
        assert fill(combine, 12, layer_splits, gpu) >= fill(combine, 12, simple, gpu) - 1e-9
        assert fill(measure, tiles, basis_splits, gpu) >= fill(measure, tiles, 1, gpu) - 1e-9


@pytest.mark.parametrize(
    ("batch", "splits", "before", "after"),
    [(4, 4, 0.73, 0.97), (12, 3, 0.55, 0.82), (16, 4, 0.73, 0.97), (24, 3, 0.55, 0.82), (32, 2, 0.73, 0.97)],
)
def test_middle_batches_fill_an_h100(batch, splits, before, after):
    problem = images(batch)
    _, combine, _ = programs_of(problem, H100)
    assert split(problem)[1] == splits
    assert fill(combine, 12, 1, H100) == pytest.approx(before, abs=0.01)
    assert fill(combine, 12, splits, H100) == pytest.approx(after, abs=0.01)


def test_norms_of_one_image_are_spread():
    measure, _, tiles = programs_of(images(1), H100)
    assert fill(measure, tiles, 1, H100) == pytest.approx(0.36, abs=0.01)
    assert fill(measure, tiles, split(images(1))[0], H100) == pytest.approx(0.73, abs=0.01)


@pytest.mark.parametrize("batch", [64, 128, 256, 1024])
def test_large_batches_are_left_whole(batch):
    assert split(images(batch)) == (1, 1)


def test_a_split_is_worth_its_cost():
    gpu = Gpu(9, 100)
    assert best_split(25, 12, gpu) == (4, 3)
    assert best_split(25, 12, gpu, per_split=1) == (3, 6)
    assert best_split(25, 12, gpu, per_split=5) == (2, 11)
    assert best_split(25, 12, gpu, per_split=50) == (1, 12)
    assert best_split(75, 4, gpu) == (4, 3)
    assert best_split(75, 4, gpu, repeated=1) == (1, 5)
    assert best_split(1, 5, gpu) == (5, 1)
    assert best_split(30, 5, gpu) == (3, 2)
    assert best_split(30, 5, gpu, evenly=True) == (5, 2)


@pytest.mark.parametrize("num_tokens", [1, 63, 129, 16_384])
def test_grids_hold_every_token(num_tokens):
    plan = plan_launches(images(1, num_tokens=num_tokens), H100)
    assert list(plan) == ["measure", "route", "combine", "finish"]
    rows, columns = (plan["combine"].constants[name] for name in ("BM", "BN"))
    blocks = -(-num_tokens // rows)
    assert plan["measure"].grid == (blocks, 12, plan["route"].constants["SPLITS"])
    assert plan["combine"].grid == (blocks * 768 // columns, plan["finish"].constants["SPLITS"])
    assert plan["route"].grid == (-(-num_tokens // plan["route"].constants["BM"]),)
    assert plan["finish"].grid == (-(-num_tokens // FINISH_ROWS),)


@pytest.mark.parametrize(("num_layers", "columns"), [(1, 16), (12, 16), (16, 16), (17, 32), (64, 64)])
def test_logits_are_padded_to_what_a_product_takes(num_layers, columns):
    assert logit_columns(num_layers) == columns
