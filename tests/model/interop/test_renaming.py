"""Foreign state dicts: strict both ways, and what is dropped is dropped by name."""

from functools import partial

import pytest
import torch

from model.config import EncoderConfig
from model.errors import CheckpointError
from model.interop.rae_decoder_weights import decoder_state_from_diffusers
from model.interop.transformers_weights import encoder_state_from_transformers
from model.networks.decoder import Decoder
from model.networks.encoder import Encoder

WIDTH = 8
CONFIG = EncoderConfig(width=WIDTH, depth=2, num_heads=2, image_size=42, position_grid=3)
OLD_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def _linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(rows, columns), f"{name}.bias": torch.randn(rows)}


def _norm(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(WIDTH), f"{name}.bias": torch.randn(WIDTH)}


@pytest.fixture
def dinov2_state():
    """Two blocks of width 8 under transformers 5 names."""
    torch.manual_seed(0)
    state = {
        "embeddings.cls_token": torch.randn(1, 1, WIDTH),
        "embeddings.mask_token": torch.randn(1, WIDTH),
        "embeddings.register_tokens": torch.randn(1, 4, WIDTH),
        "embeddings.position_embeddings": torch.randn(1, 10, WIDTH),
        "embeddings.patch_embeddings.projection.weight": torch.randn(WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": torch.randn(WIDTH),
        **_norm("layernorm"),
    }
    for block in range(2):
        prefix = f"encoder.layer.{block}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state |= _linear(f"{prefix}.attention.{name}", WIDTH, WIDTH)
        state |= _norm(f"{prefix}.norm1") | _norm(f"{prefix}.norm2")
        state |= _linear(f"{prefix}.mlp.fc1", 4 * WIDTH, WIDTH) | _linear(
            f"{prefix}.mlp.fc2", WIDTH, 4 * WIDTH
        )
        state |= {f"{prefix}.layer_scale{n}.lambda1": torch.randn(WIDTH) for n in (1, 2)}
    return state


@pytest.fixture
def decoder_state(tokenizer):
    """The tiny decoder's weights under diffusers' names."""
    renamed = {
        "class_token": "trainable_cls_token",
        "embed.": "decoder_embed.",
        "predict.": "decoder_pred.",
        "blocks.": "decoder_layers.",
        "norm_attention": "layernorm_before",
        "norm_mlp": "layernorm_after",
        "attention.out": "attention.to_out.0",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
    }
    state = {}
    for name, tensor in tokenizer.decoder.state_dict().items():
        theirs = f"decoder_{name}" if name.startswith("norm.") else name
        for ours, foreign in renamed.items():
            theirs = theirs.replace(ours, foreign)
        if "qkv" in theirs:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[theirs.replace("qkv", f"to_{letter}")] = part
        else:
            state[theirs] = tensor
    return state


def test_encoder_state_loads_strictly_and_fuses_qkv_in_order(dinov2_state):
    ours = encoder_state_from_transformers(dinov2_state, CONFIG)
    Encoder(CONFIG).load_state_dict(ours)
    block = "encoder.layer.1.attention"
    parts = [dinov2_state[f"{block}.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(ours["blocks.1.attention.qkv.weight"], torch.cat(parts))


def test_hub_files_keep_older_names(dinov2_state):
    older = {}
    for name, tensor in dinov2_state.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        older[name] = tensor
    assert older.keys() != dinov2_state.keys()
    ours, expected = (
        encoder_state_from_transformers(older, CONFIG),
        encoder_state_from_transformers(dinov2_state, CONFIG),
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("name", ["embeddings.mask_token", "layernorm.weight", "layernorm.bias"])
def test_dropped_tensors_may_be_absent(dinov2_state, name):
    del dinov2_state[name]
    assert len(encoder_state_from_transformers(dinov2_state, CONFIG)) == 5 + 2 * 14


def test_decoder_state_round_trips(tokenizer, decoder_state):
    ours = decoder_state_from_diffusers(decoder_state | {"decoder_pos_embed": torch.zeros(1, 17, 48)})
    expected = tokenizer.decoder.state_dict()
    Decoder(tokenizer.config).load_state_dict(ours)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_every_missing_tensor_is_named(dinov2_state, decoder_state):
    dropped = {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
    encoder = partial(encoder_state_from_transformers, config=CONFIG)
    cases = [(encoder, dinov2_state), (decoder_state_from_diffusers, decoder_state)]
    for convert, state in cases:
        for name in state.keys() - dropped:
            with pytest.raises(CheckpointError) as caught:
                convert({key: tensor for key, tensor in state.items() if key != name})
            assert str(caught.value) == f"tensor {name!r} is missing"


@pytest.mark.parametrize(
    "name", ["extra", "encoder.layer.0.mlp.weights_in.weight", "encoder.layer.x.bias", "pooler.dense.weight"]
)
def test_unknown_encoder_tensor_is_named(dinov2_state, name):
    with pytest.raises(CheckpointError, match=f"unexpected tensor '{name}'"):
        encoder_state_from_transformers(dinov2_state | {name: torch.zeros(1)}, CONFIG)


def test_unknown_decoder_tensor_is_named(decoder_state):
    with pytest.raises(CheckpointError, match="unexpected tensor 'mask_token'"):
        decoder_state_from_diffusers(decoder_state | {"mask_token": torch.zeros(1)})


def test_a_gap_in_the_blocks_names_the_first_tensor_of_the_gap(dinov2_state):
    moved = {name.replace("layer.1.", "layer.2."): tensor for name, tensor in dinov2_state.items()}
    with pytest.raises(CheckpointError, match=r"tensor 'encoder\.layer\.1\.norm1\.weight' is missing"):
        encoder_state_from_transformers(moved, CONFIG)


def test_no_blocks_at_all(dinov2_state):
    outside = {name: tensor for name, tensor in dinov2_state.items() if "layer." not in name}
    with pytest.raises(CheckpointError, match=r"'encoder\.layer\.0\.norm1\.weight' is missing"):
        encoder_state_from_transformers(outside, CONFIG)


def test_query_and_key_of_different_shapes_are_named(dinov2_state):
    dinov2_state["encoder.layer.0.attention.k_proj.weight"] = torch.zeros(4, 4)
    with pytest.raises(
        CheckpointError, match=r"'encoder\.layer\.0\.attention\.k_proj\.weight' has shape \[4, 4\]"
    ):
        encoder_state_from_transformers(dinov2_state, CONFIG)
