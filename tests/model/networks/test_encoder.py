"""The encoder against transformers' DINOv2 with registers."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.config import EncoderConfig
from model.interop.transformers_weights import encoder_state_from_transformers
from model.networks.encoder import Encoder

TINY = {"width": 48, "depth": 3, "num_heads": 3, "position_grid": 6}
BASE = {"width": 768, "depth": 12, "num_heads": 12, "position_grid": 37}
NUM_REGISTERS = 4


def build_pair(fields: dict[str, int], randomize: Callable[..., None], patch_size: int = 14):
    """A random transformers model and our encoder with its weights."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=fields["width"],
            num_hidden_layers=fields["depth"],
            num_attention_heads=fields["num_heads"],
            image_size=fields["position_grid"] * patch_size,
            patch_size=patch_size,
            num_register_tokens=NUM_REGISTERS,
        )
    ).eval()
    randomize(reference)
    side = fields["position_grid"] * patch_size
    encoder = Encoder(EncoderConfig(patch_size=patch_size, image_size=side, **fields)).eval()
    encoder.load_state_dict(encoder_state_from_transformers(reference.state_dict(), encoder.config))
    return reference, encoder


def pixels(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("height", "width"),
    [(84, 84), (56, 56), (112, 112), (70, 98)],
    ids=["native grid", "smaller", "larger", "not square"],
)
@torch.no_grad()
def test_every_hidden_state_equals_transformers(height, width, randomize, record_difference):
    reference, encoder = build_pair(TINY, randomize)
    x = pixels(height, width)
    # hidden_states[0] is the embedding, then one entry a block.
    expected = reference(x, output_hidden_states=True).hidden_states
    assert len(expected) == TINY["depth"] + 1
    record_difference("embedding", encoder.embed(x), expected[0], 1e-4)
    for number, (ours, theirs) in enumerate(zip(encoder.hidden_states(x), expected[1:], strict=True), 1):
        record_difference(f"block {number}", ours, theirs, 1e-4)


@torch.no_grad()
@pytest.mark.slow
def test_base_size_at_its_real_geometry_equals_transformers(randomize, record_difference):
    reference, encoder = build_pair(BASE, randomize)
    x = pixels(224, 224, batch=1)  # a 37x37 table interpolated to 16x16
    expected = reference(x, output_hidden_states=True).hidden_states[1:]
    for number, (ours, theirs) in enumerate(zip(encoder.hidden_states(x), expected, strict=True), 1):
        record_difference(f"block {number}", ours, theirs, 1e-4)


@torch.no_grad()
def test_another_patch_size_equals_transformers(randomize, record_difference):
    reference, encoder = build_pair(TINY, randomize, patch_size=8)
    expected = reference(pixels(64, 64), output_hidden_states=True).hidden_states[-1]
    record_difference("last block", encoder.hidden_states(pixels(64, 64))[-1], expected, 1e-4)


@torch.no_grad()
def test_forward_drops_class_and_register_tokens(randomize):
    config = EncoderConfig(image_size=84, **TINY)
    encoder = Encoder(config).eval()
    randomize(encoder)
    with_prefix = encoder.hidden_states(pixels(84, 84))
    patches = encoder(pixels(84, 84))
    assert [tuple(state.shape) for state in patches] == [(2, 36, 48)] * 3
    for ours, whole in zip(patches, with_prefix, strict=True):
        assert torch.equal(ours, whole[:, 1 + NUM_REGISTERS :])


def test_inference_writes_one_buffer(randomize):
    """The states lie evenly apart, and are those of training, bit for bit."""
    encoder = Encoder(EncoderConfig(image_size=56, **TINY))
    randomize(encoder)
    trained = encoder(pixels(56, 56))
    with torch.no_grad():
        states = encoder(pixels(56, 56))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = encoder(pixels(56, 56))
    starts = [state.data_ptr() for state in states]
    assert len({after - before for before, after in itertools.pairwise(starts)}) == 1
    assert len({state.untyped_storage().data_ptr() for state in states}) == 1
    assert len({state.untyped_storage().data_ptr() for state in mixed}) == len(mixed)
    for one, other in zip(states, trained, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_gradients_reach_every_parameter(randomize):
    encoder = Encoder(EncoderConfig(image_size=56, **TINY))
    randomize(encoder)
    encoder.hidden_states(pixels(56, 56))[-1].square().mean().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_parity_notices_one_changed_weight(randomize):
    """The control of the tests above: agreement is not vacuous, and it breaks from the changed block on."""
    reference, encoder = build_pair(TINY, randomize)
    expected = reference(pixels(56, 56), output_hidden_states=True).hidden_states[1:]
    encoder.blocks[1].mlp.down.weight[0, 0] += 0.5
    ours = encoder.hidden_states(pixels(56, 56))
    differences = [(a - b).abs().max().item() for a, b in zip(ours, expected, strict=True)]
    assert differences[0] <= 1e-4
    assert min(differences[1:]) > 1e-3
    assert all(state.std() > 0.1 for state in expected)


@torch.no_grad()
def test_frozen_encoder_resizes_its_positions_once(randomize, monkeypatch):
    encoder = Encoder(EncoderConfig(image_size=56, **TINY)).eval()
    randomize(encoder)
    expected = encoder.embed(pixels(56, 56))
    other_size = encoder.embed(pixels(70, 70))
    encoder.freeze()
    assert torch.equal(encoder.embed(pixels(70, 70)), other_size)
    monkeypatch.setattr(encoder, "_resize_positions", None)
    assert torch.equal(encoder.embed(pixels(56, 56)), expected)
    assert "resized_positions" not in encoder.state_dict()


@torch.no_grad()
def test_changed_weights_drop_the_resized_positions(randomize):
    config = EncoderConfig(image_size=56, **TINY)
    encoder, other = Encoder(config).eval().freeze(), Encoder(config).eval()
    randomize(other)
    encoder.load_state_dict(other.state_dict())
    assert torch.equal(encoder.embed(pixels(56, 56)), other.embed(pixels(56, 56)))
    encoder.freeze().unfreeze()
    assert encoder.resized_positions is None


@torch.no_grad()
def test_attention_takes_the_fast_kernel():
    """SDPA's flash kernel, which never writes the attention matrix, accepts the block's layout."""
    encoder = Encoder(EncoderConfig(image_size=56, **TINY)).eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        encoder(pixels(56, 56))
