"""Exports, loaded by the real AutoencoderRAE and by the fusion's own loader."""

import errno
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import model.interop.to_diffusers
from model.config import DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig
from model.errors import CheckpointError
from model.interop.from_diffusers import import_autoencoder
from model.interop.to_diffusers import export_diffusers
from model.interop.transformers_config import encoder_config_from_transformers
from model.tokenizer import Tokenizer

ENCODERS = {
    "dinov2": EncoderConfig(width=64, depth=3, num_heads=1, image_size=224),
    "siglip2": encoder_config_from_transformers(
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "intermediate_size": 3072,
            "image_size": 256,
            "patch_size": 16,
        }
    ),
    "mae": encoder_config_from_transformers(
        {
            "model_type": "vit_mae",
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "intermediate_size": 3072,
            "image_size": 224,
            "patch_size": 16,
        },
        256,
    ),
}
DECODER = DecoderConfig(width=48, depth=2, num_heads=2, mlp_width=40)
LATENT_SHAPE = (64, 16, 16)


def make_tokenizer(
    randomize: Any, encoder: str = "dinov2", with_statistics: bool = True, **fusion: Any
) -> Tokenizer:
    """Random, with a 16x16 grid of width 64 and images of 256 pixels."""
    fusion_config = FusionConfig(num_layers=2, hidden_width=24, num_heads=2, **fusion) if fusion else None
    config = TokenizerConfig(
        name="small",
        encoder=ENCODERS[encoder],
        fusion=fusion_config,
        decoder=DECODER,
        pixel_mean=(0.5, 0.4, 0.3),
    )
    tokenizer = Tokenizer(config).eval()
    randomize(tokenizer)
    if with_statistics:
        generator = torch.Generator().manual_seed(3)
        mean = torch.randn(LATENT_SHAPE, generator=generator)
        tokenizer.set_statistics(mean, torch.rand(LATENT_SHAPE, generator=generator) + 0.01)
    return tokenizer


def load(folder: Path) -> Any:
    """The exported folder by diffusers, which must miss nothing and ignore nothing."""
    diffusers = pytest.importorskip("diffusers")
    reference, report = diffusers.AutoencoderRAE.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return reference.eval()


def load_loader(folder: Path) -> Any:
    """The Python file of the folder itself, not this package's."""
    spec = importlib.util.spec_from_file_location("exported_fusion", folder / "drorae_fusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos() -> Tensor:
    """[2, 3, 256, 256] in [0, 1]."""
    return torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("siglip_as_diffusers_knows_it")
@pytest.mark.parametrize("encoder", ["dinov2", "siglip2", "mae"])
@torch.no_grad()
def test_diffusers_gives_our_numbers(encoder, randomize, photos, tmp_path, record_difference):
    tokenizer = make_tokenizer(randomize, encoder)
    export_diffusers(tokenizer, tmp_path / "out")
    reference = load(tmp_path / "out")
    latents = tokenizer.encode(photos, normalize=True)
    record_difference(
        "base latents",
        tokenizer.encode(photos),
        reference._denormalize_latents(reference.encode(photos).latent),
        1e-4,
    )
    record_difference("normalised latents", latents, reference.encode(photos).latent, 1e-4)
    decoded = reference.decode(latents).sample
    record_difference("pixels", tokenizer.decode(latents, normalize=True), decoded.clamp(0, 1), 1e-4)


@torch.no_grad()
def test_without_statistics_diffusers_leaves_latents_alone(randomize, photos, tmp_path, record_difference):
    tokenizer = make_tokenizer(randomize, with_statistics=False)
    export_diffusers(tokenizer, tmp_path / "out")
    reference = load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["latents_mean"] is None
    latents = tokenizer.encode(photos)
    record_difference("latents", latents, reference.encode(photos).latent, 1e-5)
    record_difference("pixels", tokenizer.decode(latents), reference.decode(latents).sample.clamp(0, 1), 1e-4)
    assert not import_autoencoder(tmp_path / "out", "x").tokenizer.has_statistics


@torch.no_grad()
def test_the_bundled_mini_exports_with_its_fusion(tmp_path, record_difference):
    tokenizer = Tokenizer.load("mini", fusion="reference")
    photos = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    names = export_diffusers(tokenizer, tmp_path / "out")
    weights = "diffusion_pytorch_model.safetensors"
    beside = ["drorae_fusion.py", "fusion.json", "fusion.safetensors"]
    assert names == sorted(["README.md", "config.json", weights, *beside])
    reference = load(tmp_path / "out")
    base = reference._denormalize_latents(reference.encode(photos).latent)
    record_difference("base latents", tokenizer.encode(photos, "base"), base, 1e-4)
    latents = load_loader(tmp_path / "out").load_fusion(tmp_path / "out").encode(reference, photos)
    normalize = tokenizer.has_statistics
    record_difference("enriched latents", tokenizer.encode(photos, normalize=normalize), latents, 1e-4)
    pixels = reference.decode(latents).sample.clamp(0, 1)
    record_difference("reconstruction", tokenizer.reconstruct(photos), pixels, 1e-4)


FUSIONS = [
    {"beta": 0.2},
    {"beta": 0.0},
    {"routing": "softmax"},
    {"correction": "replace"},
    {"router_input_norm": False},
    {"mixer": "cross_attention"},
]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: "{}={}".format(*next(iter(fusion.items()))))
@torch.no_grad()
def test_the_loader_gives_our_enriched_latents(fusion, randomize, photos, tmp_path, record_difference):
    tokenizer = make_tokenizer(randomize, **fusion)
    export_diffusers(tokenizer, tmp_path / "out")
    reference = load(tmp_path / "out")
    loaded = load_loader(tmp_path / "out").load_fusion(tmp_path / "out").to(torch.float32)
    expected = tokenizer.encode(photos, normalize=True)
    record_difference("enriched", loaded.encode(reference, photos), expected, 1e-4)
    if fusion.get("beta") != 0:
        assert (tokenizer.encode(photos, "base") - tokenizer.encode(photos)).abs().max() > 0.01


@pytest.mark.usefixtures("siglip_as_diffusers_knows_it")
@pytest.mark.parametrize("encoder", ["siglip2", "mae"])
@torch.no_grad()
def test_the_loader_knows_every_encoder(encoder, randomize, photos, tmp_path, record_difference):
    tokenizer = make_tokenizer(randomize, encoder, beta=0.5)
    export_diffusers(tokenizer, tmp_path / "out")
    loaded = load_loader(tmp_path / "out").load_fusion(tmp_path / "out")
    latents = loaded.encode(load(tmp_path / "out"), photos)
    record_difference("enriched", latents, tokenizer.encode(photos, normalize=True), 1e-4)


@torch.no_grad()
def test_an_export_imports_as_what_it_was(randomize, photos, tmp_path):
    tokenizer = make_tokenizer(randomize, beta=0.2)
    export_diffusers(tokenizer, tmp_path / "out")
    again = import_autoencoder(tmp_path / "out", "small").tokenizer
    assert again.config == tokenizer.config
    for part, tensors in tokenizer.parts().items():
        for name, tensor in tensors.items():
            tolerance = 1e-6 if part == "statistics" else 0
            assert (again.parts()[part][name] - tensor).abs().max() <= tolerance, name
    assert torch.equal(again.encode(photos), tokenizer.encode(photos))


@torch.no_grad()
def test_half_precision_weights(randomize, photos, tmp_path):
    tokenizer = make_tokenizer(randomize, beta=0.2)
    export_diffusers(tokenizer, tmp_path / "out", torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert tensors["decoder.decoder_pred.weight"].dtype == torch.bfloat16
    assert tensors["_latents_std"].dtype == torch.float32
    latents = load(tmp_path / "out").float().encode(photos).latent
    expected = tokenizer.normalize_latents(tokenizer.encode(photos, "base"))
    assert F.cosine_similarity(latents.flatten(), expected.flatten(), dim=0) > 0.995


@pytest.mark.parametrize("encoder", ["dinov2", "siglip2", "mae"])
def test_names_of_transformers_4(encoder, randomize, tmp_path):
    tokenizer = make_tokenizer(randomize, encoder)
    export_diffusers(tokenizer, tmp_path / "out", release=4)
    names = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors").keys()
    expected = {
        "dinov2": "encoder.encoder.layer.2.attention.attention.query.weight",
        "siglip2": "encoder.vision_model.encoder.layers.2.self_attn.q_proj.weight",
        "mae": "encoder.encoder.layer.2.attention.attention.query.weight",
    }
    assert expected[encoder] in names
    again = import_autoencoder(tmp_path / "out", "x").tokenizer.encoder.state_dict()
    assert all(torch.equal(again[name], t) for name, t in tokenizer.encoder.state_dict().items())


@pytest.mark.parametrize(
    ("encoder", "decoder", "expected"),
    [
        (
            {"num_registers": 0},
            {},
            "encoder.num_registers=0: AutoencoderRAE builds dinov2 encoders of width 64",
        ),
        ({"num_heads": 2}, {}, "encoder.num_heads=2: "),
        ({"mlp": "swiglu"}, {}, "encoder.m"),
        ({"position_grid": 16}, {}, "with position_grid=37 and nothing else"),
        ({"width": 32}, {}, "encoder.width=32: AutoencoderRAE builds heads of 64 numbers"),
        (
            {},
            {"layer_norm_eps": 1e-6},
            "decoder.layer_norm_eps=1e-06: AutoencoderRAE builds decoders with 1e-12",
        ),
        ({}, {"position_span": 8}, "decoder.position_span=8: AutoencoderRAE lays"),
        ({"image_size": 112}, {"patch_size": 32}, "for a latent grid of 8 x 8 no others"),
    ],
)
def test_what_diffusers_cannot_build_is_refused(encoder, decoder, expected, tmp_path):
    encoder_config = EncoderConfig(**{**ENCODERS["dinov2"].model_dump(), **encoder})
    config = TokenizerConfig(
        name="x",
        encoder=encoder_config,
        fusion=None,
        decoder=DecoderConfig(**{**DECODER.model_dump(), **decoder}),
    )
    with pytest.raises(CheckpointError) as caught:
        export_diffusers(Tokenizer(config), tmp_path / "out")
    assert expected in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_taken_place_is_left_alone(randomize, tmp_path):
    tokenizer = make_tokenizer(randomize)
    (tmp_path / "photo.jpg").write_text("a photo")
    for place in (tmp_path, tmp_path / "photo.jpg"):
        with pytest.raises(FileExistsError):
            export_diffusers(tokenizer, place)
    assert os.listdir(tmp_path) == ["photo.jpg"]
    (tmp_path / "empty").mkdir()
    export_diffusers(tokenizer, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("function", ["save_file", "_write_json"])
def test_a_full_disk_leaves_nothing(function, randomize, tmp_path, monkeypatch):
    def fill_the_disk(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model.interop.to_diffusers, function, fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        export_diffusers(make_tokenizer(randomize, beta=0.2), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_readme_tells_how_to_load_it(randomize, tmp_path):
    export_diffusers(make_tokenizer(randomize, beta=0.2), tmp_path / "fused")
    export_diffusers(make_tokenizer(randomize, with_statistics=False), tmp_path / "plain")
    fused, plain = ((tmp_path / n / "README.md").read_text() for n in ("fused", "plain"))
    assert "load_fusion(folder)" in fused
    assert "load_fusion" not in plain
    assert "64 x 16 x 16,\nnormalised per position" in fused
    assert "not normalised: the checkpoint has no statistics" in plain
