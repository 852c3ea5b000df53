"""Files that transformers writes, of encoders alone and in larger models, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, EncoderConfig
from model.errors import CheckpointError
from model.interop.transformers_config import (
    encoder_config_from_transformers,
    pixel_statistics_from_transformers,
)
from model.interop.transformers_weights import encoder_state_from_transformers, encoder_state_to_transformers
from model.networks.encoder import Encoder

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"intermediate_size": 40, "image_size": 32, "patch_size": 8}
TEXT = SIZES | {"intermediate_size": 40, "vocab_size": 30, "max_position_embeddings": 4}
DINOV2 = SIZES | {"image_size": 42, "patch_size": 14}
# Class of model and of configuration, its fields, and where its encoder is.
FILES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", DINOV2, ""),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", DINOV2 | {"use_swiglu_ffn": True}, ""),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINOV2, ""),
    "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINOV2, "dinov2"),
    "dinov2 registers classifier": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        DINOV2 | {"use_swiglu_ffn": True},
        "dinov2_with_registers",
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VISION, ""),
    "siglip towers": (
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": VISION, "text_config": TEXT},
        "vision_model",
    ),
    "siglip2 towers": (
        "Siglip2Model",
        "Siglip2Config",
        {"vision_config": VISION | {"num_patches": 16}, "text_config": TEXT},
        "vision_model",
    ),
    "mae": ("ViTMAEModel", "ViTMAEConfig", VISION, ""),
    "mae with decoder": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        VISION
        | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        "vit",
    ),
}
# The attention, MLP and blocks of hub files, as transformers 4 names them.
OLD_DINOV2 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
OLD_MAE = {
    "layers.": "encoder.layer.",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
} | {f"attention.{s[0]}_proj": f"attention.attention.{s}" for s in ("query", "key", "value")}


def build(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    model_class, config_class, fields, _ = FILES[name]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval()


def inner(name: str, model: Any) -> Any:
    return getattr(model, FILES[name][3]) if FILES[name][3] else model


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "model.safetensors")


def as_transformers_4(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    older = {}
    for name, tensor in state.items():
        if "mlp.up_proj" in name:
            continue
        if "mlp.gate_proj" in name:
            tensor = torch.cat([tensor, state[name.replace("gate_proj", "up_proj")]])
            name = name.replace("gate_proj", "weights_in")
        for new, old in names.items():
            name = name.replace(new, old)
        older[name] = tensor
    return older


@pytest.mark.parametrize("name", FILES)
def test_what_save_pretrained_writes_is_read(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    raw, tensors = read(tmp_path)
    config = encoder_config_from_transformers(raw)
    assert (config.width, config.depth, config.num_heads) == (24, 2, 2)
    state = encoder_state_from_transformers(tensors, config)
    Encoder(config).load_state_dict(state)
    expected = encoder_state_from_transformers(inner(name, model).state_dict(), config)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "prefix", "names"),
    [
        ("dinov2 giant", "", OLD_DINOV2),
        ("dinov2 registers", "dinov2_with_registers.", OLD_DINOV2),
        ("mae", "", OLD_MAE),
        ("mae", "vit.", OLD_MAE),
    ],
)
def test_names_of_transformers_4_are_read_and_used_in_errors(name, prefix, names):
    model = build(name)
    config = encoder_config_from_transformers(model.config.to_dict())
    older = {prefix + key: t for key, t in as_transformers_4(model.state_dict(), names).items()}
    state = encoder_state_from_transformers(older, config)
    expected = encoder_state_from_transformers(model.state_dict(), config)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    required = [key for key in older if "mask_token" not in key and "layernorm." not in key]
    for key in required:
        with pytest.raises(CheckpointError) as caught:
            encoder_state_from_transformers({k: t for k, t in older.items() if k != key}, config)
        assert str(caught.value) == f"tensor {key!r} is missing"
        with pytest.raises(CheckpointError, match="has shape") as caught:
            encoder_state_from_transformers(older | {key: torch.zeros(3)}, config)
        assert repr(key) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "add", "message"),
    [
        ("siglip towers", "head.extra", "unexpected tensor 'head.extra'"),
        ("siglip towers", "vision_model.extra", "unexpected tensor 'vision_model.extra'"),
        ("mae with decoder", "encoder.mask", "unexpected tensor 'encoder.mask'"),
        ("dinov2", "encoder.layer.2.norm1.bias", r"unexpected tensor 'encoder\.layer\.2\.norm1\.bias'"),
        ("dinov2", "embeddings.register_tokens", "unexpected tensor 'embeddings.register_tokens'"),
        ("dinov2", "classifier.weight", "unexpected tensor 'classifier.weight'"),
        (
            "dinov2",
            "encoder.layer.0.attention.attention.query.bias",
            r"'encoder\.layer\.0\.attention\.q_proj\.bias' and 'encoder\..*\.query\.bias' are two spellings",
        ),
    ],
)
def test_tensors_that_are_too_many_are_named(name, add, message):
    model = build(name)
    config = encoder_config_from_transformers(model.config.to_dict())
    with pytest.raises(CheckpointError, match=message):
        encoder_state_from_transformers(model.state_dict() | {add: torch.ones(2)}, config)


def test_scalars_and_another_family_are_refused_by_name():
    model = build("dinov2")
    config = encoder_config_from_transformers(model.config.to_dict())
    state = model.state_dict()
    with pytest.raises(
        CheckpointError, match=r"'embeddings\.cls_token' has shape \[\], expected \[1, 1, 24\]"
    ):
        encoder_state_from_transformers(state | {"embeddings.cls_token": torch.tensor(1.0)}, config)
    siglip = encoder_config_from_transformers(build("siglip").config.to_dict())
    with pytest.raises(CheckpointError, match=r"'embeddings\.position_embedding\.weight' is missing"):
        encoder_state_from_transformers(state, siglip)
    giant = config.model_copy(update={"mlp": "swiglu"})
    with pytest.raises(CheckpointError, match=r"'encoder\.layer\.0\.mlp\.gate_proj\.weight' is missing"):
        encoder_state_from_transformers(state, giant)
    with pytest.raises(CheckpointError, match=r"'embeddings\.position_embeddings' has shape \[1, 10, 24\]"):
        encoder_state_from_transformers(state, config.model_copy(update={"position_grid": 4}))


def test_types_are_kept():
    model = build("siglip").half()
    config = encoder_config_from_transformers(model.config.to_dict())
    state = encoder_state_from_transformers(model.state_dict(), config)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert encoder_state_to_transformers(state, config)["embeddings.position_embedding.weight"].shape == (
        16,
        24,
    )


# As the config.json of the hub's repositories say it, less what does not matter here.
HUB = {
    "dinov2-base": {"model_type": "dinov2", "hidden_act": "gelu", "image_size": 518, "patch_size": 14},
    "dinov2-giant": {
        "model_type": "dinov2",
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "mlp_ratio": 4,
        "use_swiglu_ffn": True,
        "image_size": 518,
        "patch_size": 14,
    },
    "dinov2-with-registers-large": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 518,
        "patch_size": 14,
    },
    "siglip2-base-patch16-256": {
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000},
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 256},
    },
    "siglip2-so400m-patch16-256": {
        "model_type": "siglip",
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 256,
        },
    },
    "vit-mae-base": {"model_type": "vit_mae", "image_size": 224, "layer_norm_eps": 1e-12},
}


@pytest.mark.parametrize("name", HUB)
def test_hub_configurations_are_the_named_encoders(name):
    assert encoder_config_from_transformers(HUB[name], ENCODERS[name].image_size) == ENCODERS[name]


def test_without_an_image_size_the_input_fits_the_position_table():
    assert encoder_config_from_transformers(HUB["dinov2-base"]).image_size == 518
    assert encoder_config_from_transformers({"model_type": "siglip2_vision_model"}).image_size == 256
    pair = {"model_type": "vit_mae", "image_size": [224, 224], "patch_size": [16, 16], "num_channels": None}
    assert encoder_config_from_transformers(pair) == EncoderConfig(
        patch_size=16,
        layer_scale=False,
        num_registers=0,
        positions="sincos",
        position_grid=14,
        position_resize="bicubic",
        layer_norm_eps=1e-12,
    )
    assert pixel_statistics_from_transformers(pair) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "field 'model_type' is 'None'"),
        ({"model_type": "clip"}, "'clip', no encoder known here: dinov2, .*, vit_mae"),
        ({"model_type": ["dinov2"]}, "field 'model_type'"),
        ({"model_type": "siglip"}, "field 'vision_config' of a siglip model is missing"),
        ({"model_type": "dinov2", "hidden_act": "relu"}, "field 'hidden_act' is 'relu'"),
        ({"model_type": "dinov2", "hidden_act": ["gelu"]}, "field 'hidden_act'"),
        ({"model_type": "dinov2", "hidden_size": "768"}, "field 'hidden_size' is '768', expected a whole"),
        ({"model_type": "dinov2", "hidden_size": 770}, "width=770 is not divisible by num_heads=12"),
        ({"model_type": "dinov2", "num_channels": 1}, "field 'num_channels' is 1"),
        ({"model_type": "dinov2", "qkv_bias": False}, "field 'qkv_bias' is False"),
        ({"model_type": "dinov2", "image_size": [224, 112]}, "field 'image_size'"),
        ({"model_type": "dinov2", "layer_norm_eps": "x"}, "field 'layer_norm_eps'"),
        ({"model_type": "dinov2", "mlp_ratio": float("nan")}, "field 'mlp_ratio'"),
        ({"model_type": "vit_mae", "intermediate_size": 0}, "field 'intermediate_size' is 0"),
        ({"model_type": "siglip2_vision_model", "num_patches": 200}, "'num_patches' is 200, which is no sq"),
    ],
)
def test_configurations_that_are_no_encoder_name_the_field(config, message):
    with pytest.raises(CheckpointError, match=message):
        encoder_config_from_transformers(config)


def test_an_image_size_that_no_patches_fill_is_refused():
    with pytest.raises(CheckpointError, match="image_size=250 is not divisible by patch_size=14"):
        encoder_config_from_transformers(HUB["dinov2-base"], image_size=250)
