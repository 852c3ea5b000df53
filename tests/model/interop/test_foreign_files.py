"""Files of other libraries: every way in which they can be broken or hostile is a sentence."""

import contextlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.errors import CheckpointError
from model.interop.foreign_files import read_folder, read_json, read_tensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


class Hostile:
    """Unpickled by a careless program, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(read, *arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("inside", [True, False], ids=["among tensors", "alone"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, is_zip, inside):
    trap = Hostile(tmp_path / "ran")
    contents = {**TENSORS, "trap": trap} if inside else trap
    torch.save(contents, tmp_path / "model.pt", _use_new_zipfile_serialization=is_zip)
    message = refused(read_tensors, tmp_path / "model.pt")
    assert message.startswith(f"{tmp_path / 'model.pt'}: a pickle that asks for ")
    assert "mkdir, which is code and not a tensor: it was not run" in message
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_with_code(tmp_path):
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    assert "model.bin: " in refused(read_tensors, tmp_path / "model.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_truncated_and_flipped_pickles_are_sentences(tmp_path, is_zip):
    file = tmp_path / "model.pt"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=is_zip)
    whole = file.read_bytes()
    for size in range(0, len(whole), max(len(whole) // 80, 1)):
        file.write_bytes(whole[:size])
        assert refused(read_tensors, file).startswith(f"{file}: ")
    for position in range(0, len(whole), max(len(whole) // 200, 1)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x55
        file.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):  # anything else fails the test
            assert read_tensors(file).tensors  # a flipped number, or a name


def test_both_formats_of_pickles_and_safetensors_read_alike(tmp_path):
    torch.save(TENSORS, tmp_path / "zip.pt")
    torch.save(TENSORS, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(TENSORS, tmp_path / "safe.safetensors")
    for name in ("zip.pt", "legacy.pt", "safe.safetensors"):
        found = read_tensors(tmp_path / name)
        assert found.files == (tmp_path / name,)
        assert found.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ([], "holds list, expected a dictionary of tensors"),
        ({}, "holds dict, expected a dictionary of tensors"),
        ({"a": 1}, "entry 'a' is int, expected a tensor"),
        ({1: torch.zeros(1)}, "entry 1 is Tensor, expected a tensor"),
        (torch.zeros(2), "holds Tensor, expected a dictionary of tensors"),
    ],
)
def test_pickles_of_something_else(tmp_path, contents, expected):
    torch.save(contents, tmp_path / "x.pt")
    assert refused(read_tensors, tmp_path / "x.pt") == f"{tmp_path / 'x.pt'}: {expected}"


@pytest.mark.parametrize("data", [b"", b"\x80", b"text", b"PK\x03\x04", bytes(1000), b"\x80\x02}q\x00."])
def test_bytes_that_are_no_weights(tmp_path, data):
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(data)
        assert refused(read_tensors, tmp_path / name).startswith(f"{tmp_path / name}: ")


def test_a_zip_of_something_else(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    assert "x.pt: not a readable PyTorch file" in refused(read_tensors, tmp_path / "x.pt")


def test_missing_files_and_directories(tmp_path):
    assert refused(read_tensors, tmp_path / "no.pt") == f"{tmp_path / 'no.pt'}: there is no such file"
    assert refused(read_tensors, tmp_path) == f"{tmp_path}: is a directory, expected a file"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds no JSON object"),
        ("\xff", "not valid JSON"),
    ],
    ids=["cut", "deep", "list", "bytes"],
)
def test_json_that_is_no_configuration(tmp_path, text, expected):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert f"config.json: {expected}" in refused(read_json, tmp_path / "config.json")


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two safetensors files and their index."""
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_shards_are_joined(shards):
    found = read_folder(shards, "model", "pytorch_model")
    assert found.tensors.keys() == TENSORS.keys()
    names = ["model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"]
    assert [file.name for file in found.files] == names


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({}, "field 'weight_map' does not map tensors to files"),
        (None, "field 'weight_map' does not map tensors to files"),
        ({"b": "../model-1.safetensors"}, "'b' is in '../model-1.safetensors', no file name"),
        ({"b": 3}, "'b' is in 3, no file name"),
        ({"b": "model-7.safetensors"}, "model-7.safetensors: there is no such file"),
        ({"c": "model-1.safetensors"}, "model-1.safetensors: tensor 'c' is missing"),
    ],
)
def test_an_index_that_lies(shards, weight_map, expected):
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert expected in refused(read_folder, shards, "model")
