"""Folding against the unfolded definition: exact in float64, and no less accurate in half precision."""

import random
import statistics
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import folded, reference
from kernels.operands import ExpertWeights
from model.config import PRESETS
from model.networks.folding import fold_experts

OPTIONS = {
    "num_layers": st.integers(1, 4),
    "width": st.integers(8, 96),
    "routing": st.sampled_from(["energy", "softmax"]),
    "router_input_norm": st.booleans(),
    "correction": st.sampled_from(["incremental", "replace"]),
    "beta": st.floats(0.01, 1),
    "has_shift": st.booleans(),
    "affine": st.sampled_from(["none", "weight", "weight and bias"]),
    "outlier": st.sampled_from([0, 1e3]),
    "mean": st.sampled_from([0, 100, -1e3]),
    "seed": st.integers(0, 2**16),
}


def fuse_folded(case):
    experts = fold_experts(case.weights, case.spec).to(case.device, case.dtype)
    return folded.fuse_layers(case.states, experts, case.spec)


def zeroed(parts):
    return [torch.zeros_like(part) for part in parts]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(options=st.fixed_dictionaries(OPTIONS), hidden_width=st.integers(1, 200), spread=st.floats(0, 3))
def test_is_exact(fusion_case, options, hidden_width, spread):
    case = fusion_case(**options, hidden_width=hidden_width, spread=spread, dtype=torch.float64)
    assert case.error(fuse_folded(case)) <= 1e-9


@settings(max_examples=100, deadline=None, derandomize=True)
@given(options=st.fixed_dictionaries(OPTIONS), hidden_width=st.integers(2, 200), spread=st.floats(0, 1))
def test_bfloat16_is_no_worse_than_unfolded(fusion_case, options, hidden_width, spread):
    case = fusion_case(
        **options, hidden_width=hidden_width, spread=spread, num_tokens=24, dtype=torch.bfloat16
    )
    limit = 1.1 * case.median_token_error(case.unfolded) + 1e-3
    assert case.median_token_error(fuse_folded(case)) <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_better_than_unfolded_on_the_whole(fusion_case, dtype):
    generator = random.Random(0)
    errors = []
    for seed in range(40):
        case = fusion_case(
            num_layers=generator.randint(1, 4),
            width=generator.randint(16, 192),
            hidden_width=generator.randint(16, 384),
            routing=generator.choice(["energy", "softmax"]),
            correction=generator.choice(["incremental", "replace"]),
            affine=generator.choice(["none", "weight", "weight and bias"]),
            has_shift=generator.random() < 0.5,
            spread=generator.choice([0, 0.5, 1]),
            outlier=generator.choice([0, 1e3]),
            dtype=dtype,
            seed=seed,
        )
        errors.append((case.error(fuse_folded(case)), case.error(case.unfolded)))
    found, unfolded = map(statistics.median, zip(*errors, strict=True))
    assert found < 0.8 * unfolded
    assert sum(one < other for one, other in errors) >= 36


@pytest.mark.parametrize("affine", ["none", "weight and bias"])
@pytest.mark.parametrize("seed", range(5))
def test_float16_holds_badly_scaled_experts(fusion_case, affine, seed):
    case = fusion_case(spread=3, affine=affine, dtype=torch.float16, seed=seed)
    assert not case.unfolded.tokens.isfinite().all()  # an expert's output is beyond 65504
    assert case.error(fuse_folded(case)) <= 2e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("has_shift", [True, False])
@pytest.mark.parametrize("affine", ["none", "weight and bias"])
def test_zero_variance_tokens(fusion_case, dtype, tolerance, has_shift, affine):
    case = fusion_case(has_shift=has_shift, affine=affine, dtype=dtype)
    for state in case.states:
        state[:, 3] = 3.0  # a mean without rounding errors
    assert case.error(fuse_folded(case)) <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 3.0, 3.3])
@pytest.mark.parametrize("has_shift", [True, False])
def test_zero_variance_tokens_stay_finite_in_half_precision(fusion_case, dtype, value, has_shift):
    case = fusion_case(has_shift=has_shift, dtype=dtype)
    for state in case.states:
        state[:, 3] = value
    tokens = fuse_folded(case).tokens
    assert tokens.isfinite().all()
    assert tokens.abs().max() < 10


@pytest.mark.parametrize("part", ["up", "gain", "down"])
@pytest.mark.parametrize("has_shift", [True, False])
@pytest.mark.parametrize("affine", ["none", "weight and bias"])
def test_all_zero_experts(fusion_case, part, has_shift, affine):
    case = fusion_case(has_shift=has_shift, affine=affine, dtype=torch.float64)
    parts = getattr(case.weights, part)
    weights = replace(case.weights, **{part: [*zeroed(parts[:1]), *parts[1:]]})
    found = folded.fuse_layers(
        case.states, fold_experts(weights, case.spec).to("cpu", torch.float64), case.spec
    )
    expected = reference.fuse_layers(case.states, weights, case.spec)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("part", ["up", "gain", "shift", "down"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_refused_by_layer(fusion_case, part, value):
    case = fusion_case(num_layers=3)
    getattr(case.weights, part)[1].view(-1)[5] = value
    with pytest.raises(ValueError, match="expert 1 cannot be folded: a weight is not finite"):
        fold_experts(case.weights, case.spec)


@pytest.mark.parametrize("hidden_width", [1, 24, 64, 65, 200])
@pytest.mark.parametrize(("affine", "most_rows"), [("none", 64), ("weight", 64), ("weight and bias", 65)])
def test_shapes_depend_on_the_token_width_alone(fusion_case, hidden_width, affine, most_rows):
    case = fusion_case(hidden_width=hidden_width, affine=affine)
    experts = fold_experts(case.weights, case.spec)
    rows = min(hidden_width, most_rows)
    assert experts.hidden.shape == (2, rows, 64)
    assert experts.factor.shape == (2, 64, rows)
    assert experts.product.shape == (2, 64, 64)
    assert torch.equal(experts.hidden, experts.hidden.triu())
    torch.testing.assert_close(experts.product, experts.factor @ experts.hidden)


def test_operands_keep_vectors_and_the_router_in_full_precision(fusion_case):
    case = fusion_case(affine="weight and bias", dtype=torch.bfloat16)
    experts = fold_experts(case.weights, case.spec)
    stored = experts.to("cpu", torch.bfloat16)
    for name, tensor in vars(stored).items():
        is_matrix = name in ("hidden", "factor", "product")
        assert tensor.dtype == (torch.bfloat16 if is_matrix else torch.float32), name
        assert getattr(experts, name).dtype == torch.float64, name


def test_without_any_shift_none_is_stored(fusion_case):
    case = fusion_case(has_shift=False)
    assert fold_experts(case.weights, case.spec).shift is None


@pytest.mark.slow
def test_the_widest_preset_folds_in_seconds(fusion_case):
    config = PRESETS["dinov2-b-h3072"]
    num_layers, width = config.fusion.num_layers, config.encoder.width
    weights = fusion_case(num_layers=1, width=width, hidden_width=config.fusion.hidden_width).weights
    repeated = ExpertWeights(
        **{part: num_layers * getattr(weights, part) for part in ("up", "gain", "shift", "down")},
        router_weight=torch.zeros(num_layers, num_layers * width),
        router_bias=torch.zeros(num_layers),
    )
    start = time.process_time()
    fold_experts(repeated, fusion_case().spec)
    assert time.process_time() - start < 30
