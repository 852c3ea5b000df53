"""Linear maps with packed weights: the same results, and the plain map wherever packing does not serve."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed import Activation, PackedWeight
from model.networks.linear import Linear, pack_linear_maps
from model.tokenizer import Tokenizer

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

pytestmark = pytest.mark.skipif(
    PackedWeight.of(torch.zeros(1, 1)) is None, reason="weights are packed on x86 CPUs with oneDNN"
)


def packed_linear(inputs: int = 24, outputs: int = 40) -> Linear:
    torch.manual_seed(0)
    linear = Linear(inputs, outputs)
    linear.pack()
    return linear


def expected(linear: Linear, tokens: Tensor, activation: Activation = "none") -> Tensor:
    assert linear.bias is not None
    exact = tokens.double() @ linear.weight.double().T + linear.bias.double()
    return FUNCTIONS[activation](exact)


@torch.no_grad()
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 24), (2, 0, 24)])
def test_packed_weights_give_the_same(activation: Activation, shape: tuple[int, ...]) -> None:
    linear = packed_linear()
    tokens = 3 * torch.randn(shape)
    found = linear(tokens, activation)
    assert found.shape == (*shape[:-1], 40)
    assert torch.allclose(found.double(), expected(linear, tokens, activation), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    linear = packed_linear()
    wide = torch.randn(7, 60)
    found = linear(wide[:, 30:54])
    assert torch.allclose(found.double(), expected(linear, wide[:, 30:54]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "state", "data", "other type"])
def test_changed_weights_count(change: str) -> None:
    linear, tokens = packed_linear(), torch.randn(6, 24)
    linear(tokens)
    if change == "in place":
        linear.weight.mul_(2)
    elif change == "state":
        linear.load_state_dict({"weight": torch.randn(40, 24), "bias": torch.randn(40)})
    elif change == "data":
        linear.weight.data = torch.randn(40, 24)
    else:
        linear.double()
        tokens = tokens.double()
    found = linear(tokens)
    assert torch.allclose(found.double(), expected(linear, tokens), atol=1e-5)


def test_gradients_flow_through_frozen_weights() -> None:
    linear = packed_linear().requires_grad_(False)
    tokens = torch.randn(6, 24, requires_grad=True)
    linear(tokens, "gelu").sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().max() > 0


@torch.no_grad()
def test_autocast_keeps_its_type() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_linear()(torch.randn(6, 24)).dtype == torch.bfloat16


@torch.no_grad()
def test_copies_and_pickles_work() -> None:
    linear, tokens = packed_linear(), torch.randn(6, 24)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.allclose(other(tokens), linear(tokens), atol=1e-5)


def test_other_types_and_devices_are_not_packed() -> None:
    assert PackedWeight.of(torch.zeros(4, 4, dtype=torch.bfloat16)) is None
    assert PackedWeight.of(torch.zeros(4, 4, device="meta")) is None


def test_a_loaded_tokenizer_is_packed_and_agrees_with_the_plain_one() -> None:
    loaded, plain = Tokenizer.load("mini"), Tokenizer.load("mini")
    for part in plain.modules():
        if isinstance(part, Linear):
            assert part._packed is not None
            part._packed = None
    images = torch.rand(2, 3, 256, 256)
    latents = plain.encode(images)
    assert (loaded.encode(images) - latents).abs().max() < 2e-4 * latents.abs().max()
    assert torch.allclose(loaded.decode(latents), plain.decode(latents), atol=1e-4)
    pack_linear_maps(plain.double())  # nothing to pack
    assert plain.decode(latents.double()).dtype == torch.float64
