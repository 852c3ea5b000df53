"""Configurations that cannot be built are refused by a sentence that names the fields."""

import pytest
from pydantic import ValidationError

from model.config import PRESETS, DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: EncoderConfig(width=100, num_heads=12), ["width=100", "num_heads=12"]),
        (lambda: EncoderConfig(image_size=225), ["image_size=225", "patch_size=14"]),
        (lambda: EncoderConfig(widht=768), ["widht", "Extra inputs"]),
        (lambda: EncoderConfig(depth=0), ["depth", "greater than or equal to 1"]),
        (lambda: FusionConfig(beta=1.5), ["beta", "less than or equal to 1"]),
        (lambda: FusionConfig(beta=float("nan")), ["beta"]),
        (lambda: FusionConfig(routing="top1"), ["routing", "'energy' or 'softmax'"]),
        (lambda: FusionConfig(energy_eps=0), ["energy_eps", "greater than 0"]),
        (lambda: DecoderConfig(width=1150, num_heads=16), ["width=1150", "num_heads=16"]),
        (lambda: DecoderConfig(width=30, num_heads=2), ["width=30", "divisible by 4"]),
        (lambda: TokenizerConfig(name="x", image_size=224), ["image_size=224", "decoder.patch_size"]),
        (lambda: TokenizerConfig(name=""), ["name"]),
        (
            lambda: TokenizerConfig(name="x", encoder=EncoderConfig(depth=6)),
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


def test_fused_layers_are_the_deepest():
    config = TokenizerConfig(name="x", fusion=FusionConfig(num_layers=3))
    assert config.fused_layers == (10, 11, 12)
    assert TokenizerConfig(name="x", fusion=None).fused_layers == (12,)
