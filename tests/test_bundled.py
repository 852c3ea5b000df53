"""The bundled checkpoints on real photos."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model.checkpoints.tokenizers import BUNDLED_DIRECTORY
from model.config import PRESETS
from model.generator import GENERATOR_PRESETS, Generator
from model.images.similarity import psnr, ssim
from model.tokenizer import Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import list_samples
from training.studies.generator_card import write_index

ROOT = Path(__file__).parents[1]
VALIDATION = ROOT.parent / "shared" / "data" / "photos-256-val.tar"
PAGE_LATENTS = ROOT / "service" / "pages" / "site" / "generated"
MAX_BYTES = 48 * 2**20
MAX_GENERATOR_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("mini")


def load(path: Path, limit: int | None = None) -> torch.Tensor:
    samples = list_samples([path])[:limit]
    return torch.cat([batch.pixels(torch.device("cpu")) for _, batch in evaluation_batches(samples, 256, 8)])


def test_is_the_preset_with_one_more_block_and_small(tokenizer: Tokenizer) -> None:
    preset = PRESETS["mini"]
    grown = preset.decoder.model_copy(update={"depth": preset.decoder.depth + 1})
    assert tokenizer.config == preset.model_copy(update={"decoder": grown})
    assert tokenizer.has_statistics
    assert sum(file.stat().st_size for file in (BUNDLED_DIRECTORY / "mini").iterdir()) <= MAX_BYTES


def test_reconstructs_the_sample_photos(tokenizer: Tokenizer) -> None:
    images = load(ROOT / "samples")
    decoded = tokenizer.reconstruct(images)
    assert len(images) == 3
    assert psnr(decoded, images).mean() > 18
    assert psnr(decoded, images).mean() > psnr(tokenizer.reconstruct(images, "base"), images).mean() + 0.5


def test_statistics_whiten_latents_and_undo(tokenizer: Tokenizer) -> None:
    images = load(ROOT / "samples")
    latents = tokenizer.encode(images)
    normalized = tokenizer.encode(images, normalize=True)
    assert 0.5 < normalized.std() < 2
    torch.testing.assert_close(
        tokenizer.decode(normalized, normalize=True), tokenizer.decode(latents), rtol=0, atol=1e-4
    )


@pytest.mark.skipif(not VALIDATION.exists(), reason="the validation pack is not here")
def test_holds_its_quality_on_validation_photos(tokenizer: Tokenizer) -> None:
    images = load(VALIDATION, limit=40)
    decoded = torch.cat([tokenizer.reconstruct(chunk) for chunk in images.split(8)])
    assert psnr(decoded, images).mean() > 20
    assert ssim(decoded, images).mean() > 0.4


def test_the_generator_is_its_preset_small_and_of_this_tokenizer(tokenizer: Tokenizer) -> None:
    generator = Generator.load("dit-dh-mini")
    assert generator.config == GENERATOR_PRESETS["dit-dh-mini"]
    assert len(generator.trained_on.class_names) == generator.config.num_classes
    generator.check_tokenizer(tokenizer)
    files = (BUNDLED_DIRECTORY / "dit-dh-mini").iterdir()
    assert sum(file.stat().st_size for file in files) <= MAX_GENERATOR_BYTES


def test_the_generator_predicts_velocities_of_photos(tokenizer: Tokenizer) -> None:
    generator, time = Generator.load("dit-dh-mini"), torch.full((3,), 0.8)
    latents = generator.normalize_latents(tokenizer.encode(load(ROOT / "samples")))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    velocity, labels = noise - latents, torch.full((3,), generator.config.null_class)
    found = generator.velocity(0.2 * latents + 0.8 * noise, time, labels)
    assert (found - velocity).square().mean() < 0.6 * velocity.square().mean()


def test_the_page_offers_latents_of_the_bundled_generator(tokenizer: Tokenizer, tmp_path: Path) -> None:
    generator = Generator.load("dit-dh-mini")
    assert generator.info is not None
    write_index(generator, tmp_path / "index.json")
    index = json.loads((PAGE_LATENTS / "index.json").read_text())
    assert index == json.loads((tmp_path / "index.json").read_text())
    wanted = {f"{name}.{suffix}" for name in index["classes"] for suffix in ("jpg", "safetensors")}
    assert {file.name for file in PAGE_LATENTS.iterdir()} == wanted | {"index.json"}
    for label, name in enumerate(index["classes"]):
        with safe_open(PAGE_LATENTS / f"{name}.safetensors", framework="pt") as file:
            metadata, latents = file.metadata(), file.get_tensor("latents")
        assert metadata["generator_sha256"] == generator.info.sha256
        assert json.loads(metadata["labels"]) == [label] * len(latents)
        assert latents.shape[1:] == tokenizer.config.latent_shape
