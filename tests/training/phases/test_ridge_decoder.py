from pathlib import Path

import pytest
import torch

from model.config import DecoderConfig
from model.images.similarity import psnr
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY
from training.data.batches import evaluation_batches
from training.data.sources import list_samples
from training.phases.ridge_decoder import _complement, initialize_decoder
from training.run import run_phase


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[24, 32, 64])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Decoders narrower than the latent, as wide, and wide enough to avoid the positions."""
    torch.manual_seed(1)
    decoder = DecoderConfig(width=request.param, depth=2, num_heads=2, mlp_width=64, patch_size=8)
    return Tokenizer(TINY.model_copy(update={"decoder": decoder})).eval()


def test_starts_better_than_the_mean_colour_of_every_image(tokenizer: Tokenizer, photos: Path) -> None:
    ((_, batch),) = evaluation_batches(list_samples([photos]), 32, 12)
    images = batch.pixels(torch.device("cpu"))
    mean_colour = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    before = psnr(tokenizer.reconstruct(images), images).mean()
    initialize_decoder(tokenizer, list_samples([photos]), 0.0, generator())
    after = psnr(tokenizer.reconstruct(images), images).mean()
    assert after > psnr(mean_colour, images).mean() > before


def test_is_the_ridge_solution(tokenizer: Tokenizer, photos: Path) -> None:
    """At the minimum the gradient of the squared error is the ridge's pull alone."""
    initialize_decoder(tokenizer, list_samples([photos]), 0.0, generator())
    decoder = tokenizer.decoder
    ((_, batch),) = evaluation_batches(list_samples([photos]), 32, 12)
    images = batch.pixels(torch.device("cpu"))
    with torch.no_grad():
        features = decoder.features(tokenizer.tokens(images, "base")).flatten(0, 1).double()
        error = decoder.predict(features.float()).double() - decoder.patchify(images).flatten(0, 1).double()
        gradient = error.T @ features + 30.0 * decoder.predict.weight.double()
    assert gradient.abs().max() < 1e-3 * (error.T @ features).abs().max()


def test_patchify_is_the_inverse_of_the_output(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.decoder
    images = torch.rand(2, 3, 32, 32, generator=generator())
    restored = decoder._unpatchify(decoder.patchify(images)) * decoder.pixel_std + decoder.pixel_mean
    torch.testing.assert_close(restored, images)


def test_embedding_is_orthonormal_and_avoids_the_positions() -> None:
    positions = torch.randn(9, 4, generator=generator()).double() @ torch.randn(4, 20).double()
    basis = _complement(positions, 10, generator())
    torch.testing.assert_close(basis.T @ basis, torch.eye(10).double())
    assert (positions @ basis).abs().max() < 1e-10


def test_recipe_option_reaches_training(recipe_file: Path, tmp_path: Path) -> None:
    plain = ["num_steps=1", "noise_tau=0", "optimizer.learning_rate=1e-9", "optimizer.final_learning_rate=0"]
    l1 = {}
    for kind in ("keep", "ridge"):
        run_phase("phase1", recipe_file, [*plain, f"decoder_init={kind}"], tmp_path / kind)
        header, row = (tmp_path / kind / "train.csv").read_text().splitlines()
        l1[kind] = float(row.split(",")[header.split(",").index("l1")])
    assert l1["ridge"] < 0.8 * l1["keep"]
