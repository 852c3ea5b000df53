"""Configurations that cannot be built are refused by a sentence that names the fields."""

import pytest
import torch
from pydantic import ValidationError

from kernels.dispatch import Platform, choose_path
from model.config import (
    ENCODERS,
    IMAGENET_MEAN,
    PRESETS,
    DecoderConfig,
    EncoderConfig,
    FusionConfig,
    TokenizerConfig,
)
from model.networks.encoder import Encoder
from model.networks.fusion import Fusion


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: EncoderConfig(width=100, num_heads=12), ["width=100", "num_heads=12"]),
        (lambda: EncoderConfig(image_size=225), ["image_size=225", "patch_size=14"]),
        (lambda: EncoderConfig(widht=768), ["widht", "Extra inputs"]),
        (lambda: EncoderConfig(depth=0), ["depth", "greater than or equal to 1"]),
        (lambda: EncoderConfig(mlp="relu"), ["mlp", "'gelu', 'gelu_tanh' or 'swiglu'"]),
        (lambda: EncoderConfig(position_resize="nearest"), ["position_resize", "'bicubic'"]),
        (lambda: EncoderConfig(width=8, num_heads=2, mlp_ratio=0.1), ["mlp_ratio=0.1", "width=8"]),
        (
            lambda: EncoderConfig(width=30, num_heads=2, positions="sincos"),
            ["positions='sincos'", "width=30"],
        ),
        (lambda: FusionConfig(beta=1.5), ["beta", "less than or equal to 1"]),
        (lambda: FusionConfig(beta=float("nan")), ["beta"]),
        (lambda: EncoderConfig(layer_norm_eps=float("inf")), ["layer_norm_eps", "finite"]),
        (lambda: TokenizerConfig(name="x", pixel_mean=(0, 0, float("nan"))), ["pixel_mean.2", "finite"]),
        (lambda: TokenizerConfig(name="x", pixel_std=(1, 0, 1)), ["pixel_std.1", "greater than 0"]),
        (lambda: FusionConfig(routing="top1"), ["routing", "'energy' or 'softmax'"]),
        (lambda: FusionConfig(energy_eps=0), ["energy_eps", "greater than 0"]),
        (lambda: DecoderConfig(width=1150, num_heads=16), ["width=1150", "num_heads=16"]),
        (lambda: DecoderConfig(width=30, num_heads=2), ["width=30", "divisible by 4"]),
        (lambda: TokenizerConfig(name="x", image_size=224), ["image_size=224", "decoder.patch_size"]),
        (lambda: TokenizerConfig(name=""), ["name"]),
        (
            lambda: TokenizerConfig(
                name="x", encoder=EncoderConfig(depth=6), fusion=FusionConfig(num_layers=12)
            ),
            ["fusion.num_layers=12", "encoder.depth=6"],
        ),
        (
            lambda: TokenizerConfig(name="x", fusion=FusionConfig(mixer="cross_attention", num_heads=7)),
            ["encoder.width=768", "fusion.num_heads=7"],
        ),
    ],
)
def test_impossible_configuration_names_its_fields(build, named):
    with pytest.raises(ValidationError) as caught:
        build()
    assert all(words in str(caught.value) for words in named)


def test_configurations_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        PRESETS["mini"].encoder.width = 8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_named_after_themselves_and_survive_json(name):
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.image_size == 256
    assert TokenizerConfig.model_validate_json(preset.model_dump_json()) == preset


def test_full_size_preset_is_the_published_geometry():
    config = PRESETS["dinov2-b"]
    assert config.latent_shape == (768, 16, 16)
    assert config.encoder.num_prefix_tokens == 5
    assert config.fused_layers == tuple(range(1, 13))
    assert PRESETS["dinov2-b-h3072"].fusion.hidden_width == 3072


@pytest.mark.parametrize(("width", "depth", "heads"), [(384, 12, 6), (1024, 24, 16), (1536, 40, 24)])
def test_sizes_of_the_fusion_that_are_not_given_follow_the_encoder(width, depth, heads):
    encoder = {"width": width, "depth": depth, "num_heads": heads}
    for fusion in ({}, FusionConfig()):
        fitted = TokenizerConfig(name="x", encoder=encoder, fusion=fusion)
        sizes = (fitted.fusion.num_layers, fitted.fusion.hidden_width, fitted.fusion.num_heads)
        assert sizes == (depth, 2 * width, heads)
    assert TokenizerConfig(name="x", encoder=encoder) == fitted
    given = TokenizerConfig(name="x", encoder=encoder, fusion={"num_layers": 3, "hidden_width": 64})
    assert (given.fusion.num_layers, given.fusion.hidden_width) == (3, 64)
    assert given.fused_layers == (depth - 2, depth - 1, depth)


def test_a_fusion_says_nothing_where_the_encoder_is_at_fault():
    with pytest.raises(ValidationError) as caught:
        TokenizerConfig(name="x", encoder={"depth": 0}, fusion={})
    assert [error["loc"] for error in caught.value.errors()] == [("encoder", "depth")]


def test_configurations_written_before_there_were_families_are_dinov2_with_registers():
    older = {"width": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0, "patch_size": 14}
    older |= {"image_size": 224, "num_registers": 4, "position_grid": 37, "layer_norm_eps": 1e-6}
    config = EncoderConfig.model_validate(older)
    assert config == PRESETS["mini"].encoder
    assert (config.mlp, config.layer_scale, config.class_token) == ("gelu", True, True)
    assert (config.positions, config.position_resize) == ("learned", "bicubic_antialias")


@pytest.mark.parametrize("name", ENCODERS)
def test_named_encoders_have_their_published_sizes(name):
    config = ENCODERS[name]
    assert config.grid == 16
    size = {"small": 22, "base": 86, "large": 304, "so400m": 414, "giant": 1137}
    millions = next(count for word, count in size.items() if word in name)
    with torch.device("meta"):
        found = sum(p.numel() for p in Encoder(config).parameters()) / 1e6
    assert found == pytest.approx(millions, rel=0.02)
    assert config.mlp_width == {1152: 4304, 1536: 4096}.get(config.width, 4 * config.width)


@pytest.mark.parametrize("name", PRESETS)
def test_fusions_of_all_presets_run_in_the_kernels_and_folded(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        problem = Fusion(preset.fusion, preset.encoder).problem(torch.bfloat16)
    assert choose_path("auto", problem, Platform("cuda", (9, 0))).path == "triton"
    assert choose_path("auto", problem, Platform("cpu")).path == "folded"


def test_families_bring_their_pixel_statistics():
    for name, preset in PRESETS.items():
        mean = (0.5, 0.5, 0.5) if name.startswith("siglip2") else IMAGENET_MEAN
        assert preset.pixel_mean == mean


def test_fused_layers_are_the_deepest():
    config = TokenizerConfig(name="x", fusion=FusionConfig(num_layers=3))
    assert config.fused_layers == (10, 11, 12)
    assert TokenizerConfig(name="x", fusion=None).fused_layers == (12,)
