"""Whole tokenizers with random weights, ours and diffusers', and their encode and decode as calls.

Shape legend: B batch, C latent width, h w latent grid, S image side.
"""

import copy
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.counts import (
    FusionSize,
    linear_operations,
    needed_operations,
    transformer_operations,
)
from benchmarks.harness.runner import Setup, UnavailableError
from benchmarks.harness.timing import Call
from kernels.dispatch import FusionPath, FusionSetting, choose_path, detect_platform
from model.config import TokenizerConfig
from model.cuda_graphs import CapturedBuckets
from model.interop.rae_decoder_weights import decoder_state_from_diffusers
from model.interop.transformers_weights import encoder_state_from_transformers
from model.networks.fusion import Fusion
from model.networks.linear import pack_linear_maps
from model.tokenizer import LatentKind, Tokenizer

NUM_CHECKED_IMAGES = 2


@dataclass(frozen=True)
class Inputs:
    """Images and latents, on the device and in its dtype."""

    images: Tensor  # [B, 3, S, S] in [0, 1]
    latents: Tensor  # [B, C, h, w]

    def first(self, num_images: int) -> "Inputs":
        return Inputs(self.images[:num_images], self.latents[:num_images])


@dataclass(frozen=True)
class Models:
    """One set of random weights, in every form that is timed."""

    tokenizer: Tokenizer
    """On the device, in its dtype; the fusion by its definition."""
    fusion: Fusion
    """The same fusion in float32 on the CPU, to prepare others from."""
    diffusers: Any
    """``AutoencoderRAE`` with the same encoder and decoder; None where it is not timed."""
    inputs: Inputs
    expected: Mapping[str, Tensor]
    """Base and enriched latents and decoded pixels of the first images, in float32 by the definition."""
    prepared: dict[FusionPath, Tokenizer] = field(default_factory=dict)
    """Tokenizers with a fusion prepared for inference: folding takes seconds, and is done once per path."""


@dataclass(frozen=True)
class Implementation:
    """One way to encode or decode: how it is made ready, and its result."""

    build: Callable[[Models, Inputs, Setup], Call]
    gives: str
    """``base``, ``enriched`` or ``pixels``."""
    fusion: FusionSetting | None = None
    """Which fusion it runs, if any."""
    base: str | None = "encode_base"
    """The same without fusion, that its time is compared with; None for a decode."""
    needs_cuda: bool = False


def build_models(
    config: TokenizerConfig, setup: Setup, max_batch: int, with_diffusers: bool, seed: int
) -> Models:
    """Random weights and inputs, and the expected results."""
    torch.manual_seed(seed)
    diffusers_model = _build_diffusers(config) if with_diffusers else None
    tokenizer = Tokenizer(config)
    if diffusers_model is not None:
        states = (diffusers_model.encoder.state_dict(), diffusers_model.decoder.state_dict())
        tokenizer.encoder.load_state_dict(encoder_state_from_transformers(states[0], config.encoder))
        tokenizer.decoder.load_state_dict(decoder_state_from_diffusers(states[1]))
        diffusers_model.to(setup.device, setup.dtype)
    fusion = _randomize(tokenizer.fusion)
    for part in (tokenizer.encoder, fusion, tokenizer.decoder):
        part.freeze()
    original = copy.deepcopy(fusion)
    tokenizer.to(setup.device).eval()
    inputs = _random_inputs(config, setup, max_batch)
    expected = _expected(tokenizer, inputs.first(NUM_CHECKED_IMAGES))
    tokenizer.to(setup.dtype)
    pack_linear_maps(tokenizer)  # as `Tokenizer.load` does
    return Models(tokenizer, original, diffusers_model, inputs, expected)


def why_no_diffusers() -> str | None:
    """Why diffusers cannot be timed; None where it can be tried."""
    missing = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def diffusers_version() -> str:
    """Empty where diffusers is not installed."""
    return "" if importlib.util.find_spec("diffusers") is None else importlib.metadata.version("diffusers")


def fusion_path(config: TokenizerConfig, setting: FusionSetting | None, setup: Setup) -> str:
    """Which implementation of the fusion a setting leads to, as results name it.

    Raises:
        UnavailableError: it cannot run here; says why.
    """
    if setting is None or config.fusion is None:
        return "none"
    platform = detect_platform(setup.device)
    if setting == "triton" and platform.is_interpreted:
        raise UnavailableError("Triton's interpreter (TRITON_INTERPRET) is no implementation to time")
    with torch.device("meta"):
        problem = Fusion(config.fusion, config.encoder).problem(setup.dtype)
    try:
        return choose_path(setting, problem, platform).path
    except ValueError as exc:
        raise UnavailableError(str(exc)) from exc


def encode_operations(config: TokenizerConfig) -> int:
    """Products of the encoder on one image: patch embedding and blocks."""
    encoder = config.encoder
    num_patches = encoder.grid**2
    embed = linear_operations(num_patches, 3 * encoder.patch_size**2, encoder.width)
    num_tokens = encoder.num_prefix_tokens + num_patches
    # Of two matrices of this width; SwiGLU has a third.
    mlp_width = encoder.mlp_width * 3 // 2 if encoder.mlp == "swiglu" else encoder.mlp_width
    return embed + transformer_operations(num_tokens, encoder.width, mlp_width, encoder.depth)


def fusion_operations(config: TokenizerConfig) -> int:
    """The fewest that the fusion needs on one image, unfolded or folded."""
    assert config.fusion is not None
    num_tokens, fusion = config.encoder.grid**2, config.fusion
    size = FusionSize(1, num_tokens, fusion.num_layers, config.encoder.width, fusion.hidden_width, 1)
    return needed_operations(size)


def decode_operations(config: TokenizerConfig) -> int:
    """Products of the decoder on one image: embedding, blocks and prediction of pixels."""
    decoder, num_tokens = config.decoder, config.encoder.grid**2
    embed = linear_operations(num_tokens, config.encoder.width, decoder.width)
    predict = linear_operations(num_tokens, decoder.width, 3 * decoder.patch_size**2)
    blocks = transformer_operations(1 + num_tokens, decoder.width, decoder.mlp_width, decoder.depth)
    return embed + blocks + predict


def _build_diffusers(config: TokenizerConfig) -> Any:
    diffusers = importlib.import_module("diffusers")
    diffusers.utils.logging.set_verbosity_error()  # it warns of every change of dtype
    encoder, decoder = config.encoder, config.decoder
    return diffusers.AutoencoderRAE(
        encoder_hidden_size=encoder.width,
        encoder_patch_size=encoder.patch_size,
        encoder_num_hidden_layers=encoder.depth,
        encoder_input_size=encoder.image_size,
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=decoder.mlp_width,
        patch_size=decoder.patch_size,
    ).eval()


@torch.no_grad()
def _randomize(fusion: Fusion | None) -> Fusion:
    """Give a fresh fusion what training gives it: no two experts alike, shifts, weights of both signs."""
    assert fusion is not None
    for name, parameter in fusion.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith(("norm.weight", "norm.bias")):
            parameter.add_(0.3 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return fusion


def _random_inputs(config: TokenizerConfig, setup: Setup, batch: int) -> Inputs:
    """Images in [0, 1], and latents of unit variance, as LN_bb leaves them."""
    side = config.image_size
    images, latents = torch.rand(batch, 3, side, side), torch.randn(batch, *config.latent_shape)
    return Inputs(images.to(setup.device, setup.dtype), latents.to(setup.device, setup.dtype))


def _expected(tokenizer: Tokenizer, inputs: Inputs) -> dict[str, Tensor]:
    return {
        "base": tokenizer.encode(inputs.images, latent="base"),
        "enriched": tokenizer.encode(inputs.images),
        "pixels": tokenizer.decode(inputs.latents),
    }


def _with_fusion(models: Models, setting: FusionSetting, setup: Setup) -> Tokenizer:
    """The same encoder and decoder with a fusion prepared for inference."""
    path = choose_path(setting, models.fusion.problem(setup.dtype), detect_platform(setup.device)).path
    if path not in models.prepared:
        fusion = copy.deepcopy(models.fusion)
        fusion.prepare(path, setup.device, setup.dtype)
        tokenizer = Tokenizer.on_meta(models.tokenizer.config)
        tokenizer.encoder, tokenizer.decoder = models.tokenizer.encoder, models.tokenizer.decoder
        tokenizer.fusion = fusion.to(setup.device, setup.dtype)
        models.prepared[path] = tokenizer.eval()
    return models.prepared[path]


def _encode_base(models: Models, inputs: Inputs, setup: Setup) -> Call:
    return lambda: models.tokenizer.latents(inputs.images, "base")


def _encode_enriched(setting: FusionSetting) -> Callable[[Models, Inputs, Setup], Call]:
    def build(models: Models, inputs: Inputs, setup: Setup) -> Call:
        tokenizer = _with_fusion(models, setting, setup)
        return lambda: tokenizer.latents(inputs.images)

    return build


def _encode_compiled(latent: LatentKind) -> Callable[[Models, Inputs, Setup], Call]:
    def build(models: Models, inputs: Inputs, setup: Setup) -> Call:
        encode = torch.compile(_with_fusion(models, "auto", setup).latents, dynamic=False)
        return lambda: encode(inputs.images, latent)

    return build


def _encode_graph(latent: LatentKind, compiled: bool = False) -> Callable[[Models, Inputs, Setup], Call]:
    def build(models: Models, inputs: Inputs, setup: Setup) -> Call:
        tokenizer = _with_fusion(models, "auto", setup)
        tokenizer = _compiled(tokenizer) if compiled else tokenizer
        encode = CapturedBuckets(
            lambda images: tokenizer.latents(images, latent), inputs.images, (len(inputs.images),)
        )
        return lambda: encode(inputs.images)

    return build


def _decode(models: Models, inputs: Inputs, setup: Setup) -> Call:
    return lambda: models.tokenizer.pixels(inputs.latents)


def _decode_graph(compiled: bool = False) -> Callable[[Models, Inputs, Setup], Call]:
    def build(models: Models, inputs: Inputs, setup: Setup) -> Call:
        tokenizer = _compiled(models.tokenizer) if compiled else models.tokenizer
        decode = CapturedBuckets(tokenizer.pixels, inputs.latents, (len(inputs.latents),))
        return lambda: decode(inputs.latents)

    return build


def _compiled(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose blocks are compiled, as DRORAE_COMPILE_BLOCKS has them."""
    return copy.deepcopy(tokenizer).compile_blocks()


def _diffusers_encode(models: Models, inputs: Inputs, setup: Setup) -> Call:
    return lambda: models.diffusers.encode(inputs.images).latent


def _diffusers_decode(models: Models, inputs: Inputs, setup: Setup) -> Call:
    return lambda: models.diffusers.decode(inputs.latents).sample


# Another way to encode or decode is one entry here, and a line in the help and the README.
IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "encode_base": Implementation(_encode_base, "base"),
    "encode_reference": Implementation(_encode_enriched("reference"), "enriched", "reference"),
    "encode_folded": Implementation(_encode_enriched("folded"), "enriched", "folded"),
    "encode_triton": Implementation(_encode_enriched("triton"), "enriched", "triton"),
    "encode_base_compiled": Implementation(_encode_compiled("base"), "base", base="encode_base_compiled"),
    "encode_compiled": Implementation(
        _encode_compiled("enriched"), "enriched", "auto", base="encode_base_compiled"
    ),
    "encode_base_graph": Implementation(
        _encode_graph("base"), "base", base="encode_base_graph", needs_cuda=True
    ),
    "encode_graph": Implementation(
        _encode_graph("enriched"), "enriched", "auto", base="encode_base_graph", needs_cuda=True
    ),
    "encode_blocks_graph": Implementation(
        _encode_graph("enriched", compiled=True),
        "enriched",
        "auto",
        base="encode_base_graph",
        needs_cuda=True,
    ),
    "diffusers_encode": Implementation(_diffusers_encode, "base"),
    "decode": Implementation(_decode, "pixels", base=None),
    "decode_graph": Implementation(_decode_graph(), "pixels", base=None, needs_cuda=True),
    "decode_blocks_graph": Implementation(_decode_graph(compiled=True), "pixels", base=None, needs_cuda=True),
    "diffusers_decode": Implementation(_diffusers_decode, "pixels", base=None),
}
