"""DiT^DH against a second implementation in float64, written from RAE's description with NumPy alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.networks.dit import GENERATOR_PRESETS, TABLES, DiT, GeneratorConfig

SMALL = GeneratorConfig(
    name="small",
    num_classes=5,
    latent_channels=12,
    grid=4,
    trunk_width=32,
    trunk_depth=3,
    trunk_heads=2,
    head_width=48,
    head_depth=2,
    head_heads=3,
)
KEYS = json.loads((Path(__file__).parent / "dit_keys.json").read_text())


def randomized(config=SMALL, seed=0):
    """A network whose every tensor is random, those that start at zero included."""
    torch.manual_seed(seed)
    network = DiT(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name not in TABLES:
                parameter.normal_(std=0.15)
                if "norm" in name:
                    parameter.add_(1)
    return network


def inputs(config=SMALL, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, *config.latent_shape, generator=generator)
    time = torch.tensor([0.0, 0.37, 1.0])[:batch]
    labels = torch.tensor([0, 3, config.null_class])[:batch]
    return latents, time, labels


class Reference:
    """The forward pass in NumPy. Shapes: B batch, N tokens, W width."""

    def __init__(self, network):
        self.config = network.config
        self.state = {name: t.double().numpy() for name, t in network.state_dict().items()}

    def __call__(self, latents, time, labels):
        config = self.config
        B, C, h, w = latents.shape
        x = np.moveaxis(latents.double().numpy(), 1, 3).reshape(B, h * w, C)
        e_t = self.time(time.double().numpy())
        c = silu(e_t + self.state["y_embedder.embedding_table.weight"][labels.numpy()])
        s = self.embed("s_embedder", x) + self.state["pos_embed"]
        for number in range(config.trunk_depth):
            s = self.block(f"blocks.{number}", s, c[:, None], config.trunk_heads)
        s = silu(e_t[:, None] + s)
        if config.trunk_width != config.head_width:
            s = self.linear("s_projector", s)
        x = self.embed("x_embedder", x)
        for number in range(config.trunk_depth, config.trunk_depth + config.head_depth):
            x = self.block(f"blocks.{number}", x, s, config.head_heads)
        shift, scale = np.split(self.linear("final_layer.adaLN_modulation.1", silu(s)), 2, axis=-1)
        normed = self.rms("final_layer.norm_final", x)
        out = self.linear("final_layer.linear", normed * (1 + scale) + shift)
        return np.moveaxis(out.reshape(B, h, w, C), 3, 1)

    def time(self, t):
        angle = 2 * math.pi * t[:, None] * self.state["t_embedder.W"]
        features = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        return self.linear("t_embedder.mlp.2", silu(self.linear("t_embedder.mlp.0", features)))

    def embed(self, name, x):
        weight = self.state[f"{name}.proj.weight"][:, :, 0, 0]
        return x @ weight.T + self.state[f"{name}.proj.bias"]

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def rms(self, name, x):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * self.state[f"{name}.weight"]

    def block(self, name, x, c, num_heads):
        m = self.linear(f"{name}.adaLN_modulation.1", silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(m, 6, axis=-1)
        x = x + gate1 * self.attention(
            f"{name}.attn", self.rms(f"{name}.norm1", x) * (1 + scale1) + shift1, num_heads
        )
        y = self.rms(f"{name}.norm2", x) * (1 + scale2) + shift2
        g, u = np.split(self.linear(f"{name}.mlp.w12", y), 2, axis=-1)
        return x + gate2 * self.linear(f"{name}.mlp.w3", silu(g) * u)

    def attention(self, name, x, num_heads):
        B, N, W = x.shape
        q, k, v = (
            part.reshape(B, N, num_heads, W // num_heads)
            for part in np.split(self.linear(f"{name}.qkv", x), 3, axis=-1)
        )
        q, k = self.rotate(q), self.rotate(k)
        logits = np.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(W // num_heads)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return self.linear(f"{name}.proj", np.einsum("bhnm,bmhd->bnhd", weights, v).reshape(B, N, W))

    def rotate(self, x):
        """Each pair of channels by its own angle, one pair and one token at a time."""
        out, half = np.empty_like(x), x.shape[-1] // 2
        for n in range(x.shape[1]):
            row, column = divmod(n, self.config.grid)
            for first in range(0, x.shape[-1], 2):
                position, offset = (row, first) if first < half else (column, first - half)
                angle = position * 10000 ** (-offset / half)
                a, b = x[:, n, :, first], x[:, n, :, first + 1]
                out[:, n, :, first] = a * math.cos(angle) - b * math.sin(angle)
                out[:, n, :, first + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    "changes", [{}, {"head_width": 32, "head_heads": 2}, {"mlp_ratio": 2.5}], ids=["small", "equal", "mlp"]
)
def test_the_forward_pass_is_that_of_the_description(changes):
    config = GeneratorConfig(**{**SMALL.model_dump(), **changes})
    network = randomized(config)
    expected = Reference(network)(*inputs(config))
    assert np.abs(expected).max() > 0.5
    with torch.no_grad():
        single = network(*inputs(config)).double().numpy()
        double = network.double()(*inputs(config)).numpy()
    np.testing.assert_allclose(single, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(double, expected, atol=5e-6)  # the tables are stored in float32


def test_bfloat16_products_stay_close_to_float32():
    network = randomized()
    with torch.no_grad():
        exact = network(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(*inputs())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.06


def test_the_time_embedding_ignores_autocast():
    network = randomized()
    with torch.no_grad():
        exact = network.t_embedder(torch.tensor([0.9]))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network.t_embedder(torch.tensor([0.9])), exact)


@pytest.mark.parametrize(("preset", "published"), [("dit-dh-xl", "DiTDH-XL"), ("dit-dh-s", "DiTDH-S")])
def test_full_sizes_have_the_published_tensors(preset, published):
    with torch.device("meta"):
        network = DiT(GENERATOR_PRESETS[preset])
    expected = KEYS[published]
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == expected["shapes"]
    assert sum(p.numel() for p in network.parameters()) == expected["num_parameters"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == expected["num_trained"]


def test_the_bundled_size_fits_into_24_mebibytes_of_float16():
    with torch.device("meta"):
        network = DiT(GENERATOR_PRESETS["dit-dh-mini"])
    assert sum(2 * tensor.numel() for tensor in network.state_dict().values()) < 23.5 * 2**20


def test_a_new_network_predicts_zero_and_learns_by_its_last_layer_first():
    torch.manual_seed(0)
    network = DiT(SMALL)
    velocity = network(*inputs())
    assert torch.equal(velocity, torch.zeros_like(velocity))
    (velocity - 1).square().mean().backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"final_layer.linear.weight", "final_layer.linear.bias"}
    weights = {name: p.detach() for name, p in network.named_parameters()}
    assert weights["y_embedder.embedding_table.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert weights["pos_embed"].abs().max() <= 1
    bound = math.sqrt(6 / (SMALL.latent_channels + SMALL.head_width))
    assert weights["x_embedder.proj.weight"].abs().max() == pytest.approx(bound, rel=0.05)


def test_tables_are_fixed_and_named():
    network = DiT(SMALL)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert network.state_dict().keys() - trained == TABLES


def test_the_position_table_has_columns_first():
    table = DiT(SMALL).pos_embed[0]  # [N, D]
    row, column, quarter = 2, 3, SMALL.trunk_width // 4
    frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
    expected = [wave(place * frequencies) for place in (column, row) for wave in (np.sin, np.cos)]
    found = table[row * SMALL.grid + column].detach().numpy()
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-6)


def test_recomputed_activations_give_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    def gradients(recomputed):
        network = randomized()
        if recomputed:
            for block in network.blocks:
                forward = block.forward
                block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
        network(*inputs()).square().mean().backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own, of its dependencies
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_the_compiled_network_gives_the_same(backend):
    network = randomized()
    with torch.no_grad():
        expected = network(*inputs())
        found = torch.compile(network, fullgraph=True, backend=backend)(*inputs())
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"trunk_heads": 3}, "trunk_width"), ({"head_width": 50}, "head_width"), ({"num_classes": 0}, "num_c")],
)
def test_impossible_sizes_are_refused_by_field(changes, field):
    with pytest.raises(ValidationError, match=field):
        GeneratorConfig(**{**SMALL.model_dump(), **changes})
