"""The fusion against its equations, its parameter formula, and the ablation variants.

Shape legend: B batch, N tokens, C width, L fused layers.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import token_norm
from model.config import EncoderConfig, FusionConfig, fusion_num_parameters
from model.networks.fusion import Fusion

TINY_ENCODER = EncoderConfig(width=32, depth=4, num_heads=2, image_size=56, position_grid=5)
KERNEL_ENCODER = TINY_ENCODER.model_copy(update={"width": 64})  # the narrowest that the kernels take
EPS = TINY_ENCODER.layer_norm_eps
NEEDS_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU are interpreted")
PAPER_COUNTS = {128: 2_472_972, 1536: 28_459_020, 3072: 56_807_436, 6144: 113_504_268}


def build(randomize, seed: int = 0, encoder: EncoderConfig = TINY_ENCODER, **fields) -> Fusion:
    config = FusionConfig(**{"num_layers": 4, "hidden_width": 24, "num_heads": 2} | fields)
    fusion = Fusion(config, encoder)
    randomize(fusion, seed)
    return fusion.eval()


def prepare(randomize, path: str, dtype: torch.dtype = torch.float32, **fields) -> Fusion:
    fusion = build(randomize, encoder=KERNEL_ENCODER, **fields).freeze()
    fusion.prepare(path, torch.device("cpu"), dtype)
    return fusion.to(dtype)


def states(
    depth: int = 4, num_tokens: int = 6, dtype: torch.dtype = torch.float32, width: int = 32
) -> list[Tensor]:
    """Hidden states whose mean and scale differ from layer to layer, as a ViT's do."""
    generator = torch.Generator().manual_seed(7)
    draws = torch.randn(depth, 2, num_tokens, width, generator=generator)
    return [(layer + (1 + layer) * tokens).to(dtype) for layer, tokens in enumerate(draws)]


def define_fusion(fusion: Fusion, hidden_states: list[Tensor]) -> Tensor:
    """z_final, equation by equation in float64, from nothing but tensors and arithmetic."""
    config, weights = fusion.config, {name: p.double() for name, p in fusion.named_parameters()}

    def norm(x: Tensor, eps: float) -> Tensor:
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        return (x - mean) / (variance + eps) ** 0.5

    fused_states = [tokens.double() for tokens in hidden_states[len(hidden_states) - config.num_layers :]]
    x = [norm(tokens, EPS) for tokens in fused_states]
    h = []
    for k, x_k in enumerate(x):
        part = f"mixer.experts.{k}."
        u = torch.einsum("hc,bnc->bnh", weights[part + "up.weight"], x_k)
        v = norm(u, config.hidden_norm_eps) * weights[part + "norm.weight"] + weights[part + "norm.bias"]
        h.append(norm(torch.einsum("ch,bnh->bnc", weights[part + "down.weight"], v), EPS))
    seen = torch.cat(x if config.router_input_norm else fused_states, dim=-1)
    w = torch.einsum("lc,bnc->bnl", weights["mixer.router.weight"], seen) + weights["mixer.router.bias"]
    if config.routing == "softmax":
        w = w.exp() / w.exp().sum(-1, keepdim=True)
    total = sum(w[..., k : k + 1] * h_k for k, h_k in enumerate(h))
    if config.routing == "energy":
        total = total / ((w**2).sum(-1, keepdim=True) + config.energy_eps) ** 0.5
    z_fuse, z_base = norm(total, EPS), x[-1]
    if config.correction == "replace":
        return z_fuse
    return norm(z_base + config.beta * (z_fuse - z_base), EPS)


@pytest.mark.parametrize(("hidden_width", "expected"), PAPER_COUNTS.items())
def test_parameter_formula_holds_for_the_real_module(hidden_width, expected):
    with torch.device("meta"):
        fusion = Fusion(FusionConfig(hidden_width=hidden_width), EncoderConfig())
    counted = sum(parameter.numel() for parameter in fusion.parameters())
    assert counted == fusion_num_parameters(12, 768, hidden_width) == expected


@pytest.mark.parametrize("routing", ["energy", "softmax"])
@pytest.mark.parametrize("correction", ["incremental", "replace"])
@pytest.mark.parametrize("router_input_norm", [True, False])
@pytest.mark.parametrize("num_layers", [4, 2, 1])
@torch.no_grad()
def test_equals_the_definition(routing, correction, router_input_norm, num_layers, randomize):
    fields = {"routing": routing, "correction": correction, "router_input_norm": router_input_norm}
    fusion = build(randomize, num_layers=num_layers, **fields)
    expected = define_fusion(fusion, states())
    torch.testing.assert_close(fusion(states()).double(), expected, atol=2e-5, rtol=0)
    exact = fusion.double()(states(dtype=torch.float64))
    torch.testing.assert_close(exact, expected, atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    beta=st.floats(0, 1),
    hidden_width=st.integers(8, 70),
    num_tokens=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@torch.no_grad()
def test_equals_the_definition_at_odd_sizes(randomize, beta, hidden_width, num_tokens, seed):
    fusion = build(randomize, seed, beta=beta, hidden_width=hidden_width).double()
    hidden_states = states(num_tokens=num_tokens, dtype=torch.float64)
    expected = define_fusion(fusion, hidden_states)
    # With beta = 0 the outer norm is not applied again, which its eps shows: 1/sqrt(1 + 1e-6).
    torch.testing.assert_close(fusion(hidden_states), expected, atol=2e-5 if beta == 0 else 1e-10, rtol=0)


@torch.no_grad()
def test_zero_beta_is_the_base_latent_bit_for_bit(randomize):
    fusion = build(randomize, beta=0.0)
    assert torch.equal(fusion(states()), token_norm(states()[-1], EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["energy", "softmax"])
def test_all_zero_router_gives_no_nan_forward_or_backward(dtype, routing, randomize):
    fusion = build(randomize, routing=routing)
    torch.nn.init.zeros_(fusion.mixer.router.weight)
    torch.nn.init.zeros_(fusion.mixer.router.bias)
    fusion = fusion.to(dtype).train()
    hidden_states = [tokens.requires_grad_() for tokens in states(dtype=dtype)]
    result = fusion(hidden_states)
    assert result.isfinite().all()
    result.float().square().sum().backward()
    gradients = [tensor.grad for tensor in (*hidden_states, *fusion.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_constant_tokens_give_no_nan(randomize):
    fusion = build(randomize)
    hidden_states = [torch.full((1, 2, 32), 3.0, requires_grad=True) for _ in range(4)]
    result = fusion(hidden_states)
    result.sum().backward()
    assert result.isfinite().all()
    assert all(tokens.grad.isfinite().all() for tokens in hidden_states)


VARIANTS = {
    "default": {},
    "softmax": {"routing": "softmax"},
    "replace": {"correction": "replace"},
    "cross_attention": {"mixer": "cross_attention"},
    "raw router input": {"router_input_norm": False},
    "deepest two": {"num_layers": 2},
    "larger beta": {"beta": 0.5},
}


def test_every_variant_is_a_configuration_that_runs_trains_and_differs(randomize):
    outputs = {}
    for name, fields in VARIANTS.items():
        fusion = build(randomize, **fields).train()
        result = fusion(states())
        assert result.shape == (2, 6, 32)
        torch.testing.assert_close(result.mean(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
        torch.testing.assert_close(result.square().mean(-1), torch.ones(2, 6), atol=1e-3, rtol=0)
        result.pow(3).sum().backward()
        unused = [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
        assert unused == [], name
        outputs[name] = result.detach()
    for (name, one), (other_name, other) in itertools.combinations(outputs.items(), 2):
        assert not torch.allclose(one, other, atol=1e-3), f"{name} equals {other_name}"


@torch.no_grad()
def test_cross_attention_equals_its_definition(randomize):
    fusion = build(randomize, mixer="cross_attention", correction="replace").double()
    hidden_states = states(dtype=torch.float64)
    mixer = fusion.mixer
    x = torch.stack([token_norm(tokens, EPS) for tokens in hidden_states], dim=2)  # [B, N, L, C]
    query = mixer.query(x[:, :, -1])
    key, value = mixer.key_value(x).chunk(2, dim=-1)
    heads = []
    for channels in (slice(0, 16), slice(16, 32)):
        scores = torch.einsum("bnc,bnlc->bnl", query[..., channels], key[..., channels]) / 16**0.5
        heads.append(torch.einsum("bnl,bnlc->bnc", scores.softmax(-1), value[..., channels]))
    expected = token_norm(mixer.out(torch.cat(heads, dim=-1)), EPS)
    torch.testing.assert_close(fusion(hidden_states), expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_only_the_deepest_layers_are_read(randomize):
    fusion = build(randomize, num_layers=2)
    changed = [torch.full_like(tokens, float("nan")) for tokens in states()[:2]] + states()[2:]
    assert torch.equal(fusion(changed), fusion(states()))


@torch.no_grad()
def test_router_weights_may_be_negative_and_softmax_weights_sum_to_one(randomize):
    weights = build(randomize).router_weights(states())
    assert weights.shape == (2, 6, 4)
    assert (weights < 0).any()
    softmax = build(randomize, routing="softmax").router_weights(states())
    torch.testing.assert_close(softmax.sum(-1), torch.ones(2, 6))
    with pytest.raises(TypeError, match="cross_attention"):
        build(randomize, mixer="cross_attention").router_weights(states())


@torch.no_grad()
def test_a_new_fusion_starts_near_the_mean_of_the_layers():
    torch.manual_seed(0)
    fusion = Fusion(FusionConfig(num_layers=4, hidden_width=32), TINY_ENCODER)
    base, fused = fusion.base_and_fused(states())
    mean = token_norm(sum(token_norm(tokens, EPS) for tokens in states()), EPS)
    assert torch.equal(base, token_norm(states()[-1], EPS))
    # Not equal: the experts' hidden LayerNorm removes one direction of the 32.
    assert torch.cosine_similarity(fused, mean, dim=-1).min() > 0.8


PATHS = ["reference", "folded", pytest.param("triton", marks=NEEDS_INTERPRETER)]
VARIANTS_OF_EXPERTS = [name for name in VARIANTS if name != "cross_attention"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS_OF_EXPERTS)
@torch.no_grad()
def test_every_path_equals_the_definition(path, variant, randomize):
    fusion = prepare(randomize, path, **VARIANTS[variant])
    hidden_states = states(width=64)
    assert fusion.path == path
    expected = define_fusion(fusion, hidden_states)
    torch.testing.assert_close(fusion(hidden_states).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_zero_beta_is_the_base_latent_bit_for_bit_on_every_path(path, randomize):
    fusion = prepare(randomize, path, beta=0.0)
    assert fusion.path == path
    assert torch.equal(fusion(states(width=64)), token_norm(states(width=64)[-1], EPS))


@pytest.mark.parametrize("path", ["folded", "triton"])
def test_only_a_frozen_fusion_can_be_prepared(path, randomize):
    fusion = build(randomize)
    with pytest.raises(ValueError, match="only a frozen fusion can be prepared"):
        fusion.prepare(path, torch.device("cpu"), torch.float32)
    assert fusion.path == "reference"


def test_a_non_finite_weight_cannot_be_prepared(randomize):
    fusion = build(randomize).freeze()
    fusion.mixer.experts[2].down.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="expert 2 cannot be folded"):
        fusion.prepare("folded", torch.device("cpu"), torch.float32)
    assert fusion.path == "reference"


@torch.no_grad()
def test_preparing_again_replaces_the_path(randomize):
    fusion = prepare(randomize, "folded")
    fusion.prepare("reference", torch.device("cpu"), torch.float32)
    assert fusion.path == "reference"


CHANGES = {
    "unfreeze": lambda fusion, other: fusion.unfreeze(),
    "load_state_dict": lambda fusion, other: fusion.load_state_dict(other.state_dict()),
    "assign": lambda fusion, other: fusion.load_state_dict(other.state_dict(), assign=True),
    "as part of a module": lambda fusion, other: torch.nn.Sequential(fusion).load_state_dict(
        torch.nn.Sequential(other).state_dict()
    ),
    "dtype": lambda fusion, other: fusion.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_the_weights_brings_the_definition_back(change, randomize, caplog):
    fusion, other = prepare(randomize, "folded"), build(randomize, 1, KERNEL_ENCODER)
    CHANGES[change](fusion, other)
    assert fusion.path == "reference"
    assert ("the fusion was moved" in caplog.text) == (change == "dtype")
    hidden_states = states(width=64, dtype=fusion.last_layer.dtype)
    expected = define_fusion(fusion, hidden_states)
    torch.testing.assert_close(fusion(hidden_states).double(), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_move_to_where_it_is_keeps_the_path(randomize, caplog):
    fusion = prepare(randomize, "folded").to("cpu").float().requires_grad_(False).eval()
    assert fusion.path == "folded"
    assert copy.deepcopy(fusion).path == "folded"
    assert not caplog.records


@torch.no_grad()
def test_folds_from_full_precision_weights(randomize):
    """Prepared before the move, the matrices are those of the float32 weights, not of rounded ones."""
    hidden_states = states(width=64, dtype=torch.bfloat16)
    expected = define_fusion(build(randomize, encoder=KERNEL_ENCODER), hidden_states)

    def error(fusion: Fusion) -> Tensor:
        return (fusion(hidden_states).double() - expected).norm() / expected.norm()

    late = prepare(randomize, "reference", torch.bfloat16)
    late.prepare("folded", torch.device("cpu"), torch.bfloat16)
    assert error(prepare(randomize, "folded", torch.bfloat16)) < error(late)


def test_hidden_states_that_need_gradients_go_through_the_definition(randomize):
    fusion, definition = prepare(randomize, "folded"), prepare(randomize, "reference")
    hidden_states = [tokens.requires_grad_() for tokens in states(width=64)]
    result = fusion(hidden_states)
    assert torch.equal(result, definition(hidden_states))
    result.pow(3).sum().backward()
    assert all(tokens.grad is not None and tokens.grad.any() for tokens in hidden_states)
    assert all(parameter.grad is None for parameter in fusion.parameters())
