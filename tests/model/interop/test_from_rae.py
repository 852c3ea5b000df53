"""Encoders saved by transformers and files of RAE's layout, against the tokenizer made of them."""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import DecoderConfig
from model.errors import CheckpointError
from model.interop.assembly import Imported
from model.interop.from_rae import RaeSources, import_rae
from model.tokenizer import Tokenizer

WIDTH, GRID, SIDE = 48, 4, 64
HEADS = 2
DECODER_NAMES = {
    ".attention.to_q.": ".attention.attention.query.",
    ".attention.to_k.": ".attention.attention.key.",
    ".attention.to_v.": ".attention.attention.value.",
    ".attention.to_out.0.": ".attention.output.dense.",
}
STATISTICS = {
    "mean": torch.linspace(-1, 1, 768).view(48, 4, 4),
    "var": torch.linspace(0, 2, 768).view(48, 4, 4),
}


def mae_positions(width: int, grid: int) -> Tensor:
    """MAE's table as its authors wrote it: columns first, a zero row for the class token."""
    rows, columns = np.mgrid[:grid, :grid].reshape(2, -1)
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    angles = [np.einsum("m,d->md", axis, omega) for axis in (columns, rows)]
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros([1, width]), table])).float()[None]


def save_encoder(kind: str, folder: Path, randomize: Callable[..., None]) -> Any:
    """A small real encoder with a grid of 5x5, saved by itself."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    dinov2 = {**sizes, "image_size": 70, "patch_size": 14}
    vit = {**sizes, "image_size": 80, "patch_size": 16, "intermediate_size": 80}
    models = {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**dinov2)),
        "dinov2-giant": lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(**dinov2, use_swiglu_ffn=True)
        ),
        "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**dinov2)
        ),
        "dinov2-registers-giant": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**dinov2, use_swiglu_ffn=True)
        ),
        "siglip2": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vit)),
        "mae": lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**vit, mask_ratio=0.0)),
    }
    model = models[kind]().eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def hidden_states(model: Any, kind: str, pixels: Tensor) -> list[Tensor]:
    options: dict[str, Any] = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
    if kind == "mae":
        options["noise"] = torch.arange(GRID**2).float().expand(len(pixels), -1)
    return list(model(pixels, output_hidden_states=True, **options).hidden_states[1:])


def make_decoder(randomize: Callable[..., None], latent_width: int = WIDTH) -> Any:
    """diffusers' port of RAE's decoder, with the positions that RAE itself has."""
    rae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae")
    decoder = rae.RAEDecoder(
        hidden_size=latent_width,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=HEADS,
        decoder_intermediate_size=40,
        num_patches=GRID**2,
        image_size=SIDE,
    ).eval()
    randomize(decoder, seed=4)
    decoder.decoder_pos_embed = mae_positions(48, GRID)
    return decoder


def rae_state(decoder: Any) -> dict[str, Tensor]:
    """The tensors of RAE's ``model.pt``."""
    state = {"decoder_pos_embed": decoder.decoder_pos_embed}
    for name, tensor in decoder.state_dict().items():
        for ours, theirs in DECODER_NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    return state


@pytest.fixture
def sources(tmp_path, randomize) -> RaeSources:
    """DINOv2 with registers, a decoder and statistics."""
    save_encoder("dinov2-registers", tmp_path / "encoder", randomize)
    torch.save(rae_state(make_decoder(randomize)), tmp_path / "model.pt")
    torch.save(STATISTICS, tmp_path / "stat.pt")
    return RaeSources(tmp_path / "encoder", tmp_path / "model.pt", tmp_path / "stat.pt", num_heads=HEADS)


def refused(sources: RaeSources) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_rae(sources, "x")
    return str(caught.value)


def edit_decoder(sources: RaeSources, **changes: Tensor | None) -> None:
    state = torch.load(sources.decoder) | {name.replace("__", "."): value for name, value in changes.items()}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, sources.decoder)


@pytest.mark.parametrize(
    "kind",
    ["dinov2", "dinov2-giant", "dinov2-registers", "dinov2-registers-giant", "siglip2", "mae"],
)
@torch.no_grad()
def test_every_output_equals_the_sources(kind, tmp_path, randomize, images, record_difference):
    encoder = save_encoder(kind, tmp_path / "encoder", randomize)
    decoder = make_decoder(randomize)
    torch.save(rae_state(decoder), tmp_path / "model.pt")
    torch.save(STATISTICS, tmp_path / "stat.pt")
    parts = (tmp_path / "encoder", tmp_path / "model.pt", tmp_path / "stat.pt")
    import_rae(RaeSources(*parts, num_heads=HEADS), kind).tokenizer.save(tmp_path / "checkpoint")
    tokenizer = Tokenizer.load(tmp_path / "checkpoint")
    patch = 14 if kind.startswith("dinov2") else 16
    assert (tokenizer.config.image_size, tokenizer.config.encoder.image_size) == (SIDE, GRID * patch)

    triple = 0.5 if kind == "siglip2" else None
    mean = torch.tensor([triple] * 3 if triple else [0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([triple] * 3 if triple else [0.229, 0.224, 0.225]).view(3, 1, 1)
    resized = F.interpolate(images, size=(GRID * patch,) * 2, mode="bicubic") if patch == 14 else images
    pixels = (resized - mean) / std
    record_difference("pixels", tokenizer.preprocess(images), pixels, 1e-4)
    expected = hidden_states(encoder, kind, pixels)
    for number, states in enumerate(zip(tokenizer.encoder.hidden_states(pixels), expected, strict=True), 1):
        record_difference(f"block {number}", *states, 1e-4)

    tokens = F.layer_norm(expected[-1], (WIDTH,), eps=encoder.config.layer_norm_eps)[:, -(GRID**2) :]
    latents = tokens.transpose(1, 2).unflatten(2, (GRID, GRID))
    normalized = (latents - STATISTICS["mean"]) / torch.sqrt(STATISTICS["var"] + 1e-5)
    record_difference("latents", tokenizer.encode(images), latents, 1e-4)
    scale = normalized.abs().max().item()  # deviations near 0 magnify the difference with the values
    record_difference(
        "normalised", tokenizer.encode(images, normalize=True) / scale, normalized / scale, 1e-6
    )
    decoded = decoder.unpatchify(decoder(tokens).logits) * std + mean
    record_difference("decoder", tokenizer.decoder(tokens), decoded, 1e-4)
    record_difference("decoded", tokenizer.decode(latents), decoded.clamp(0, 1), 1e-4)
    denormalized = tokenizer.decode(normalized, normalize=True)
    record_difference("decoded, normalised", denormalized, decoded.clamp(0, 1), 1e-4)


@torch.no_grad()
def test_shards_pickles_and_older_names_give_the_same(sources, randomize, images):
    expected = import_rae(sources, "x").tokenizer.encode(images)
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2WithRegistersModel.from_pretrained(sources.encoder)
    weights = sources.encoder / "model.safetensors"
    state = load_file(weights)
    weights.unlink()

    model.save_pretrained(sources.encoder, max_shard_size="100KB")
    assert (sources.encoder / "model.safetensors.index.json").is_file()
    assert torch.equal(import_rae(sources, "x").tokenizer.encode(images), expected)
    for file in sources.encoder.glob("model*"):
        file.unlink()

    torch.save(state, sources.encoder / "pytorch_model.bin")
    assert torch.equal(import_rae(sources, "x").tokenizer.encode(images), expected)


def test_wrapped_and_prefixed_decoders_are_unwrapped(sources, tmp_path):
    expected = import_rae(sources, "x").tokenizer.decoder.state_dict()
    state = torch.load(sources.decoder)
    wrapped = {"model": {f"module.decoder.{name}": tensor for name, tensor in state.items()}, "step": 3}
    torch.save(wrapped, sources.decoder)
    found = import_rae(sources, "x").tokenizer.decoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    safe = RaeSources(sources.encoder, tmp_path / "model.safetensors", num_heads=HEADS)
    assert not import_rae(safe, "x").tokenizer.has_statistics


WRAPPED_NAMES = [
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module.",
    "module.model._orig_mod.decoder.",
    "decoder._orig_mod.",
    "_orig_mod.decoder.module.",
]
TAKEN = "averaged weights ({!r}) were taken"


@pytest.mark.parametrize("prefix", WRAPPED_NAMES)
def test_names_of_wrappers_are_taken_off_in_any_order(sources, prefix):
    expected = import_rae(sources, "x").tokenizer.decoder.state_dict()
    state = torch.load(sources.decoder)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, sources.decoder)
    assert_imports_as(sources, expected)
    save_file(
        {prefix + name: t.contiguous() for name, t in state.items()},
        sources.decoder.with_suffix(".safetensors"),
    )
    assert_imports_as(replace(sources, decoder=sources.decoder.with_suffix(".safetensors")), expected)


def test_compiled_blocks_are_named_within(sources):
    expected = import_rae(sources, "x").tokenizer.decoder.state_dict()
    state = torch.load(sources.decoder)
    inner = {re.sub(r"(decoder_layers\.\d+\.)", r"\1_orig_mod.", name): t for name, t in state.items()}
    assert inner.keys() != state.keys()
    torch.save(inner, sources.decoder)
    assert_imports_as(sources, expected)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (
            lambda raw, mean: {"model": raw, "ema": mean, "step": 1},
            "averaged weights ('ema') beside those of 'model' were taken",
        ),
        (
            lambda raw, mean: {"ema": mean, "model": raw, "optimizer": {"state": {}}},
            "beside those of 'model'",
        ),
        (lambda raw, mean: {"ema": mean}, TAKEN.format("ema")),
        (lambda raw, mean: {"model_ema": mean, "state_dict": raw}, "'model_ema'"),
        (
            lambda raw, mean: {"ema_model": {"state_dict": prefixed("module.", mean)}},
            TAKEN.format("ema_model"),
        ),
        (lambda raw, mean: {"model": {"ema": mean, "model": raw}}, "'ema'"),
        (
            lambda raw, mean: {"state_dict": {**prefixed("model.", raw), **prefixed("ema_model.", mean)}},
            "'ema_model'",
        ),
        (
            lambda raw, mean: {**prefixed("module.", mean), "n_averaged": torch.tensor(3)},
            TAKEN.format("n_averaged"),
        ),
        (
            lambda raw, mean: {
                "model": raw,
                "ema": {**prefixed("module.", mean), "n_averaged": torch.tensor(3)},
            },
            "'ema'",
        ),
        (
            lambda raw, mean: {"ema": {**prefixed("decoder.", mean), "encoder.x": torch.zeros(2)}},
            "of a whole model the decoder",
        ),
        (lambda raw, mean: {"ema": mean, "args": argparse.Namespace(lr=1)}, TAKEN.format("ema")),
    ],
)
def test_averaged_weights_come_first_and_it_is_said(sources, wrap, note, caplog):
    raw = torch.load(sources.decoder)
    mean = {name: tensor if name == "decoder_pos_embed" else tensor + 1 for name, tensor in raw.items()}
    torch.save(mean, sources.decoder)
    expected = import_rae(sources, "x").tokenizer.decoder.state_dict()
    torch.save(wrap(raw, mean), sources.decoder)
    with caplog.at_level("INFO"):
        imported = assert_imports_as(sources, expected)
    assert note in caplog.text
    assert any(note in line for line in imported.notes)
    assert any(note in line for line in imported.provenance["imported"]["decoder"]["notes"])


def test_an_average_that_is_none_is_passed_over(sources):
    expected = import_rae(sources, "x").tokenizer.decoder.state_dict()
    torch.save(
        {"model": torch.load(sources.decoder), "ema": {"decay": 0.9}, "ema_model": None}, sources.decoder
    )
    assert assert_imports_as(sources, expected).notes == ()


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda raw: {"ema": raw, "model_ema": raw}, "holds several sets of weights, 'ema', 'model_ema'"),
        (
            lambda raw: {"model": raw, "state_dict": raw},
            "holds several sets of weights, 'model', 'state_dict'",
        ),
        (lambda raw: {**raw, **prefixed("_orig_mod.", raw)}, "twice, wrapped and not"),
        (
            lambda raw: {"generator": raw, "discriminator": raw},
            "entry 'generator' is dict, expected a tensor",
        ),
    ],
)
def test_files_with_several_sets_of_weights_are_refused(sources, wrap, expected):
    torch.save(wrap(torch.load(sources.decoder)), sources.decoder)
    message = refused(sources)
    assert message.startswith(f"{sources.decoder}: ")
    assert expected in message


def test_an_encoder_may_be_wrapped_too(sources):
    expected = import_rae(sources, "x").tokenizer.encoder.state_dict()
    weights = sources.encoder / "model.safetensors"
    save_file(prefixed("module._orig_mod.", load_file(weights)), weights)
    found = import_rae(sources, "x").tokenizer.encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def assert_imports_as(sources: RaeSources, expected: dict[str, Tensor]) -> Imported:
    imported = import_rae(sources, "x")
    found = imported.tokenizer.decoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return imported


def test_provenance_names_every_file(sources, tmp_path):
    provenance = import_rae(sources, "x").provenance
    imported = provenance["imported"]
    assert imported["encoder"]["format"] == "transformers dinov2_with_registers"
    assert set(imported["encoder"]["files"]) == {"config.json", "model.safetensors"}
    assert set(imported["decoder"]["files"]) == {"model.pt"}
    assert set(imported["statistics"]["files"]) == {"stat.pt"}
    assert str(tmp_path) not in json.dumps(provenance)


def test_a_new_decoder_is_seeded_and_fits_the_encoder(sources):
    config = DecoderConfig(width=32, depth=1, num_heads=2, mlp_width=16)
    state = torch.random.get_rng_state()
    first, second = (
        import_rae(RaeSources(sources.encoder, config, image_size=96), "x").tokenizer for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.config.latent_shape == (WIDTH, 6, 6)
    assert torch.equal(first.decoder.last_layer, second.decoder.last_layer)
    assert RaeSources(sources.encoder, config).image_size is None
    assert import_rae(RaeSources(sources.encoder, config), "x").tokenizer.config.image_size == 256


def test_an_image_processor_gives_the_pixels(sources):
    file = sources.encoder / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1], "do_resize": True}))
    config = import_rae(sources, "x").tokenizer.config
    assert (config.pixel_mean, config.pixel_std) == ((0.5, 0.4, 0.3), (1, 1, 1))
    file.write_text(json.dumps({"image_mean": [0.5, "a", 0.3], "image_std": [1, 1, 1]}))
    assert "field 'image_mean' is [0.5, 'a', 0.3]" in refused(sources)


def test_an_unpublished_width_needs_its_heads(sources):
    message = refused(RaeSources(sources.encoder, sources.decoder))
    assert message.startswith(f"{sources.decoder}: the decoder's width 48 is none of RAE's (768, 1024, 1152)")
    assert "not divisible by num_heads=5" in refused(
        RaeSources(sources.encoder, sources.decoder, num_heads=5)
    )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_decoders_keep_their_positions(sources, half):
    torch.save({name: t.to(half) for name, t in torch.load(sources.decoder).items()}, sources.decoder)
    assert import_rae(sources, "x").tokenizer.decoder.last_layer.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainable_cls_token": None}, "tensor 'trainable_cls_token' is missing"),
        ({"decoder_embed__weight": None}, "tensor 'decoder_embed.weight' is missing"),
        (
            {"decoder_layers__1__attention__attention__key__bias": None},
            "tensor 'decoder_layers.1.attention.attention.key.bias' is missing",
        ),
        ({"mask_token": torch.zeros(1)}, "unexpected tensor 'mask_token'"),
        (
            {"decoder_layers__0__attention__output__dense__weight": torch.zeros(3, 3)},
            "tensor 'decoder_layers.0.attention.output.dense.weight' has shape [3, 3], expected [48, 48]",
        ),
        ({"decoder_pred__weight": torch.zeros(100, 48)}, "gives 100 numbers a token, no square patch"),
        (
            {"decoder_pos_embed": torch.zeros(1, 17, 48)},
            "differs from the fixed sin-cos positions by up to 1:",
        ),
        ({"decoder_pos_embed": torch.zeros(1, 18, 48)}, "no positions of a class token and a square grid"),
        ({"decoder_norm__bias": torch.full((48,), torch.inf)}, "'decoder_norm.bias' holds a NaN or infinite"),
        (
            {"decoder_embed__weight": torch.zeros(48, 32)},
            "takes latents of width 32, and the encoder gives width 48",
        ),
    ],
)
def test_decoder_tensors_that_are_wrong_are_named(sources, changes, expected):
    edit_decoder(sources, **changes)
    message = refused(sources)
    assert message.startswith(f"{sources.decoder}: ")
    assert expected in message


def test_grids_that_differ_name_both_sides(sources, tmp_path):
    torch.save({"mean": torch.zeros(48, 5, 5), "var": torch.ones(48, 5, 5)}, tmp_path / "other.pt")
    other = RaeSources(sources.encoder, sources.decoder, tmp_path / "other.pt", num_heads=HEADS)
    statistics = tmp_path / "other.pt"
    assert refused(other) == (
        f"the decoder in {sources.decoder} has a latent grid of 4 x 4, "
        f"but the mean in {statistics} one of 5 x 5"
    )
    larger = RaeSources(sources.encoder, sources.decoder, image_size=128, num_heads=HEADS)
    assert refused(larger).startswith(
        "an image of 128 pixels in patches of 16 has a latent grid of 8 x 8, but"
    )
    odd = RaeSources(sources.encoder, sources.decoder, image_size=100, num_heads=HEADS)
    assert refused(odd) == "images of 100 pixels are not divisible by the decoder's patch of 16 pixels"


@pytest.mark.parametrize(
    ("statistics", "expected"),
    [
        ({"mean": None, "var": None}, "expected a dictionary of tensors"),
        ({**STATISTICS, "count": torch.zeros(1)}, "holds the tensors ['count', 'mean', 'var']"),
        (
            {"mean": torch.zeros(32, 4, 4), "var": torch.ones(32, 4, 4)},
            "tensor 'mean' has shape [32, 4, 4], but the latents have [48, 4, 4]",
        ),
        ({**STATISTICS, "var": -torch.ones(48, 4, 4)}, "tensor 'var' has a negative value"),
        ({**STATISTICS, "var": torch.full((48, 4, 4), torch.nan)}, "tensor 'var' holds a NaN"),
        ({**STATISTICS, "var": 3.0}, "entry 'var' is float, expected a tensor"),
        ([1, 2], "holds list, expected a dictionary of tensors"),
    ],
)
def test_statistics_that_are_wrong_are_named(sources, statistics, expected):
    torch.save(statistics, sources.statistics)
    message = refused(sources)
    assert message.startswith(f"{sources.statistics}: ")
    assert expected in message


@pytest.mark.parametrize(("absent", "value"), [("mean", 0.0), ("var", 1.0)])
@pytest.mark.parametrize("is_none", [True, False])
def test_statistics_that_lack_one_count_as_rae_counts_them(sources, absent, value, is_none):
    """RAE's own file for DINOv2-B has a mean of None."""
    kept = {name: tensor for name, tensor in STATISTICS.items() if name != absent}
    torch.save({**kept, absent: None} if is_none else kept, sources.statistics)
    imported = import_rae(sources, "x")
    found = {"mean": imported.tokenizer.latent_mean, "var": imported.tokenizer.latent_var}
    assert torch.equal(found[absent], torch.full((48, 4, 4), value))
    (present,) = kept
    assert torch.equal(found[present], kept[present])
    assert any(f"holds no {absent}" in note for note in imported.notes)


def test_statistics_with_a_batch_side_are_taken(sources):
    torch.save({name: tensor[None] for name, tensor in STATISTICS.items()}, sources.statistics)
    assert torch.equal(import_rae(sources, "x").tokenizer.latent_mean, STATISTICS["mean"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "bert"}, "field 'model_type' is 'bert'"),
        ({"hidden_size": 64}, "takes latents of width 48, and the encoder gives width 64"),
        ({"num_hidden_layers": 4}, "tensor 'encoder.layer.3.norm1.weight' is missing"),
        ({"num_hidden_layers": 2}, "unexpected tensor 'encoder.layer.2."),
        ({"patch_size": 7}, "tensor 'embeddings.p"),
        ({"num_register_tokens": 2}, "tensor 'embeddings.register_tokens' has shape [1, 4, 48]"),
        ({"use_swiglu_ffn": True}, "is missing"),
    ],
)
def test_an_encoder_that_is_not_what_its_configuration_says(sources, changes, expected):
    file = sources.encoder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert expected in refused(sources)


def test_folders_without_weights_or_configuration(sources):
    (sources.encoder / "model.safetensors").unlink()
    assert refused(sources).startswith(f"{sources.encoder}: has no weights: none of model.safetensors")
    (sources.encoder / "config.json").write_text("{")
    assert refused(sources).startswith(f"{sources.encoder / 'config.json'}: not valid JSON")
