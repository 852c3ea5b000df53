"""``drorae generate``: folders, grids and files of latents; each refusal is one sentence."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from model.generator import Generator, TrainedOn
from model.networks.dit import TABLES, GeneratorConfig
from model.tokenizer import Tokenizer
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import _serve

CLASSES = ("ant", "bee, honey", "cat")


def save_generator(path, tokenizer, seed=0, with_statistics=True, **sizes):
    """A random generator on the latents of the tiny tokenizer."""
    torch.manual_seed(seed)
    config = GeneratorConfig(
        **{
            "name": path.name,
            "num_classes": 3,
            "latent_channels": 32,
            "grid": 4,
            "trunk_width": 16,
            "trunk_depth": 1,
            "trunk_heads": 2,
            "head_width": 24,
            "head_depth": 1,
            "head_heads": 2,
            **sizes,
        }
    )
    loaded = Tokenizer.load(tokenizer)
    trained_on = TrainedOn(
        tokenizer_name=loaded.config.name,
        tokenizer_sha256=loaded.checkpoint.sha256,
        class_names=CLASSES if config.num_classes == 3 else (),
    )
    generator = Generator(config, trained_on)
    with torch.no_grad():
        for name, parameter in generator.network.named_parameters():
            if name not in TABLES:
                parameter.normal_(std=0.2)
    if with_statistics:
        shape = config.latent_shape
        generator.set_statistics(torch.zeros(shape), torch.ones(shape))
    generator.save(path)
    return path


@pytest.fixture(scope="module")
def generator(tmp_path_factory, checkpoint):
    return save_generator(tmp_path_factory.mktemp("generators") / "tiny-generator", checkpoint)


@pytest.fixture
def generate(run, generator, checkpoint):
    def call(*argv):
        options = ("--tokenizer", checkpoint, "--points", 3, "--device", "cpu")
        outcome = run("generate", generator, *options, *argv)
        assert outcome.status == 0, outcome
        return outcome

    return call


def pictures(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.suffix == ".png"
    }


def test_a_folder_is_balanced_and_can_be_added_to(generate, tmp_path):
    generate("--num", 4, "--output", tmp_path / "samples")
    first = pictures(tmp_path / "samples")
    assert sorted(first) == ["ant/000000.png", "ant/000003.png", "bee, honey/000001.png", "cat/000002.png"]
    (tmp_path / "samples" / "cat" / "000002.png").unlink()
    kept = (tmp_path / "samples" / "ant" / "000000.png").stat().st_mtime_ns
    outcome = generate("--num", 7, "--batch-size", 2, "--output", tmp_path / "samples")
    assert "7 samples, 4 of them new" in outcome.out
    assert (tmp_path / "samples" / "ant" / "000000.png").stat().st_mtime_ns == kept
    generate("--num", 7, "--output", tmp_path / "whole")
    assert {name: first[name] for name in first}.items() <= pictures(tmp_path / "whole").items()
    assert pictures(tmp_path / "samples").keys() == pictures(tmp_path / "whole").keys()


def test_another_kind_of_samples_is_not_mixed_in(generate, refused, generator, checkpoint, tmp_path):
    generate("--num", 2, "--output", tmp_path / "samples")
    options = ["--tokenizer", checkpoint, "--num", 4, "--output", tmp_path / "samples"]
    message = refused("generate", generator, *options, "--points", 4)
    assert "num_points" in message
    message = refused("generate", generator, *options, "--points", 3, "--seed", 1)
    assert "seed" in message
    assert len(pictures(tmp_path / "samples")) == 2


def test_a_folder_of_something_else_is_left_alone(refused, generator, checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.jpg").write_text("a photo")
    refused("generate", generator, "--tokenizer", checkpoint, "--output", tmp_path / "photos")
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "sde"])
def test_a_grid_has_a_row_per_class(sampler, generate, tmp_path):
    generate("--sampler", sampler, "--classes", "bee, honey", "0", "--num", 3, "--output", tmp_path / "g.png")
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.width > 2 * 64
        assert grid.height > 2 * 64


def test_latents_decode_by_the_tokenizer_they_are_of(
    generate, run, refused, checkpoint, other_checkpoint, tmp_path
):
    file = tmp_path / "latents.safetensors"
    generate("--classes", "2,0", "--num", 3, "--output", file)
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
        assert stream.get_tensor("latents").shape == (3, 32, 4, 4)
    assert json.loads(metadata["labels"]) == [2, 0, 2]
    assert run("decode", file, tmp_path / "out", "--checkpoint", checkpoint).status == 0
    one = tmp_path / "one.png"
    assert run("decode", file, one, "--key", "ant/000001", "--checkpoint", checkpoint).status == 0
    assert one.read_bytes() == (tmp_path / "out/0001.png").read_bytes()
    refused("decode", file, tmp_path / "out", "--checkpoint", other_checkpoint)


def test_a_guide_changes_the_samples(generate, checkpoint, tmp_path):
    guide = save_generator(tmp_path / "guide", checkpoint, seed=5)
    generate("--num", 1, "--output", tmp_path / "plain")
    generate("--num", 1, "--guide", guide, "--output", tmp_path / "guided")
    generate("--num", 1, "--scale", 3, "--output", tmp_path / "free")
    found = [pictures(tmp_path / name)["ant/000000.png"] for name in ("plain", "guided", "free")]
    assert len(set(found)) == 3


def test_a_service_may_decode(generate, checkpoint, tmp_path):
    generate("--num", 2, "--output", tmp_path / "here")
    with _serve(create_app(Settings(checkpoint=str(checkpoint), num_decoders=1))) as server:
        generate("--num", 2, "--decode-at", server.url, "--output", tmp_path / "there")
    for name in ("ant/000000.png", "bee, honey/000001.png"):
        with Image.open(tmp_path / "here" / name) as here, Image.open(tmp_path / "there" / name) as there:
            differences = [abs(a - b) for a, b in zip(here.tobytes(), there.tobytes(), strict=True)]
        assert max(differences) <= 3  # latents travel as float16


def test_a_service_of_another_tokenizer_refuses(refused, generator, other_checkpoint, tmp_path):
    with _serve(create_app(Settings(checkpoint=str(other_checkpoint), num_decoders=1))) as server:
        options = ["--points", 2, "--num", 1, "--output", tmp_path / "there"]
        message = refused("generate", generator, "--decode-at", server.url, *options, status=1)
    assert "status 422" in message
    assert pictures(tmp_path / "there") == {}


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--classes", "dog"], 2),
        (["--classes", "3"], 2),
        (["--classes", ","], 2),
        (["--scale", "nan"], 2),
        (["--scale", "2", "--interval", "0.5", "0.1"], 2),
        (["--points", "1"], 2),
        (["--shift", "0.5"], 2),
        (["--guide", "nowhere"], 2),
        (["--decode-at", "http://127.0.0.1:9"], 1),
    ],
)
def test_what_cannot_be_done_leaves_no_picture(options, status, refused, generator, checkpoint, tmp_path):
    common = ["--tokenizer", checkpoint, "--points", "2", "--num", "1", "--output", tmp_path / "grid.png"]
    message = refused("generate", generator, *common, *options, status=status) if options else ""
    assert message
    assert not (tmp_path / "grid.png").exists()


def test_a_generator_of_another_tokenizer_is_refused_unless_forced(
    run, refused, generator, other_checkpoint, tmp_path
):
    options = ["--points", 2, "--num", 1, "--tokenizer", other_checkpoint, "--output", tmp_path / "grid.png"]
    message = refused("generate", generator, *options)
    assert "trained on the latents of tokenizer 'tiny'" in message
    assert run("generate", generator, *options, "--force").status == 0


def test_a_guide_of_another_shape_or_tokenizer_is_refused(
    refused, generator, checkpoint, other_checkpoint, tmp_path
):
    common = ["--tokenizer", checkpoint, "--output", tmp_path / "grid.png"]
    for name, made in (
        ("classes", {"tokenizer": checkpoint, "num_classes": 4}),
        ("tokenizer", {"tokenizer": other_checkpoint}),
    ):
        guide = save_generator(tmp_path / f"guide-{name}", **made)
        assert "guide" in refused("generate", generator, *common, "--guide", guide)


def test_without_statistics_there_are_no_pictures(refused, checkpoint, tmp_path):
    bare = save_generator(tmp_path / "bare", checkpoint, with_statistics=False)
    message = refused("generate", bare, "--tokenizer", checkpoint, "--output", tmp_path / "grid.png")
    assert "no latent statistics" in message


def test_a_tokenizer_is_no_generator(refused, checkpoint, tmp_path):
    assert "a generator is needed" in refused("generate", checkpoint, "--output", tmp_path / "grid.png")


def test_a_full_disk_leaves_whole_pictures_alone(generate, run, generator, checkpoint, tmp_path, monkeypatch):
    from cli import files

    written = []

    def write(path, data):
        written.append(path)
        if len(written) == 3:  # samples.json is the first
            raise files.CommandError(f"{path}: cannot be written: No space left on device")
        original(path, data)

    original = files.write_file
    monkeypatch.setattr(files, "write_file", write)
    options = ["--tokenizer", checkpoint, "--points", 3, "--num", 3, "--output", tmp_path / "samples"]
    assert run("generate", generator, *options).status == 1
    monkeypatch.setattr(files, "write_file", original)
    assert list(pictures(tmp_path / "samples")) == ["ant/000000.png"]
    generate("--num", 3, "--output", tmp_path / "samples")
    assert len(pictures(tmp_path / "samples")) == 3
