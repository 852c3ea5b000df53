"""Folders of the real AutoencoderRAE, saved by itself, against the tokenizer that an import makes of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import CheckpointError
from model.interop.from_diffusers import import_autoencoder
from model.tokenizer import Tokenizer

LATENT_SHAPE = (64, 4, 4)
# Without statistics diffusers divides by its deviation of 1 plus eps.
UNNORMALIZED_SCALE = 1 + 1e-5


def statistics(seed: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents_mean": torch.randn(LATENT_SHAPE, generator=generator),
        "latents_std": torch.rand(LATENT_SHAPE, generator=generator) + 0.01,
    }


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replaces tensors; None removes one."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    save_file(tensors, file)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_autoencoder(folder, "x")
    return str(caught.value)


@pytest.fixture
def folder(make_autoencoder, tmp_path) -> Path:
    """An AutoencoderRAE with DINOv2, saved with statistics."""
    make_autoencoder(**statistics()).save_pretrained(tmp_path / "rae")
    return tmp_path / "rae"


@pytest.mark.parametrize("encoder_type", ["dinov2", "siglip2", "mae"])
@torch.no_grad()
def test_every_output_equals_diffusers(encoder_type, make_autoencoder, tmp_path, images, record_difference):
    reference = make_autoencoder(encoder_type, **statistics())
    reference.save_pretrained(tmp_path / "rae")
    import_autoencoder(tmp_path / "rae", "rae").tokenizer.save(tmp_path / "checkpoint")
    tokenizer = Tokenizer.load(tmp_path / "checkpoint")
    assert tokenizer.config.fusion is None
    assert tokenizer.config.latent_shape == LATENT_SHAPE

    pixels = reference._resize_and_normalize(images)
    record_difference("pixels", tokenizer.preprocess(images), pixels, 1e-4)
    options = {} if encoder_type == "dinov2" else {"interpolate_pos_encoding": True}
    if encoder_type == "mae":
        options["noise"] = torch.arange(16.0).expand(2, -1)
    hidden = reference.encoder(pixels, output_hidden_states=True, **options).hidden_states[1:]
    ours = tokenizer.encoder.hidden_states(pixels)
    for number, (state, expected) in enumerate(zip(ours, hidden, strict=True), 1):
        record_difference(f"block {number}", state, expected, 1e-4)

    latents = reference.encode(images).latent
    record_difference("normalised latents", tokenizer.encode(images, normalize=True), latents, 1e-4)
    raw = reference._denormalize_latents(latents)
    record_difference("latents", tokenizer.encode(images), raw, 1e-4)
    decoded = reference.decode(latents).sample
    tokens = tokenizer.denormalize_latents(latents).flatten(2).transpose(1, 2)
    record_difference("decoder", tokenizer.decoder(tokens), decoded, 1e-4)
    record_difference("pixels", tokenizer.decode(latents, normalize=True), decoded.clamp(0, 1), 1e-4)


@torch.no_grad()
def test_without_statistics_there_are_none(make_autoencoder, tmp_path, images, record_difference):
    reference = make_autoencoder()
    reference.save_pretrained(tmp_path / "rae")
    tokenizer = import_autoencoder(tmp_path / "rae", "rae").tokenizer
    assert not tokenizer.has_statistics
    latents = reference.encode(images).latent * UNNORMALIZED_SCALE
    record_difference("latents", tokenizer.encode(images), latents, 1e-4)


@pytest.mark.parametrize("options", [{"scaling_factor": 0.5}, {"scaling_factor": 0.5, **statistics()}])
@torch.no_grad()
def test_a_scaling_factor_becomes_part_of_the_statistics(
    options, make_autoencoder, tmp_path, images, record_difference
):
    reference = make_autoencoder(**options)
    reference.save_pretrained(tmp_path / "rae")
    tokenizer = import_autoencoder(tmp_path / "rae", "rae").tokenizer
    latents = reference.encode(images).latent
    record_difference("normalised", tokenizer.encode(images, normalize=True), latents, 1e-4)
    pixels = reference.decode(latents).sample.clamp(0, 1)
    record_difference("pixels", tokenizer.decode(latents, normalize=True), pixels, 1e-4)


@torch.no_grad()
def test_pixel_statistics_come_from_the_buffers(make_autoencoder, tmp_path, images, record_difference):
    reference = make_autoencoder(encoder_norm_mean=[0.5, 0.4, 0.3], encoder_norm_std=[0.5, 0.25, 0.3])
    reference.encoder_mean[0, 1] = 0.45
    reference.save_pretrained(tmp_path / "rae")
    tokenizer = import_autoencoder(tmp_path / "rae", "rae").tokenizer
    assert tokenizer.config.pixel_mean == pytest.approx((0.5, 0.45, 0.3))
    assert tokenizer.config.pixel_std == (0.5, 0.25, 0.3)
    record_difference("pixels", tokenizer.preprocess(images), reference._resize_and_normalize(images), 1e-4)


def test_deviations_too_small_for_a_variance_are_counted(make_autoencoder, tmp_path):
    values = statistics()
    values["latents_std"][0, 0, :2] = 1e-3
    make_autoencoder(**values).save_pretrained(tmp_path / "rae")
    imported = import_autoencoder(tmp_path / "rae", "rae")
    assert "2 of 1024 latent positions" in imported.notes[0]
    assert imported.provenance["imported"]["num_clamped_deviations"] == 2
    assert imported.tokenizer.latent_var.min() == 0


@torch.no_grad()
def test_shards_and_pickled_weights(make_autoencoder, tmp_path, images):
    reference = make_autoencoder(**statistics())
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    reference.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert not list((tmp_path / "pickle").glob("*.safetensors"))
    tokenizers = [import_autoencoder(tmp_path / n, "x").tokenizer for n in ("whole", "shards", "pickle")]
    expected, *others = (tokenizer.encode(images, normalize=True) for tokenizer in tokenizers)
    assert all(torch.equal(other, expected) for other in others)


def test_provenance_names_files_and_digests_but_no_paths(folder, tmp_path):
    imported = import_autoencoder(folder, "rae")
    source = imported.provenance["imported"]["autoencoder"]
    assert source["format"] == "AutoencoderRAE"
    assert set(source["files"]) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert all(len(digest) == 64 for digest in source["files"].values())
    assert str(tmp_path) not in json.dumps(imported.provenance)


def test_rae_statistics_take_the_place_of_the_folders_own(folder, tmp_path):
    ours = {"mean": torch.full(LATENT_SHAPE, 2.0), "var": torch.full(LATENT_SHAPE, 3.0)}
    torch.save(ours, tmp_path / "stat.pt")
    imported = import_autoencoder(folder, "rae", tmp_path / "stat.pt")
    assert torch.equal(imported.tokenizer.latent_var, ours["var"])
    assert set(imported.provenance["imported"]["statistics"]["files"]) == {"stat.pt"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"_class_name": "AutoencoderKL"},
            "field '_class_name' is 'AutoencoderKL', expected 'AutoencoderRAE'",
        ),
        ({"encoder_type": "clip"}, "field 'encoder_type'"),
        ({"num_channels": 4}, "field 'num_channels'"),
        ({"new_option": True}, "field 'new_option'"),
        ({"encoder_hidden_size": "wide"}, "field 'encoder_hidden_size'"),
        ({"encoder_hidden_size": 32}, "field 'encoder_hidden_size'"),
        ({"encoder_input_size": 57}, "image_size=57 is not divisible by patch_size=14"),
        ({"image_size": 128}, "= 64 differs from image_size=128"),
        ({"decoder_num_attention_heads": 5}, "width=48 is not divisible by num_heads=5"),
        ({"reshape_to_2d": False}, "field 'reshape_to_2d'"),
        ({"encoder_norm_std": [1.0]}, "'encoder_std'"),
        ({"format": "drorae-tokenizer"}, "this is a DRoRAE checkpoint already"),
    ],
)
def test_configuration_errors_name_the_file_and_the_field(folder, changes, expected):
    edit_config(folder, **changes)
    message = refused(folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert expected in message


def test_a_transformers_folder_is_sent_elsewhere(folder):
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    assert "a transformers model ('dinov2'), which has no decoder" in refused(folder)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("decoder.decoder_norm.weight", None, "tensor 'decoder_norm.weight' is missing"),
        ("encoder.encoder.layer.2.norm1.bias", None, "tensor 'encoder.layer.2.norm1.bias' is missing"),
        ("extra", torch.zeros(1), "unexpected tensor 'extra'"),
        ("decoder.extra", torch.zeros(1), "unexpected tensor 'extra'"),
        (
            "encoder.encoder.layer.3.norm1.bias",
            torch.zeros(64),
            "unexpected tensor 'encoder.layer.3.norm1.bias'",
        ),
        ("decoder.decoder_pred.weight", torch.zeros(192, 48), "'decoder_pred.weight' has shape [192, 48]"),
        ("decoder.decoder_norm.bias", torch.full((48,), torch.nan), "decoder_norm.bias' holds a NaN"),
        ("_latents_std", torch.ones(64, 5, 5), "'_latents_std' has shape [64, 5, 5], expected [64, 4, 4]"),
        ("_latents_std", -torch.ones(LATENT_SHAPE), "'_latents_std' has a negative value"),
        ("encoder_std", torch.zeros(1, 3, 1, 1), "'encoder_std' is [0.0, 0.0, 0.0]"),
        ("decoder.decoder_pos_embed", torch.zeros(1, 17, 48), "differs from the fixed sin-cos positions"),
        ("decoder.decoder_norm.bias", torch.zeros(48, dtype=torch.int64), "'norm.bias' is torch.int64"),
    ],
)
def test_tensors_that_are_wrong_are_named(folder, name, value, expected):
    edit_tensors(folder, {name: value})
    message = refused(folder)
    assert message.startswith(str(folder))
    assert expected in message


def test_truncated_weights_and_missing_files(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert refused(folder).startswith(f"{file}: not a readable safetensors file, or a truncated one")
    file.unlink()
    assert refused(folder).startswith(
        f"{folder}: has no weights: none of diffusion_pytorch_model.safetensors"
    )
    (folder / "config.json").unlink()
    assert refused(folder) == f"{folder / 'config.json'}: cannot be read: No such file or directory"


def test_an_empty_folder_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")
    assert os.listdir(tmp_path) == ["empty"]
