"""Linear readouts of latents, and the fusion and the decoder that start from them."""

from pathlib import Path

import pytest
import torch

from model.config import DecoderConfig
from model.images.similarity import psnr
from model.networks.fusion import Fusion
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION
from training.data.batches import evaluation_batches
from training.data.sources import list_samples
from training.errors import DataError
from training.evaluation.readout import Ridge, fit_readouts, neighbourhood, shifted
from training.phases.fusion_start import base_decoder, collect_tokens, fit_fusion, initialize_fusion
from training.recipes.recipe import FusionStartConfig

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
        initialize_fusion(tokenizer, list_samples([tmp_path]), START, generator())


@torch.no_grad()
def test_the_neighbourhood_says_more_than_the_token(tokenizer: Tokenizer, photos: Path) -> None:
    """On smooth pictures the patches around say where this one goes at its borders."""
    readouts = fit_readouts(tokenizer, [photos], ("base",))["base"]
    ((_, batch),) = evaluation_batches(list_samples([photos]), 32, 12)
    images = batch.pixels(torch.device("cpu"))
    one, nine = readouts.images(tokenizer.tokens(images, "base"))
    assert psnr(nine, images).mean() > psnr(one, images).mean()


def test_the_fusion_learns_under_a_frozen_linear_decoder(tokenizer: Tokenizer, photos: Path) -> None:
    tokens = collect_tokens(tokenizer, list_samples([photos]), 12, "float32")
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
    initialize_fusion(
        tokenizer, list_samples([photos]), START.model_copy(update={"num_steps": 2}), generator()
    )
    changed = {name for name, value in tokenizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("fusion.") for name in changed)
