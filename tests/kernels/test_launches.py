"""The launch plans: every layer, column and row is somebody's work, whatever the sizes."""

import itertools

import pytest
import torch

from kernels.dispatch import KERNEL_DTYPES, MAX_LAYERS, MAX_WIDTH, WIDTH_MULTIPLE
from kernels.launches import (
    FINISH_ROWS,
    MAX_COLUMNS,
    ROUTE_ROWS,
    FusedProblem,
    column_block,
    logit_columns,
    num_splits,
    plan_launches,
    product_tile,
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


@pytest.mark.parametrize("num_layers", range(1, MAX_LAYERS + 1))
def test_splits_hold_every_layer_once_and_none_is_empty(num_layers):
    for width, tokens in itertools.product((64, 320, 768, 2048), TOKENS):
        tile = product_tile(torch.bfloat16, width, tokens, 9)
        splits = num_splits(tile, width, tokens, num_layers)
        layers_per_split = -(-num_layers // splits)
        assert (splits - 1) * layers_per_split < num_layers <= splits * layers_per_split


@pytest.mark.parametrize("num_tokens", [1, 63, 129, 16_384])
def test_grids_hold_every_token(num_tokens):
    problem = FusedProblem(num_tokens, num_layers=12, width=768, basis_rows=768, dtype=torch.bfloat16)
    plan = plan_launches(problem, capability=9)
    assert list(plan) == ["measure", "route", "combine", "finish"]
    rows, columns = (plan["combine"].constants[name] for name in ("BM", "BN"))
    blocks = -(-num_tokens // rows)
    assert plan["measure"].grid == (blocks, 12)
    assert plan["combine"].grid == (blocks * 768 // columns, plan["finish"].constants["SPLITS"])
    assert plan["route"].grid == (-(-num_tokens // ROUTE_ROWS),)
    assert plan["finish"].grid == (-(-num_tokens // FINISH_ROWS),)


@pytest.mark.parametrize(("num_layers", "columns"), [(1, 16), (12, 16), (16, 16), (17, 32), (64, 64)])
def test_logits_are_padded_to_what_a_product_takes(num_layers, columns):
    assert logit_columns(num_layers) == columns
