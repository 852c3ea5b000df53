"""The decoder, and the whole single-layer path, against diffusers' AutoencoderRAE."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import DecoderConfig, EncoderConfig, TokenizerConfig
from model.interop.rae_decoder_weights import decoder_state_from_diffusers
from model.interop.transformers_weights import encoder_state_from_transformers
from model.networks.vit import sincos_positions
from model.tokenizer import Tokenizer

# diffusers without latent statistics still divides by its deviation plus eps: 1 + 1e-5.
DIFFUSERS_LATENT_SCALE = 1 + 1e-5


def build_pair(randomize: Callable[..., None], **fields: int) -> tuple[Any, Tokenizer]:
    """A random AutoencoderRAE and our tokenizer without fusion, with its weights."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"width": 128, "depth": 3, "decoder_width": 96, "decoder_depth": 3, "heads": 4, "mlp_width": 160}
    sizes |= fields
    reference = diffusers.AutoencoderRAE(
        encoder_hidden_size=sizes["width"],
        encoder_num_hidden_layers=sizes["depth"],
        decoder_hidden_size=sizes["decoder_width"],
        decoder_num_hidden_layers=sizes["decoder_depth"],
        decoder_num_attention_heads=sizes["heads"],
        decoder_intermediate_size=sizes["mlp_width"],
    ).eval()
    randomize(reference)
    config = TokenizerConfig(
        name="parity",
        encoder=EncoderConfig(width=sizes["width"], depth=sizes["depth"], num_heads=sizes["width"] // 64),
        fusion=None,
        decoder=DecoderConfig(
            width=sizes["decoder_width"],
            depth=sizes["decoder_depth"],
            num_heads=sizes["heads"],
            mlp_width=sizes["mlp_width"],
        ),
    )
    tokenizer = Tokenizer(config).eval()
    tokenizer.encoder.load_state_dict(
        encoder_state_from_transformers(reference.encoder.state_dict(), tokenizer.config.encoder)
    )
    tokenizer.decoder.load_state_dict(decoder_state_from_diffusers(reference.decoder.state_dict()))
    return reference, tokenizer


def photos(batch: int, side: int = 256) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(5))


def check_parity(reference: Any, tokenizer: Tokenizer, check: Callable[..., None], batch: int) -> None:
    images = photos(batch)
    latents = tokenizer.encode(images)
    expected = reference.encode(images).latent * DIFFUSERS_LATENT_SCALE
    check("base latent", latents, expected, 1e-4)
    tokens = latents.flatten(2).transpose(1, 2)
    theirs = reference.decode(latents / DIFFUSERS_LATENT_SCALE).sample
    check("decoded pixels", tokenizer.decoder(tokens), theirs, 1e-4)
    check("decode", tokenizer.decode(latents), theirs.clamp(0, 1), 1e-4)
    check("round trip", tokenizer.reconstruct(images), reference(images).sample.clamp(0, 1), 1e-4)


@torch.no_grad()
def test_base_latent_and_decode_equal_diffusers(randomize, record_difference):
    reference, tokenizer = build_pair(randomize)
    check_parity(reference, tokenizer, record_difference, batch=2)


@torch.no_grad()
def test_mini_size_equals_diffusers(randomize, record_difference):
    sizes = {"decoder_width": 320, "decoder_depth": 8, "heads": 5, "mlp_width": 1280}
    reference, tokenizer = build_pair(randomize, width=192, depth=12, **sizes)
    check_parity(reference, tokenizer, record_difference, batch=1)


@torch.no_grad()
def test_statistics_normalise_as_diffusers_does(randomize, record_difference):
    """diffusers writes std + 1e-5 where this package writes sqrt(var + 1e-5): equal for the same divisor."""
    reference, tokenizer = build_pair(randomize)
    generator = torch.Generator().manual_seed(6)
    mean = torch.randn(tokenizer.config.latent_shape, generator=generator)
    var = torch.rand(tokenizer.config.latent_shape, generator=generator) + 0.1
    tokenizer.set_statistics(mean, var)
    reference._latents_mean = mean
    reference._latents_std = torch.sqrt(var + 1e-5) - 1e-5
    latents = tokenizer.encode(photos(1), normalize=True)
    record_difference("normalised latent", latents, reference.encode(photos(1)).latent, 1e-4)
    theirs = reference.decode(latents).sample.clamp(0, 1)
    record_difference("decode", tokenizer.decode(latents, normalize=True), theirs, 1e-4)


@pytest.mark.parametrize("width", [4, 96, 320, 1152])
def test_sincos_table_equals_diffusers(width, record_difference):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    expected = embeddings.get_2d_sincos_pos_embed(width, 16, cls_token=True, extra_tokens=1)
    record_difference("table", sincos_positions(width, 16)[0], expected.float(), 1e-6)


@pytest.mark.parametrize("grid", [1, 4, 17])
def test_sincos_table_counts_whole_patches_at_every_grid(grid, record_difference):
    """MAE's table: positions are patch numbers, where diffusers rescales a grid other than 16 to 16."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    expected = embeddings.get_2d_sincos_pos_embed(32, grid, cls_token=True, extra_tokens=1, base_size=grid)
    record_difference("table", sincos_positions(32, grid)[0], expected.float(), 1e-6)


def test_unpatchify_puts_every_patch_where_it_belongs(tokenizer):
    decoder = tokenizer.decoder
    patches = torch.zeros(1, 16, 3 * 16 * 16)
    patches[0, 6] = torch.arange(3 * 16 * 16)  # row 1, column 2 of the 4x4 grid
    image = decoder._unpatchify(patches)
    cell = image[0, :, 16:32, 32:48]
    assert torch.equal(cell.permute(1, 2, 0).flatten(), patches[0, 6])
    assert image.sum() == cell.sum()


def test_last_layer_is_the_weight_before_the_pixels(tokenizer):
    assert tokenizer.decoder.last_layer is tokenizer.decoder.predict.weight
