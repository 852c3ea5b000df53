"""Every family of encoders against its class in transformers, by its own configuration and weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.reference import token_norm
from model.config import (
    IMAGENET_MEAN,
    SIGLIP_MEAN,
    SIGLIP_STD,
    DecoderConfig,
    EncoderConfig,
    FusionConfig,
    TokenizerConfig,
)
from model.interop.transformers_config import (
    encoder_config_from_transformers,
    pixel_statistics_from_transformers,
)
from model.interop.transformers_weights import encoder_state_from_transformers, encoder_state_to_transformers
from model.networks.encoder import Encoder
from model.tokenizer import Tokenizer

WIDTH, DEPTH, HEADS = 48, 3, 3
TOLERANCE = 1e-5
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
# Model class, fields of its configuration beside the sizes, patch side, side of the position table.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "dinov2": ("Dinov2", {}, 14, 6),
    "dinov2 swiglu": ("Dinov2", {"use_swiglu_ffn": True}, 14, 6),
    "dinov2 with registers": ("Dinov2WithRegisters", {"num_register_tokens": 4}, 14, 6),
    "dinov2 with registers swiglu": ("Dinov2WithRegisters", {"use_swiglu_ffn": True}, 14, 6),
    "siglip": ("SiglipVision", {"intermediate_size": 101}, 16, 4),
    "mae": ("ViTMAE", {"intermediate_size": 96, "mask_ratio": 0.0}, 16, 4),
}
INPUTS = [(4, 4), (6, 6), (3, 3), (4, 6), (8, 2)]  # rows and columns of patches


def build_reference(name: str, randomize: Callable[..., None]) -> Any:
    transformers = pytest.importorskip("transformers")
    kind, fields, patch, grid = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **fields, patch_size=patch, image_size=patch * grid
    )
    reference = getattr(transformers, f"{kind}Model")(config).eval()
    randomize(reference)
    return reference


def build_encoder(reference: Any, image_size: int | None = None) -> Encoder:
    config = encoder_config_from_transformers(reference.config.to_dict(), image_size)
    encoder = Encoder(config).eval()
    encoder.load_state_dict(encoder_state_from_transformers(reference.state_dict(), config))
    return encoder


def reference_states(name: str, reference: Any, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Output of every block with its prefix tokens, and the last hidden state behind the final norm."""
    options: dict[str, Any] = {}
    if name in ("siglip", "mae"):
        options["interpolate_pos_encoding"] = True
    if name == "mae":
        num_patches = (pixels.shape[-2] // 16) * (pixels.shape[-1] // 16)
        options["noise"] = torch.arange(num_patches).expand(len(pixels), -1)
    output = reference(pixels, output_hidden_states=True, **options)
    assert len(output.hidden_states) == DEPTH + 1
    return list(output.hidden_states[1:]), output.last_hidden_state


def pixels_of(rows: int, columns: int, patch: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, rows * patch, columns * patch, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), INPUTS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_hidden_state_equals_transformers(name, rows, columns, randomize, record_difference):
    reference = build_reference(name, randomize)
    encoder = build_encoder(reference)
    pixels = pixels_of(rows, columns, FAMILIES[name][2])
    expected, _ = reference_states(name, reference, pixels)
    ours = encoder.hidden_states(pixels)
    for number, (state, theirs) in enumerate(zip(ours, expected, strict=True), 1):
        record_difference(f"{name} block {number}", state, theirs, TOLERANCE)
        assert theirs.std() > 0.1
    patches = encoder(pixels)
    assert [tuple(state.shape) for state in patches] == [(2, rows * columns, WIDTH)] * DEPTH


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_another_way_to_resize_positions_is_noticed(name, randomize):
    """The control: the families' ways differ by far more than the tolerance."""
    reference = build_reference(name, randomize)
    encoder = build_encoder(reference)
    resize = "bicubic" if encoder.config.position_resize == "bicubic_antialias" else "bicubic_antialias"
    encoder.config = encoder.config.model_copy(update={"position_resize": resize})
    pixels = pixels_of(3, 3, FAMILIES[name][2])
    expected, _ = reference_states(name, reference, pixels)
    assert (encoder.hidden_states(pixels)[0] - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_base_latent_is_the_reference_without_its_norms_affine_part(name, randomize, record_difference):
    reference = build_reference(name, randomize)
    norm = reference.post_layernorm if name == "siglip" else reference.layernorm
    norm.weight = norm.bias = None  # as RAE removes them
    encoder = build_encoder(reference)
    pixels = pixels_of(4, 4, FAMILIES[name][2])
    _, expected = reference_states(name, reference, pixels)
    base = token_norm(encoder(pixels)[-1], encoder.config.layer_norm_eps)
    record_difference(name, base, expected[:, encoder.config.num_prefix_tokens :], TOLERANCE)


@torch.no_grad()
def test_naflex_siglip2_equals_transformers(randomize, record_difference):
    """SigLIP 2 that takes patches instead of images: a matrix embeds them, positions shrink bilinearly."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Siglip2VisionConfig(**SIZES, intermediate_size=96, patch_size=8, num_patches=36)
    reference = transformers.Siglip2VisionModel(config).eval()
    randomize(reference)
    encoder = build_encoder(reference)
    assert encoder.config.image_size == 48
    for rows, columns in [(6, 6), (4, 4), (3, 8)]:
        pixels = pixels_of(rows, columns, 8)
        cells = pixels.unflatten(3, (columns, 8)).unflatten(2, (rows, 8))  # [B, 3, rows, 8, columns, 8]
        patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        mask = torch.ones(2, rows * columns)
        shapes = torch.tensor([[rows, columns]] * 2)
        expected = reference(patches, mask, shapes, output_hidden_states=True).hidden_states[1:]
        for number, (ours, theirs) in enumerate(zip(encoder(pixels), expected, strict=True), 1):
            record_difference(f"naflex {rows}x{columns} block {number}", ours, theirs, TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "patch", "size"), [("dinov2", 14, 56), ("siglip2", 16, 64), ("mae", 16, 64)]
)
@torch.no_grad()
def test_base_latents_equal_autoencoder_rae(kind, patch, size, randomize, record_difference, monkeypatch):
    """Its encoders: tables of 37, 16 and 14 patches a side, MLPs of 3072, plain norms."""
    transformers, diffusers = pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    if not hasattr(transformers.SiglipVisionModel, "vision_model"):
        # transformers 5 merged the inner module that diffusers reaches for into this one.
        monkeypatch.setattr(
            transformers.SiglipVisionModel, "vision_model", property(lambda m: m), raising=False
        )
    rae = diffusers.AutoencoderRAE(
        encoder_type=kind, encoder_hidden_size=128, encoder_patch_size=patch, encoder_num_hidden_layers=2,
        encoder_input_size=size, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    ).eval()  # fmt: skip
    randomize(rae.encoder)
    encoder = build_encoder(rae.encoder, size)
    assert encoder.config.position_grid == {"dinov2": 37, "siglip2": 16, "mae": 14}[kind]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    pixels = (images - rae.encoder_mean) / rae.encoder_std
    base = token_norm(encoder(pixels)[-1], encoder.config.layer_norm_eps)
    expected = rae.encode(images).latent * (1 + 1e-5)  # it divides by a deviation of 1, plus eps
    record_difference(kind, base, expected.flatten(2).transpose(1, 2), TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_go_back_to_transformers_unchanged(name, randomize):
    reference = build_reference(name, randomize)
    encoder = build_encoder(reference)
    foreign = encoder_state_to_transformers(encoder.state_dict(), encoder.config)
    theirs = reference.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in foreign.items())
    left_out = {key.split(".")[0] for key in theirs.keys() - foreign.keys() if "mask_token" not in key}
    assert left_out == ({"head", "post_layernorm"} if name == "siglip" else {"layernorm"})


@torch.no_grad()
def test_the_bundled_encoder_is_transformers_dinov2_with_registers(record_difference):
    """A checkpoint from before there were families means what it meant."""
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load("mini").encoder
    reference = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=192, num_attention_heads=3, patch_size=14, image_size=518
        )
    ).eval()
    missing, unexpected = reference.load_state_dict(
        encoder_state_to_transformers(ours.state_dict(), ours.config), strict=False
    )
    assert set(missing) == {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
    assert not unexpected
    pixels = pixels_of(16, 16, 14)
    expected = reference(pixels, output_hidden_states=True).hidden_states[1:]
    for number, (state, theirs) in enumerate(zip(ours.hidden_states(pixels), expected, strict=True), 1):
        record_difference(f"mini block {number}", state, theirs, 1e-4)


@pytest.mark.parametrize("mixer", ["experts", "cross_attention"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_of_every_family_encodes_saves_and_loads(name, mixer, randomize, tmp_path):
    reference = build_reference(name, randomize)
    encoder = build_encoder(reference, 4 * FAMILIES[name][2])
    mean, deviation = pixel_statistics_from_transformers(reference.config.to_dict())
    config = TokenizerConfig(
        name="tiny",
        image_size=64,
        encoder=encoder.config,
        fusion=FusionConfig(mixer=mixer),
        decoder=DecoderConfig(width=32, depth=1, num_heads=2, mlp_width=32),
        pixel_mean=mean,
        pixel_std=deviation,
    )
    assert config.fused_layers == (1, 2, 3)
    assert mean == (SIGLIP_MEAN if name == "siglip" else IMAGENET_MEAN)
    tokenizer = Tokenizer(config).eval()
    randomize(tokenizer)
    tokenizer.encoder.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tokenizer.save(tmp_path / "checkpoint")
    loaded = Tokenizer.load(tmp_path / "checkpoint")
    assert loaded.config == config
    assert loaded.fusion_path == ("folded" if mixer == "experts" else "reference")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for latent in ("enriched", "base"):
        latents = tokenizer.encode(images, latent)
        assert latents.shape == (2, WIDTH, 4, 4)
        torch.testing.assert_close(loaded.encode(images, latent), latents, atol=1e-5, rtol=0)
    assert loaded.reconstruct(images).shape == images.shape


def test_fixed_positions_are_transformers_and_take_no_gradient():
    transformers = pytest.importorskip("transformers")
    reference = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES, patch_size=16, image_size=64))
    encoder = Encoder(encoder_config_from_transformers(reference.config.to_dict()))
    # Construction of the whole model may leave zeros, to be loaded over; ask the part itself.
    embeddings = reference.embeddings
    for tensor in (embeddings.patch_embeddings.projection, *embeddings.parameters()):
        tensor._is_hf_initialized = False
    embeddings.initialize_weights()
    expected = embeddings.position_embeddings
    assert expected.any()
    torch.testing.assert_close(encoder.positions, expected.detach(), atol=1e-6, rtol=0)
    encoder.freeze().unfreeze()
    assert "positions" in encoder.state_dict()
    assert "positions" not in dict(encoder.named_parameters())


@pytest.mark.parametrize("fields", [{"mlp": "swiglu"}, {"class_token": False, "num_registers": 0}])
def test_gradients_reach_every_parameter(fields, randomize):
    encoder = Encoder(EncoderConfig(width=32, depth=2, num_heads=2, image_size=56, position_grid=5, **fields))
    randomize(encoder)
    encoder.hidden_states(torch.randn(2, 3, 56, 56))[-1].square().mean().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ([] if encoder.config.num_registers else ["register_tokens"])  # of no elements


def test_siglip_statistics_are_those_of_its_processor():
    transformers = pytest.importorskip("transformers")
    processor = transformers.SiglipImageProcessorPil()
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (SIGLIP_MEAN, SIGLIP_STD)
