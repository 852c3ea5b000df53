"""A tokenizer small enough for a unit test, with weights that leave nothing trivially zero."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig
from model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def _tiny_config(**fusion: Any) -> TokenizerConfig:
    """4x4 latent grid of width 32 from four blocks; images of 64 pixels."""
    fields: dict[str, Any] = {"num_layers": 4, "hidden_width": 24, "num_heads": 2} | fusion
    return TokenizerConfig(
        name="tiny",
        image_size=64,
        encoder=EncoderConfig(width=32, depth=4, num_heads=2, image_size=56, position_grid=5),
        fusion=FusionConfig(**fields),
        decoder=DecoderConfig(width=48, depth=2, num_heads=2, mlp_width=40),
    )


def _randomize(module: nn.Module, seed: int = 0) -> None:
    """Matrices keep their inputs' scale; gains, biases, tokens and positions are all far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_gain = name.endswith(("weight", "gain", "lambda1"))
                parameter.copy_(0.6 + 0.2 * noise if is_gain else 0.2 * noise)
            elif "token" in name or "position" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TokenizerConfig]:
    """Builds the tiny configuration; keyword arguments are fields of its fusion."""
    return _tiny_config


@pytest.fixture(scope="session")
def randomize() -> Callable[..., None]:
    """Fills a module's parameters from a seed."""
    return _randomize


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Random tiny tokenizer in eval mode, without statistics."""
    tokenizer = Tokenizer(_tiny_config())
    _randomize(tokenizer)
    return tokenizer.eval()


@pytest.fixture
def images() -> Tensor:
    """[2, 3, 64, 64] in [0, 1]."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def record_difference() -> Callable[..., None]:
    """Logs the largest absolute difference (``--log-cli-level=INFO`` shows it), held to a tolerance."""

    def check(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        assert ours.shape == theirs.shape
        difference = (ours - theirs).abs().max().item()
        logger.info("%s: max abs difference %.2e", name, difference)
        assert difference <= tolerance, f"{name}: {difference:.2e} over {tolerance:.0e}"

    return check


ENCODER_TYPES = {
    "dinov2": {"encoder_patch_size": 14, "encoder_input_size": 56},
    "siglip2": {"encoder_patch_size": 16, "encoder_input_size": 64},
    "mae": {"encoder_patch_size": 16, "encoder_input_size": 64},
}


@pytest.fixture
def siglip_as_diffusers_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 dropped the level ``vision_model``, which diffusers 0.42 still reaches through."""
    transformers = pytest.importorskip("transformers")
    whole = property(lambda model: model)
    if "vision_model" not in dir(transformers.SiglipVisionModel):
        monkeypatch.setattr(transformers.SiglipVisionModel, "vision_model", whole, raising=False)


@pytest.fixture
def make_autoencoder(siglip_as_diffusers_knows_it: None) -> Callable[..., Any]:
    """Builds a random AutoencoderRAE of width 64, three blocks and a 4x4 grid; images of 64 pixels."""
    diffusers = pytest.importorskip("diffusers")

    def make(encoder_type: str = "dinov2", **fields: Any) -> Any:
        sizes = {
            "encoder_hidden_size": 64,
            "encoder_num_hidden_layers": 3,
            "decoder_hidden_size": 48,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 40,
        }
        options = {**sizes, **ENCODER_TYPES[encoder_type], **fields}
        model = diffusers.AutoencoderRAE(encoder_type=encoder_type, **options).eval()
        _randomize(model)
        return model

    return make
