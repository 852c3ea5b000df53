"""Linear readouts of latents, and the fusion and the decoder that start from them."""

from pathlib import Path

import pytest
import torch

from kernels.reference import token_norm
from model.config import DecoderConfig
from model.fusion import Fusion
from model.metrics import psnr
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION
from training.errors import DataError
from training.fusion_solution import base_weight, fuse_tokens, is_solvable, solve_fusion
from training.fusion_start import base_decoder, collect_tokens, fit_fusion, initialize_fusion
from training.initialization import DecoderStart, initialize_decoder
from training.pointers import _heads
from training.readout import NEIGHBOURS, Ridge, fit_readouts, neighbourhood, shifted
from training.recipe import FusionStartConfig

START = FusionStartConfig(num_images=12, num_steps=60, batch_tokens=64, learning_rate=5e-3)


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(3)
    decoder = DecoderConfig(width=96, depth=2, num_heads=4, mlp_width=64, patch_size=8)
    return Tokenizer(TINY.model_copy(update={"fusion": TINY_FUSION, "decoder": decoder})).eval()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_ridge_recovers_a_linear_map_and_its_intercept() -> None:
    features = torch.randn(200, 5, generator=generator())
    weights, intercept = torch.randn(5, 3, generator=generator()), torch.tensor([1.0, -2.0, 3.0])
    ridge = Ridge(5, 3)
    for part in features.split(64):
        ridge.add(part, part @ weights + intercept)
    fit = ridge.solve(1e-9)
    torch.testing.assert_close(fit(features), features @ weights + intercept, rtol=1e-5, atol=1e-5)
    assert ridge.num_rows == 200


def test_neighbours_beyond_the_border_are_the_nearest_inside() -> None:
    grid = torch.arange(9.0).view(1, 9, 1)
    assert shifted(grid, 3, (0, 1)).flatten().tolist() == [1, 2, 2, 4, 5, 5, 7, 8, 8]
    assert shifted(grid, 3, (-1, 0)).flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    around = neighbourhood(grid, 3)
    assert around.shape == (1, 9, 9)
    assert around[0, 4].sort().values.tolist() == list(range(9))


def test_readouts_are_of_the_latents_they_are_asked_for(tokenizer: Tokenizer, photos: Path) -> None:
    readouts = fit_readouts(tokenizer, [photos], ("base", "enriched"))
    images = torch.rand(2, 3, 32, 32, generator=generator())
    for latent, readout in readouts.items():
        one, nine = readout.images(tokenizer.tokens(images, latent))
        assert one.shape == nine.shape == images.shape
        assert one.min() >= 0
        assert one.max() <= 1
    base, enriched = (readouts[latent].one.weights for latent in ("base", "enriched"))
    assert not torch.equal(base, enriched)


def test_no_readable_photo_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match="readout: none of the 1 images"):
        fit_readouts(tokenizer, [tmp_path], ("base",))
    with pytest.raises(DataError, match="no image could be decoded"):
        initialize_fusion(tokenizer, [tmp_path], START, generator())


@torch.no_grad()
def test_heads_point_at_the_neighbours(tokenizer: Tokenizer, photos: Path) -> None:
    """Each head's attention lies on its own offset; at the border on the nearest token inside."""
    decoder = tokenizer.decoder
    initialize_decoder(tokenizer, [photos], DecoderStart(with_neighbours=True), generator())
    tokens = torch.randn(1, 16, 32, generator=generator())
    tokens = token_norm(tokens - tokens.mean(dim=2, keepdim=True), 1e-6)
    stream = torch.cat([decoder.class_token, decoder.embed(tokens)], dim=1) + decoder.positions
    block = decoder.blocks[0]
    places = torch.arange(16.0).view(1, 16, 1)
    normed = block.norm_attention(stream)
    for (attention, rows), offset in list(zip(_heads(decoder), NEIGHBOURS, strict=False))[:4]:
        query, key, _ = (part[..., rows] for part in attention.qkv(normed).chunk(3, dim=-1))
        weights = (query @ key.transpose(1, 2) / (rows.stop - rows.start) ** 0.5).softmax(dim=-1)
        found = weights[0, 1:].argmax(dim=1) - 1
        assert found.tolist() == shifted(places, 4, offset).flatten().int().tolist()


def test_a_start_with_neighbours_beats_one_without(tokenizer: Tokenizer, photos: Path) -> None:
    """On smooth pictures the patches around say where this one goes at its borders."""
    readouts = fit_readouts(tokenizer, [photos], ("base",))["base"]
    from training.data import evaluation_batches
    from training.sources import list_samples

    ((_, batch),) = evaluation_batches(list_samples([photos]), 32, 12)
    images = batch.pixels(torch.device("cpu"))
    found = {}
    for with_neighbours in (False, True):
        start = DecoderStart(with_neighbours=with_neighbours)
        initialize_decoder(tokenizer, [photos], start, generator())
        found[with_neighbours] = psnr(tokenizer.reconstruct(images, "base"), images).mean()
    one, nine = readouts.images(tokenizer.tokens(images, "base"))
    assert psnr(nine, images).mean() > psnr(one, images).mean()
    assert found[True] > found[False] + 0.1


def test_the_fusion_learns_under_a_frozen_linear_decoder(tokenizer: Tokenizer, photos: Path) -> None:
    tokens = collect_tokens(tokenizer, [photos], 12, "float32")
    assert tokens.states.shape == (12 * 16, 4, 32)
    decoder = base_decoder(tokens, 1e-6)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    torch.manual_seed(0)
    fusion = Fusion(tokenizer.config.fusion, tokenizer.config.encoder)
    errors = fit_fusion(fusion, tokens, decoder, START, generator())
    assert sum(errors[-10:]) < 0.9 * sum(errors[:10])
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_initialization_changes_the_fusion_alone(tokenizer: Tokenizer, photos: Path) -> None:
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    initialize_fusion(tokenizer, [photos], START.model_copy(update={"num_steps": 2}), generator())
    changed = {name for name, value in tokenizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("fusion.") for name in changed)


@pytest.fixture
def solvable(tokenizer: Tokenizer) -> Fusion:
    config = TINY_FUSION.model_copy(update={"hidden_width": 80})
    return Fusion(config, tokenizer.config.encoder)


@torch.no_grad()
def test_closed_form_adds_what_the_decoder_misses(
    tokenizer: Tokenizer, solvable: Fusion, photos: Path
) -> None:
    tokens = collect_tokens(tokenizer, [photos], 12, "float32")
    decoder = base_decoder(tokens, 1e-6)
    base = token_norm(tokens.states[:, -1].float(), 1e-6)
    before = (decoder(base) - tokens.patches.float()).square().mean()
    solve_fusion(solvable, tokens.states, tokens.patches, decoder, generator())
    found = fuse_tokens(solvable, tokens.states)
    after = (decoder(found) - tokens.patches.float()).square().mean()
    assert after < 0.9 * before
    assert torch.nn.functional.cosine_similarity(found, base, dim=-1).mean() > 0.9


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.1, 0.2, 0.5])
def test_base_weight_makes_the_correction_exact(beta: float) -> None:
    """``LN((1 - beta) z + beta LN(c/d z + delta))`` is ``z + delta`` up to scale, where that is possible."""
    draws = torch.linalg.qr(torch.randn(64, 2, generator=generator()))[0].T * 8
    base = draws[0]
    delta = 0.5 * beta / (1 - beta) * draws[1]
    weight = base_weight(delta.square().mean(), beta)
    fused = weight * base + delta
    fused = fused / fused.square().mean().sqrt()
    corrected = (1 - beta) * base + beta * fused
    wanted = base + delta
    cosine = torch.nn.functional.cosine_similarity(corrected, wanted, dim=0)
    assert cosine == pytest.approx(1, abs=1e-5)


def test_fusions_without_the_closed_form_are_told_apart(tokenizer: Tokenizer, solvable: Fusion) -> None:
    assert is_solvable(solvable)
    for change in (
        {"routing": "softmax"},
        {"correction": "replace"},
        {"hidden_width": 48},
        {"num_layers": 2},
    ):
        config = solvable.config.model_copy(update=change)
        assert not is_solvable(Fusion(config, tokenizer.config.encoder)), change
