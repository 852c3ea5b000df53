"""The folded fusion's input checks, and that tokens do not touch each other."""

import pytest
import torch

from kernels import folded
from model.networks.folding import fold_experts


@pytest.fixture
def case(fusion_case):
    return fusion_case(batch=2)


@pytest.fixture
def experts(case):
    return fold_experts(case.weights, case.spec).to("cpu", torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z[:1], "got 1 hidden states, the fusion has 2 layers"),
        (lambda z: [], "got 0 hidden states, the fusion has 2 layers"),
        (lambda z: [*z, z[0]], "got 3 hidden states, the fusion has 2 layers"),
        (lambda z: [s[..., :32] for s in z], r"shape \[2, 9, 32\], expected \[B, N, 64\]"),
        (lambda z: [s[0] for s in z], r"shape \[9, 64\], expected \[B, N, 64\]"),
        (lambda z: [z[0], z[1][:, 1:]], "hidden state 1 has shape .*8, 64.*, hidden state 0 has .*9, 64"),
        (lambda z: [z[0], z[1][:1]], "hidden state 1 has shape .*1, 9, 64.*, hidden state 0 has .*2, 9, 64"),
        (lambda z: [s.long() for s in z], "hidden states have dtype torch.int64"),
        (lambda z: [z[0], z[1].half()], "hidden state 1 has dtype torch.float16, .* 0 has torch.float32"),
        (lambda z: [z[0], z[1].to("meta")], "hidden state 1 has device meta, hidden state 0 has cpu"),
        (lambda z: [s.half() for s in z], "weights are torch.float32 on cpu, .* torch.float16 on cpu"),
        (lambda z: [s.to("meta") for s in z], "weights are torch.float32 on cpu, .* torch.float32 on meta"),
    ],
)
def test_bad_input_is_named(case, experts, change, message):
    states = change(case.states)
    with pytest.raises(ValueError, match=message):
        folded.fuse_layers(states, experts, case.spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outlier", [0, 1e3])
def test_routes_in_full_precision(fusion_case, dtype, outlier):
    """An outlier channel makes each layer's share of the logits large; where they cancel, digits are lost."""

    def route(**options):
        case = fusion_case(num_layers=12, outlier=outlier, dtype=dtype, **options)
        experts = fold_experts(case.weights, case.spec).to("cpu", dtype)
        return case, case.router_error(folded.fuse_layers(case.states, experts, case.spec))

    _, error = route(router_input_norm=False)
    assert error <= 1e-6
    case, error = route()  # of normalised states, whose rounding remains
    assert error <= 0.6 * case.router_error(case.unfolded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", ["none", "weight and bias"])
@pytest.mark.parametrize("routing", ["energy", "softmax"])
def test_non_finite_tokens_spoil_only_themselves(fusion_case, dtype, affine, routing):
    case = fusion_case(batch=2, dtype=dtype, affine=affine, routing=routing)
    experts = fold_experts(case.weights, case.spec).to("cpu", dtype)
    clean = folded.fuse_layers(case.states, experts, case.spec)
    case.states[0][0, 3, 7] = float("nan")
    case.states[1][1, 5, 0] = float("inf")
    found = folded.fuse_layers(case.states, experts, case.spec)
    spoilt = torch.zeros(2, 9, dtype=torch.bool)
    spoilt[0, 3] = spoilt[1, 5] = True
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one[~spoilt], other[~spoilt])
        assert one[spoilt].isnan().any(dim=-1).all()


def test_channels_may_lie_apart(case, experts):
    apart = [state.mT.contiguous().mT for state in case.states]
    assert apart[0].stride(2) != 1
    assert case.error(folded.fuse_layers(apart, experts, case.spec)) <= 1e-6


def test_a_token_does_not_depend_on_its_batch(case, experts):
    together = folded.fuse_layers(case.states, experts, case.spec)
    for image in range(2):
        alone = folded.fuse_layers([state[image : image + 1] for state in case.states], experts, case.spec)
        torch.testing.assert_close(alone.tokens[0], together.tokens[image], atol=1e-5, rtol=0)


def test_the_input_is_left_as_it_was(case, experts):
    before = [state.clone() for state in case.states]
    folded.fuse_layers(case.states, experts, case.spec)
    assert all(torch.equal(one, other) for one, other in zip(case.states, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 9, 64), (2, 0, 64)])
def test_no_tokens_give_no_tokens(case, experts, shape):
    found = folded.fuse_layers([torch.zeros(shape)] * 2, experts, case.spec)
    assert found.tokens.shape == shape
    assert found.router_weights.shape == (*shape[:2], 2)
