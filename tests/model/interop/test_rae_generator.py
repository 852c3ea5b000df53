"""RAE's stage-2 files: bare, averaged and wrapped ones in, and out again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from model.generator import Generator, TrainedOn
from model.interop.rae_generator import (
    export_diffusers_transformer,
    export_rae,
    generator_config_from_state,
    import_generator,
    import_rae_generator,
    state_to_diffusers,
)
from tests.model.networks.test_dit import KEYS, SMALL, inputs, randomized


@pytest.fixture
def network():
    return randomized()


@pytest.fixture
def state(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def other(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


WRAPPERS = {
    "bare": lambda state: state,
    "ema": lambda state: {"ema": state, "model": other(state), "step": 7, "epoch": 1},
    "trainer": lambda state: {
        "model": other(state),
        "ema": state,
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "scheduler": {"last_epoch": 3},
        "train_steps": 12,
    },
    "model": lambda state: {"model": state},
    "module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "nested": lambda state: {"ema": {f"module._orig_mod.{name}": t for name, t in state.items()}},
    "model prefix": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "half": lambda state: {name: t if "rope" in name else t.bfloat16() for name, t in state.items()},
    "no rotary tables": lambda state: {name: t for name, t in state.items() if "rope" not in name},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapping_gives_the_averaged_weights(wrapper, state, network, tmp_path):
    torch.save(WRAPPERS[wrapper](state), tmp_path / "stage2_model.pt")
    imported = import_generator(tmp_path / "stage2_model.pt", SMALL)
    tolerance = 0.3 if wrapper == "half" else 0
    with torch.no_grad():
        expected = network(*inputs())
    assert torch.allclose(imported.velocity(*inputs()), expected, atol=tolerance)
    assert torch.equal(imported.network.pos_embed, state["pos_embed"]) or wrapper == "half"


def test_safetensors_are_read_too(state, tmp_path):
    save_file(state, tmp_path / "stage2_model.safetensors")
    imported = import_generator(tmp_path / "stage2_model.safetensors", SMALL)
    assert torch.equal(imported.network.state_dict()["t_embedder.W"], state["t_embedder.W"])


def test_stored_tables_are_kept_and_not_computed_again(state, tmp_path):
    """RAE's later trainer also trained the position table."""
    state["pos_embed"] += 0.1
    torch.save(state, tmp_path / "stage2_model.pt")
    assert torch.equal(
        import_generator(tmp_path / "stage2_model.pt", SMALL).network.pos_embed, state["pos_embed"]
    )


def test_the_architecture_is_read_off_the_shapes(state):
    assert generator_config_from_state(state, "small") == SMALL
    for published in KEYS.values():
        tensors = {name: torch.empty(shape, device="meta") for name, shape in published["shapes"].items()}
        config = generator_config_from_state(tensors, "x")
        assert (config.head_depth, config.head_heads, config.latent_channels) == (2, 16, 768)
        with torch.device("meta"):
            shapes = Generator(config).shapes()["network"]
        assert {name: list(shape) for name, shape in shapes.items()} == published["shapes"]


def test_statistics_come_with_it(state, tmp_path):
    torch.save(state, tmp_path / "stage2_model.pt")
    var = torch.rand(SMALL.latent_shape)
    torch.save({"mean": None, "var": var}, tmp_path / "stat.pt")
    imported = import_rae_generator(
        tmp_path / "stage2_model.pt", statistics=tmp_path / "stat.pt", name="small"
    )
    assert torch.equal(imported.generator.latent_var, var)
    assert torch.equal(imported.generator.latent_mean, torch.zeros(SMALL.latent_shape))
    assert any("holds no mean" in note for note in imported.notes)
    assert set(imported.provenance["imported"]["statistics"]["files"]) == {"stat.pt"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("s_projector.bias"), r"'s_projector.bias' is missing"),
        (lambda state: state.pop("pos_embed"), r"'pos_embed' is missing"),
        (lambda state: state.update(extra=torch.zeros(2)), r"unexpected tensor 'extra'"),
        (
            lambda state: state.update({"blocks.0.mlp.w3.bias": torch.zeros(7)}),
            r"'blocks.0.mlp.w3.bias' has shape",
        ),
        (lambda state: state["x_embedder.proj.bias"].fill_(torch.nan), r"'x_embedder.proj.bias' holds a NaN"),
        (lambda state: state["enc_feat_rope.freqs_cos"].add_(0.1), r"other rotary positions"),
    ],
)
def test_what_is_wrong_is_named(change, words, state, tmp_path):
    change(state)
    torch.save(state, tmp_path / "stage2_model.pt")
    with pytest.raises(CheckpointError, match=words) as caught:
        import_rae_generator(tmp_path / "stage2_model.pt")
    assert str(tmp_path / "stage2_model.pt") in str(caught.value)


def test_another_architecture_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "stage2_model.pt")
    with pytest.raises(CheckpointError, match="has shape"):
        import_generator(tmp_path / "stage2_model.pt", SMALL.model_copy(update={"num_classes": 9}))


def test_truncated_files_and_code_are_refused(state, tmp_path):
    file = tmp_path / "stage2_model.pt"
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        import_generator(file, SMALL)
    torch.save({"model": print}, file)
    with pytest.raises(CheckpointError, match="code"):
        import_generator(file, SMALL)


@pytest.fixture
def generator(network):
    generator = Generator(SMALL, TrainedOn(class_names=("a", "b", "c", "d", "e"), shift=2.0))
    generator.network = network
    generator.set_statistics(torch.randn(SMALL.latent_shape), torch.rand(SMALL.latent_shape))
    return generator.requires_grad_(False)


def test_raes_layout_is_read_again(generator, tmp_path):
    names = export_rae(generator, tmp_path / "out")
    assert names == ["config.json", "stage2_model.pt", "stat.pt"]
    again = import_rae_generator(
        tmp_path / "out" / "stage2_model.pt", statistics=tmp_path / "out" / "stat.pt", name="small"
    ).generator
    assert again.config == SMALL
    assert torch.equal(again.velocity(*inputs()), generator.velocity(*inputs()))
    assert torch.equal(again.latent_mean, generator.latent_mean)
    raw = torch.load(tmp_path / "out" / "stage2_model.pt", weights_only=True)
    assert raw.keys() == generator.network.state_dict().keys()


def test_diffusers_names_are_those_of_the_pull_request(generator, tmp_path):
    names = export_diffusers_transformer(generator, tmp_path / "out")
    assert names == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "RAEDiT2DModel"]
    assert index["id2label"]["1"] == "b"
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["hidden_size"] == [SMALL.trunk_width, SMALL.head_width]
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 2.0
    tensors = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert tensors.keys() == state_to_diffusers(generator.network.state_dict()).keys()


def test_diffusers_attention_and_swiglu_compute_the_same(network):
    """diffusers gates with the second half: ``value * silu(gate)`` of ``[value | gate]``."""
    state = network.state_dict()
    renamed = state_to_diffusers(state)
    tokens = torch.randn(3, SMALL.trunk_width)
    value, gate = torch.nn.functional.linear(
        tokens, renamed["blocks.0.mlp.net.0.proj.weight"], renamed["blocks.0.mlp.net.0.proj.bias"]
    ).chunk(2, dim=-1)
    hidden = value * torch.nn.functional.silu(gate)
    found = torch.nn.functional.linear(
        hidden, renamed["blocks.0.mlp.net.2.weight"], renamed["blocks.0.mlp.net.2.bias"]
    )
    assert torch.allclose(found, network.blocks[0].mlp(tokens), atol=1e-6)
    query = torch.nn.functional.linear(
        tokens, renamed["blocks.0.attn.to_q.weight"], renamed["blocks.0.attn.to_q.bias"]
    )
    assert torch.allclose(query, network.blocks[0].attn.qkv(tokens).chunk(3, dim=-1)[0], atol=1e-6)
    assert renamed["blocks.0.attn.to_out.0.weight"] is state["blocks.0.attn.proj.weight"]


def test_a_taken_place_is_left_alone(generator, tmp_path):
    (tmp_path / "photo.jpg").write_text("a photo")
    for export in (export_rae, export_diffusers_transformer):
        with pytest.raises(FileExistsError):
            export(generator, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]
