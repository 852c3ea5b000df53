"""The operators' definitions, against arithmetic written out in float64."""

import pytest
import torch

from kernels.reference import energy_aggregate, incremental_correction, token_norm

TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]


def normalise(tokens, eps):
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 7, 33), (3, 16, 192)])
def test_token_norm(dtype, tolerance, shape):
    tokens = (3 + 5 * draw(*shape)).to(dtype)
    expected = normalise(tokens.double(), 1e-6)
    torch.testing.assert_close(token_norm(tokens, 1e-6).double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("num_layers", [1, 4, 12])
def test_energy_aggregate(dtype, tolerance, num_layers):
    total, weights = draw(2, 5, 24).to(dtype), draw(2, 5, num_layers, seed=1).to(dtype)
    w = weights.double()
    expected = normalise(total.double() / torch.sqrt((w**2).sum(-1, keepdim=True) + 1e-6), 1e-6)
    found = energy_aggregate(total, weights, 1e-6, 1e-6)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def test_energy_aggregate_keeps_the_sign_of_negative_weights():
    outputs, weights = draw(1, 3, 16), -torch.ones(1, 3, 1, dtype=torch.float64)
    suppressed = energy_aggregate(weights * outputs, weights, 1e-6, 1e-6)
    adopted = energy_aggregate(outputs, -weights, 1e-6, 1e-6)
    torch.testing.assert_close(suppressed, -adopted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_zero_weights_are_finite_forward_and_backward(dtype):
    total = torch.zeros(1, 2, 8, dtype=dtype, requires_grad=True)
    weights = torch.zeros(1, 2, 4, dtype=dtype, requires_grad=True)
    result = energy_aggregate(total, weights, 1e-6, 1e-6)
    assert torch.equal(result, torch.zeros_like(result))
    if dtype != torch.float16:  # 1/eps overflows half precision, which nobody trains in
        result.sum().backward()
        assert total.grad.isfinite().all()
        assert weights.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0])
def test_incremental_correction(dtype, tolerance, beta):
    base, fused = draw(2, 5, 24).to(dtype), draw(2, 5, 24, seed=1).to(dtype)
    expected = normalise(base.double() + beta * (fused.double() - base.double()), 1e-6)
    found = incremental_correction(base, fused, beta, 1e-6)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def test_zero_beta_returns_the_base_itself():
    base = draw(1, 2, 8)
    assert incremental_correction(base, draw(1, 2, 8, seed=1), 0.0, 1e-6) is base
