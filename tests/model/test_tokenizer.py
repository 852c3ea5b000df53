"""The tokenizer's public methods: shapes, options, statistics and refusals."""

import pytest
import torch

from kernels.reference import token_norm
from model.config import PRESETS
from model.errors import ImageError, LatentError, ModelError
from model.tokenizer import Tokenizer


def with_statistics(tokenizer: Tokenizer) -> Tokenizer:
    generator = torch.Generator().manual_seed(4)
    shape = tokenizer.config.latent_shape
    tokenizer.set_statistics(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator))
    return tokenizer


def test_encode_lays_tokens_out_channels_first(tokenizer, images):
    latents = tokenizer.encode(images)
    assert latents.shape == (2, *tokenizer.config.latent_shape)
    assert latents.is_contiguous()
    tokens = tokenizer.tokens(images)
    assert torch.equal(latents[1, :, 2, 3], tokens[1, 2 * 4 + 3])


def test_enriched_and_base_latents_differ_and_base_is_the_last_layer(tokenizer, images):
    base = tokenizer.encode(images, latent="base")
    last = tokenizer.encoder(tokenizer.preprocess(images))[-1]
    expected = token_norm(last, tokenizer.config.encoder.layer_norm_eps)
    assert torch.equal(base.flatten(2).transpose(1, 2), expected)
    assert not torch.allclose(base, tokenizer.encode(images), atol=1e-2)


def test_zero_beta_tokenizer_returns_the_base_latent_bit_for_bit(tiny_config, randomize, images):
    tokenizer = Tokenizer(tiny_config(beta=0.0)).eval()
    randomize(tokenizer)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images, latent="base"))


def test_without_fusion_the_latent_is_the_base(tiny_config, randomize, images):
    config = tiny_config().model_copy(update={"fusion": None})
    tokenizer = Tokenizer(config).eval()
    randomize(tokenizer)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images, latent="base"))
    assert tokenizer.fusion_path == "none"
    assert set(tokenizer.parts()) == {"encoder", "decoder"}


def test_reconstruct_is_decode_of_encode_and_stays_in_range(tokenizer, images):
    pictures = tokenizer.reconstruct(images)
    assert torch.equal(pictures, tokenizer.decode(tokenizer.encode(images)))
    assert pictures.shape == images.shape
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_an_image_does_not_depend_on_its_neighbours(tokenizer, images):
    alone = torch.cat([tokenizer.encode(images[:1]), tokenizer.encode(images[1:])])
    torch.testing.assert_close(alone, tokenizer.encode(images), atol=1e-5, rtol=0)


def test_normalisation_is_per_position_and_inverts(tokenizer, images):
    plain = tokenizer.encode(images)
    tokenizer = with_statistics(tokenizer)
    normalised = tokenizer.encode(images, normalize=True)
    expected = (plain - tokenizer.latent_mean) / torch.sqrt(tokenizer.latent_var + 1e-5)
    assert torch.equal(normalised, expected)
    torch.testing.assert_close(
        tokenizer.decode(normalised, normalize=True), tokenizer.decode(plain), atol=1e-4, rtol=0
    )


def test_normalize_needs_statistics_of_that_latent(tokenizer, images):
    with pytest.raises(LatentError, match="no latent statistics"):
        tokenizer.encode(images, normalize=True)
    with pytest.raises(LatentError, match="no latent statistics"):
        tokenizer.decode(tokenizer.encode(images), normalize=True)
    with pytest.raises(LatentError, match="normalize is not offered for base"):
        with_statistics(tokenizer).encode(images, latent="base", normalize=True)


def test_statistics_are_checked(tokenizer):
    shape = tokenizer.config.latent_shape
    zeros, ones = torch.zeros(shape), torch.ones(shape)
    with pytest.raises(LatentError, match=r"statistics var has shape \[1\]"):
        tokenizer.set_statistics(zeros, torch.ones(1))
    with pytest.raises(LatentError, match="statistics mean has a non-finite value"):
        tokenizer.set_statistics(zeros.fill_(float("inf")), ones)
    with pytest.raises(LatentError, match="statistics var has a negative value"):
        tokenizer.set_statistics(ones, -ones)
    assert not tokenizer.has_statistics


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 64, 64), r"shape \[3, 64, 64\], expected \[B, 3, 64, 64\]"),
        (torch.rand(1, 1, 64, 64), r"shape \[1, 1, 64, 64\]"),
        (torch.rand(1, 3, 64, 63), r"shape \[1, 3, 64, 63\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "dtype torch.uint8"),
    ],
)
def test_wrong_images_are_refused(tokenizer, images, message):
    with pytest.raises(ImageError, match=message):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.rand(32, 4, 4), r"shape \[32, 4, 4\], expected \[B, 32, 4, 4\]"),
        (torch.rand(1, 768, 16, 16), r"shape \[1, 768, 16, 16\], expected \[B, 32, 4, 4\]"),
        (torch.zeros(1, 32, 4, 4, dtype=torch.int64), "dtype torch.int64"),
        (torch.full((1, 32, 4, 4), float("nan")), "latent 0 holds a NaN"),
        (torch.cat([torch.zeros(2, 32, 4, 4), torch.full((1, 32, 4, 4), float("-inf"))]), "latent 2 holds"),
    ],
)
def test_wrong_latents_are_refused(tokenizer, latents, message):
    with pytest.raises(LatentError, match=message):
        tokenizer.decode(latents)


def test_empty_batches_pass_through(tokenizer):
    latents = tokenizer.encode(torch.zeros(0, 3, 64, 64))
    assert latents.shape == (0, 32, 4, 4)
    assert tokenizer.decode(latents).shape == (0, 3, 64, 64)


def test_other_dtypes_are_moved_to_the_tokenizers(tokenizer, images):
    latents = tokenizer.encode(images.double())
    assert latents.dtype == tokenizer.dtype == torch.float32
    half = tokenizer.decode(latents.half())
    torch.testing.assert_close(half, tokenizer.decode(latents), atol=2e-2, rtol=0)


def test_bfloat16_stays_close(tokenizer, tmp_path, images):
    tokenizer.save(tmp_path / "c")
    small = Tokenizer.load(tmp_path / "c", dtype=torch.bfloat16)
    latents = small.encode(images)
    assert latents.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(latents.float(), tokenizer.encode(images), dim=1)
    assert cosine.min() > 0.99


def test_errors_share_a_root():
    assert issubclass(ImageError, ModelError)
    assert issubclass(LatentError, ModelError)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_mini_fits_its_budget(name):
    with torch.device("meta"):
        tokenizer = Tokenizer(PRESETS[name])
    stored_bytes = 2 * sum(parameter.numel() for parameter in tokenizer.parameters())
    if name == "mini":
        assert stored_bytes <= 48 * 2**20
