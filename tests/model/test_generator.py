"""The generator's checkpoint: what it keeps, and what it refuses."""

import json
import math

import pytest
import torch

from model.config import DecoderConfig, EncoderConfig, TokenizerConfig
from model.errors import CheckpointError, LatentError, SamplingError
from model.generator import Generator, TrainedOn
from model.networks.dit import TABLES
from model.tokenizer import Tokenizer
from tests.model.networks.test_dit import SMALL, inputs, randomized

TRAINED_ON = TrainedOn(
    tokenizer_name="small",
    tokenizer_sha256="0" * 64,
    class_names=("ant", "bee", "cat", "dog", "elk"),
    time_law="uniform",
    shift=2.0,
)


@pytest.fixture
def generator():
    generator = Generator(SMALL, TRAINED_ON)
    generator.network = randomized()
    generator.set_statistics(torch.randn(SMALL.latent_shape), torch.rand(SMALL.latent_shape))
    return generator


@pytest.fixture
def checkpoint(generator, tmp_path):
    generator.save(tmp_path / "generator", provenance={"steps": 3})
    return tmp_path / "generator"


def edit_config(checkpoint, change):
    file = checkpoint / "config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def test_a_saved_generator_loads_as_it_was(generator, checkpoint):
    loaded = Generator.load(checkpoint)
    assert loaded.config == SMALL
    assert loaded.trained_on == TRAINED_ON
    assert loaded.info.provenance == {"steps": 3}
    assert torch.equal(loaded.velocity(*inputs()), generator.velocity(*inputs()))
    assert torch.equal(loaded.latent_mean, generator.latent_mean)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_half_precision_spares_the_tables(generator, tmp_path):
    generator.save(tmp_path / "half", torch.float16)
    loaded = Generator.load(tmp_path / "half")
    for name, tensor in generator.network.state_dict().items():
        expected = tensor if name in TABLES else tensor.half().float()
        assert torch.equal(loaded.network.state_dict()[name], expected), name
    assert torch.equal(loaded.latent_var, generator.latent_var)


def test_bfloat16_is_for_products_alone(checkpoint):
    exact, rounded = Generator.load(checkpoint), Generator.load(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    found, expected = rounded.velocity(*inputs()), exact.velocity(*inputs())
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.06


def test_normalisation_is_inverted(generator):
    latents = torch.randn(2, *SMALL.latent_shape)
    assert torch.allclose(
        generator.denormalize_latents(generator.normalize_latents(latents)), latents, atol=1e-5
    )


def test_without_statistics_none_are_stored(tmp_path):
    Generator(SMALL).save(tmp_path / "bare")
    assert not Generator.load(tmp_path / "bare").has_statistics


def test_classes_go_by_name_or_number(generator):
    assert generator.class_indices(["bee", "0", "elk"]) == [1, 0, 4]
    with pytest.raises(SamplingError, match="did you mean 'bee'"):
        generator.class_indices(["beee"])
    for wrong in ("5", "-1", "1.5", ""):
        with pytest.raises(SamplingError, match="0 to 4"):
            generator.class_indices([wrong])


def test_another_tokenizer_is_refused(generator, tmp_path):
    config = TokenizerConfig(
        name="fits",
        image_size=32,
        encoder=EncoderConfig(width=12, depth=1, num_heads=1, patch_size=7, image_size=28, position_grid=4),
        fusion=None,
        decoder=DecoderConfig(width=16, depth=1, num_heads=1, mlp_width=16, patch_size=8),
    )
    saved = Tokenizer(config).save(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    with pytest.raises(LatentError, match="trained on the latents of tokenizer 'small'"):
        generator.check_tokenizer(tokenizer)
    matching = TRAINED_ON.model_copy(update={"tokenizer_sha256": saved.sha256})
    Generator(SMALL, matching).check_tokenizer(tokenizer)
    other = Generator(SMALL.model_copy(update={"latent_channels": 16}), matching)
    with pytest.raises(LatentError, match="16 x 4 x 4"):
        other.check_tokenizer(tokenizer)


def test_a_tokenizer_is_no_generator(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: holds a generator, and a tokenizer is needed"):
        Tokenizer.load(checkpoint)
    with pytest.raises(CheckpointError, match=r"config.json: holds a tokenizer, and a generator is needed"):
        Generator.load("model/bundled/mini")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields.update(format="other"), "format"),
        (lambda fields: fields.update(version=2), "version 2"),
        (lambda fields: fields["generator"].update(trunk_width=33), "trunk_width"),
        (lambda fields: fields["generator"].update(trunk_depth=4), "network.safetensors"),
        (lambda fields: fields["generator"].update(surprise=1), "surprise"),
        (lambda fields: fields["files"].pop("network"), "lacks 'network'"),
        (lambda fields: fields["trained_on"].update(class_names=["ant"]), "1 names for 5 classes"),
        (lambda fields: fields["trained_on"].update(shift=0.5), "shift"),
    ],
)
def test_wrong_configurations_are_told_by_field(checkpoint, change, words):
    edit_config(checkpoint, change)
    with pytest.raises(CheckpointError, match=words):
        Generator.load(checkpoint)


def test_truncated_and_flipped_files_are_told(checkpoint):
    file = checkpoint / "network.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        Generator.load(checkpoint)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="corrupt"):
        Generator.load(checkpoint)


def test_weights_that_are_not_finite_are_not_loaded(generator, tmp_path):
    with torch.no_grad():
        generator.network.final_layer.linear.bias[0] = math.nan
    generator.save(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.bias"):
        Generator.load(tmp_path / "broken")


def test_a_name_without_bundled_weights_is_told():
    with pytest.raises(CheckpointError, match="no bundled weights"):
        Generator.load("dit-dh-xl")
