"""Which files a pull takes, from listings as they are published."""

import re

import pytest

from cli.errors import UsageError
from cli.hub.names import RAE_FILES, SOURCES, choose_files, parse_target
from model.config import PRESETS

SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"]),
        (["config.json", "pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin"]),
        (["model.safetensors", "sub/model.safetensors"], ["model.safetensors"]),
        (["README.md", "sub/config.json", "sub/model.pt", "sub/stat.pt"],
         ["sub/config.json", "sub/model.pt", "sub/stat.pt"]),
        ([*SHARDS, "model.safetensors.index.json", "pytorch_model.bin.index.json"],
         [*SHARDS, "model.safetensors.index.json"]),
        (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
         ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
         ["diffusion_pytorch_model.safetensors"]),
        (["config.json", "model.fp16.safetensors", "model.pt"], ["config.json", "model.fp16.safetensors"]),
        (["model.safetensors", "stat.pt"], ["model.safetensors", "stat.pt"]),
        (["encoder.safetensors", "fusion.safetensors", "config.json"],
         ["encoder.safetensors", "fusion.safetensors", "config.json"]),
    ],
)  # fmt: skip
def test_choice(files, chosen):
    assert choose_files("some/model", files) == chosen


def test_a_collection_names_its_short_names():
    files = [file for source in SOURCES.values() for file in source.files]
    with pytest.raises(UsageError, match=r"holds \d+ models .*pull one by its name: rae-decoder-dinov2-s, "):
        choose_files(RAE_FILES, files)
    for source in SOURCES.values():
        if source.files:
            assert choose_files(RAE_FILES, files, source.files) == list(source.files)


def test_patterns_are_of_whole_paths():
    files = ["a/model.pt", "b/model.pt", "b/c/[x].pt"]
    assert choose_files("some/model", files, ["b/"]) == files[1:]
    assert choose_files("some/model", files, ["*.pt"]) == files
    with pytest.raises(UsageError, match=re.escape("some/model: has no file model.pt")):
        choose_files("some/model", files, ["a/*", "model.pt"])


def test_targets():
    assert parse_target("facebook/dinov2-base") == ("facebook/dinov2-base", None)
    assert parse_target("facebook/dinov2-base@refs/pr/4") == ("facebook/dinov2-base", "refs/pr/4")
    for target in ("", "@main", "facebook/dinov2-base@"):
        with pytest.raises(UsageError):
            parse_target(target)


def test_sources_are_consistent():
    assert all(source.encoder in SOURCES for source in SOURCES.values() if source.encoder)
    assert not {"mini", *PRESETS} & {name for name in SOURCES if name.startswith("rae-")}
