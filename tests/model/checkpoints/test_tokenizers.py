"""Checkpoints: exact round trips, atomic writes, and every broken one named."""

import errno
import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.checkpoints.directory
import model.tokenizer
from model.checkpoints.directory import read_parts
from model.checkpoints.tokenizers import CheckpointInfo, open_checkpoint, resolve_checkpoint
from model.errors import CheckpointError
from model.tokenizer import Tokenizer

PROVENANCE = {"phase": "test", "steps": 3}


@pytest.fixture
def checkpoint(tokenizer, tmp_path) -> Path:
    """A saved tiny tokenizer with statistics."""
    shape = tokenizer.config.latent_shape
    tokenizer.set_statistics(torch.randn(shape), torch.rand(shape))
    tokenizer.save(tmp_path / "tiny", provenance=PROVENANCE)
    return tmp_path / "tiny"


def edit_config(checkpoint: Path, **changes) -> None:
    file = checkpoint / "config.json"
    fields = json.loads(file.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        target = fields
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(json.dumps(fields))


def rewrite_part(checkpoint: Path, part: str, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces a part with a file whose size and digest are consistent with ``config.json``."""
    file = checkpoint / f"{part}.safetensors"
    save_file(tensors, file)
    digest = model.checkpoints.directory.file_sha256(file)
    edit_config(checkpoint, **{f"files__{part}": {"sha256": digest, "num_bytes": file.stat().st_size}})


def refused(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(checkpoint)
    return str(caught.value)


def test_round_trip_is_bit_for_bit(tokenizer, checkpoint, images):
    loaded = Tokenizer.load(checkpoint, fusion="reference")
    ours, theirs = tokenizer.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(loaded.encode(images, normalize=True), tokenizer.encode(images, normalize=True))
    assert torch.equal(loaded.reconstruct(images), tokenizer.reconstruct(images))
    assert loaded.config == tokenizer.config
    assert loaded.checkpoint.provenance == PROVENANCE
    assert loaded.checkpoint.name == "tiny"


def test_stored_in_half_precision_loads_as_float32(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "half", storage_dtype=torch.float16)
    loaded = Tokenizer.load(tmp_path / "half")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tokenizer.get_parameter(name).half().float())


def test_two_saves_have_the_same_sha256(tokenizer, tmp_path):
    one = tokenizer.save(tmp_path / "one", provenance=PROVENANCE)
    other = tokenizer.save(tmp_path / "deep" / "other", provenance=PROVENANCE)
    assert one.sha256 == other.sha256
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "deep" / "other" / file.name).read_bytes()


def test_sha256_changes_with_any_weight(tokenizer, tmp_path):
    before = tokenizer.save(tmp_path / "c")
    with torch.no_grad():
        tokenizer.fusion.mixer.router.bias[0] += 1
    assert tokenizer.save(tmp_path / "c").sha256 != before.sha256


def test_info_is_the_same_from_saving_and_loading(tokenizer, tmp_path):
    saved = tokenizer.save(tmp_path / "c", provenance=PROVENANCE)
    loaded = Tokenizer.load(tmp_path / "c").checkpoint
    assert saved == loaded == CheckpointInfo(tmp_path / "c", "tiny", saved.sha256, 1, PROVENANCE)


@pytest.mark.parametrize(
    ("function", "call"), [("save_file", 1), ("save_file", 2), ("_sync_tree", 1), ("replace_directory", 1)]
)
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    function, call, tokenizer, checkpoint, monkeypatch
):
    old_sha256 = Tokenizer.load(checkpoint).checkpoint.sha256
    original, calls = getattr(model.checkpoints.directory, function), []

    def fill_the_disk(*args):
        calls.append(args)
        if len(calls) < call:
            return original(*args)
        if function == "save_file":
            args[1].write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model.checkpoints.directory, function, fill_the_disk)
    with torch.no_grad():
        tokenizer.decoder.class_token += 1
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(checkpoint)
    assert os.listdir(checkpoint.parent) == [checkpoint.name]
    assert Tokenizer.load(checkpoint).checkpoint.sha256 == old_sha256


def test_a_failed_swap_puts_the_old_checkpoint_back(tokenizer, checkpoint, monkeypatch):
    rename, old_sha256 = os.rename, Tokenizer.load(checkpoint).checkpoint.sha256

    def refuse_the_new_one(source, target):
        if str(source).endswith(".partial"):
            raise PermissionError(errno.EACCES, "refused")
        rename(source, target)

    monkeypatch.setattr(model.checkpoints.directory.os, "rename", refuse_the_new_one)
    with pytest.raises(PermissionError):
        tokenizer.save(checkpoint)
    assert os.listdir(checkpoint.parent) == [checkpoint.name]
    assert Tokenizer.load(checkpoint).checkpoint.sha256 == old_sha256


def test_an_interrupt_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.checkpoints.directory, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_checkpoint_replaces_it_whole(tokenizer, checkpoint):
    (checkpoint / "left-over.safetensors").write_bytes(b"old")
    tokenizer.save(checkpoint)
    assert {file.name for file in checkpoint.iterdir()} == {
        "config.json",
        *(f"{part}.safetensors" for part in ("encoder", "fusion", "decoder", "statistics")),
    }


def test_saving_never_replaces_what_is_no_checkpoint(tokenizer, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    tokenizer.save(photos)  # empty: nothing to lose
    (photos / "config.json").unlink()
    with pytest.raises(FileExistsError, match="photos"):
        tokenizer.save(photos)
    assert (photos / "encoder.safetensors").is_file()
    file = tmp_path / "notes.txt"
    file.write_text("keep")
    with pytest.raises(NotADirectoryError, match="notes"):
        tokenizer.save(file)
    assert file.read_text() == "keep"


@pytest.mark.parametrize("kept", [0, 5, 40, 2000, -10])
def test_truncated_file_is_named_with_its_first_lost_tensor(checkpoint, kept):
    file = checkpoint / "decoder.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:kept])
    message = refused(checkpoint)
    assert str(file) in message
    assert "truncated" in message
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    if len(raw[:kept]) < header_end:
        assert "its header is not whole" in message
    else:
        lost = [name for name in load_file_from(raw) if repr(name) in message]
        assert len(lost) == 1


def test_a_truncated_file_with_a_deep_header_is_refused(checkpoint):
    header = b"[" * 100_000
    (checkpoint / "decoder.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    assert "its header is corrupt" in refused(checkpoint)


def test_errors_stay_short_whatever_the_configuration_holds(checkpoint):
    edit_config(checkpoint, version="x" * 100_000)
    assert len(refused(checkpoint)) < 1000
    edit_config(checkpoint, version=1, **{"x" * 100_000: 1})
    assert len(refused(checkpoint)) < 1000


def load_file_from(raw: bytes) -> list[str]:
    header_bytes = struct.unpack("<Q", raw[:8])[0]
    return [name for name in json.loads(raw[8 : 8 + header_bytes]) if name != "__metadata__"]


@pytest.mark.parametrize("position", [0, 100, -1])
def test_flipped_bit_is_found(checkpoint, position):
    file = checkpoint / "fusion.safetensors"
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)
    assert refused(checkpoint).startswith(f"{file}: sha256 differs from config.json")


def test_header_that_lies_consistently_is_named(checkpoint):
    file = checkpoint / "fusion.safetensors"
    file.write_bytes(b"not a safetensors file at all")
    digest = model.checkpoints.directory.file_sha256(file)
    edit_config(checkpoint, files__fusion={"sha256": digest, "num_bytes": file.stat().st_size})
    assert refused(checkpoint).startswith(f"{file}: not a readable safetensors file")


def test_missing_tensor_is_named(checkpoint):
    file = checkpoint / "encoder.safetensors"
    tensors = load_file(file)
    del tensors["blocks.2.mlp.up.weight"]
    rewrite_part(checkpoint, "encoder", tensors)
    assert refused(checkpoint) == f"{file}: tensor 'blocks.2.mlp.up.weight' is missing"


def test_extra_tensor_is_named(checkpoint):
    file = checkpoint / "decoder.safetensors"
    rewrite_part(checkpoint, "decoder", load_file(file) | {"mask_token": torch.zeros(1)})
    assert refused(checkpoint) == f"{file}: unexpected tensor 'mask_token'"


def test_misshaped_tensor_is_named(checkpoint):
    file = checkpoint / "fusion.safetensors"
    rewrite_part(checkpoint, "fusion", load_file(file) | {"mixer.router.bias": torch.zeros(3)})
    assert refused(checkpoint) == f"{file}: tensor 'mixer.router.bias' has shape [3], expected [4]"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensor_is_named(checkpoint, value):
    file = checkpoint / "encoder.safetensors"
    tensors = load_file(file)
    tensors["positions"][0, 3, 5] = value
    rewrite_part(checkpoint, "encoder", tensors)
    assert refused(checkpoint) == f"{file}: tensor 'positions' holds a NaN or infinite value"


def test_integer_tensor_is_named(checkpoint):
    tensors = load_file(checkpoint / "fusion.safetensors")
    tensors["mixer.router.bias"] = tensors["mixer.router.bias"].long()
    rewrite_part(checkpoint, "fusion", tensors)
    assert "tensor 'mixer.router.bias' has dtype torch.int64" in refused(checkpoint)


@pytest.mark.parametrize(
    "statistics",
    [{"mean": torch.zeros(32, 4, 4)}, {"mean": torch.zeros(32, 4, 4), "var": torch.zeros(1)}],
    ids=["incomplete", "misshaped"],
)
def test_broken_statistics_name_their_file(checkpoint, statistics):
    rewrite_part(checkpoint, "statistics", statistics)
    message = refused(checkpoint)
    assert str(checkpoint / "statistics.safetensors") in message
    assert "var" in message


def test_statistics_load_whatever_the_order_of_the_records(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    edit_config(checkpoint, files=dict(reversed(config["files"].items())))
    assert Tokenizer.load(checkpoint).latent_mean.device.type == "cpu"


def test_missing_part_file_is_named(checkpoint):
    (checkpoint / "fusion.safetensors").unlink()
    assert refused(checkpoint).startswith(f"{checkpoint / 'fusion.safetensors'}: cannot be read")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 2}, "format version 2; this build reads version 1"),
        ({"version": None}, "format version None"),
        ({"format": "diffusers"}, "field 'format' is not 'drorae-tokenizer'"),
        ({"tokenizer__encoder__widht": 3}, "field 'tokenizer.encoder.widht'"),
        ({"tokenizer__fusion__beta": 7}, "field 'tokenizer.fusion.beta'"),
        ({"tokenizer__encoder__num_heads": 5}, "width=32 is not divisible by num_heads=5"),
        ({"files__generator": {"sha256": "0" * 64, "num_bytes": 1}}, "field 'files.generator"),
        ({"files__encoder__sha256": "xyz"}, "field 'files.encoder.sha256'"),
        ({"extra": 1}, "field 'extra'"),
        ({"tokenizer__fusion": None}, "has 'fusion' but the tokenizer has none"),
    ],
)
def test_config_errors_name_the_file_and_the_field(checkpoint, changes, expected):
    edit_config(checkpoint, **changes)
    message = refused(checkpoint)
    assert message.startswith(str(checkpoint / "config.json"))
    assert expected in message


def test_config_without_a_required_part(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["files"]["decoder"]
    edit_config(checkpoint, files=config["files"])
    assert "field 'files' lacks 'decoder'" in refused(checkpoint)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe\x00", b"null"])
def test_config_that_is_no_object(checkpoint, raw):
    (checkpoint / "config.json").write_bytes(raw)
    assert refused(checkpoint).startswith(str(checkpoint / "config.json"))


def test_oversized_config_is_not_read(checkpoint, monkeypatch):
    monkeypatch.setattr(model.checkpoints.directory, "MAX_CONFIG_BYTES", 10)
    assert "over 10 bytes" in refused(checkpoint)


@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_deep_configurations_are_refused(checkpoint, depth):
    text = (checkpoint / "config.json").read_text().rstrip().removesuffix("}")
    (checkpoint / "config.json").write_text(text + ',"provenance":{"x":' + "[" * depth + "]" * depth + "}}")
    assert re.fullmatch(
        r".*config\.json: (nested deeper than 64 levels|not valid JSON: .*)", refused(checkpoint)
    )


def test_what_is_no_regular_file_is_not_opened(checkpoint):
    """A pipe would wait for a writer; /dev/zero has no end."""
    for name in ("decoder.safetensors", "config.json"):
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        assert refused(checkpoint) == f"{checkpoint / name}: no regular file"
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to("/dev/zero")
    assert refused(checkpoint) == f"{checkpoint / 'config.json'}: no regular file"


def test_sparse_files_are_refused_before_they_are_read(checkpoint):
    file = checkpoint / "decoder.safetensors"
    os.truncate(file, 2**40)
    edit_config(checkpoint, files__decoder={"sha256": "0" * 64, "num_bytes": 2**40})
    assert f"{file}: {2**40} bytes are more than" in refused(checkpoint)


def test_headers_larger_than_any_of_ours_are_not_parsed(checkpoint, monkeypatch):
    monkeypatch.setattr(model.checkpoints.directory, "MAX_HEADER_BYTES", 2**10)
    assert "not a readable safetensors file: a header of" in refused(checkpoint)


LARGE = {"depth": 64, "width": 8192, "num_heads": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": LARGE},
        {"encoder": {**LARGE, "mlp_ratio": 512}},
        {"encoder": {"positions": "sincos", "position_grid": 128}},
        {"encoder": {"num_registers": 64}},
        {"decoder": {**LARGE, "mlp_width": 8192}},
        {"fusion": {"hidden_width": 8192}},
        {"encoder": {"patch_size": 1, "image_size": 1024}, "decoder": {"patch_size": 1}, "image_size": 1024},
        {"encoder": {"image_size": 896}, "decoder": {"patch_size": 8, "width": 8192}, "image_size": 1024},
        {"decoder": {"position_span": 10**400}},
    ],
)
def test_architectures_of_other_sizes_are_refused_before_anything_is_allocated(
    checkpoint, changes, monkeypatch
):
    """A file that was read, or a buffer that was computed, would show here."""

    def fail(*_, **__):
        raise AssertionError("allocated")

    monkeypatch.setattr(model.checkpoints.directory, "load_file", fail)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor.is_meta or fail())
    monkeypatch.setattr(model.tokenizer.Decoder, "constants", refuse_to_compute(fail))
    fields = json.loads((checkpoint / "config.json").read_text())
    for name, value in changes.items():
        if isinstance(value, dict):
            fields["tokenizer"][name] |= value
        else:
            fields["tokenizer"][name] = value
    (checkpoint / "config.json").write_text(json.dumps(fields))
    message = refused(checkpoint)
    assert message.startswith(str(checkpoint))
    assert message.count("\n") == 0


def refuse_to_compute(fail):
    """`Decoder.constants` that may give shapes alone."""
    constants = model.tokenizer.Decoder.constants

    def shapes(config):
        found = constants(config)
        return found if all(tensor.is_meta for tensor in found.values()) else fail()

    return staticmethod(shapes)


def test_a_directory_without_config_is_no_checkpoint(tmp_path):
    assert refused(tmp_path) == f"{tmp_path} is no checkpoint: it has no config.json"


def test_a_file_is_no_checkpoint(checkpoint):
    file = checkpoint / "encoder.safetensors"
    assert refused(file) == f"{file} is a file: a checkpoint is a directory with config.json"


def test_a_missing_directory_lists_the_bundled_names(tmp_path):
    message = refused(tmp_path / "nowhere")
    assert message.startswith(f"no checkpoint directory at {tmp_path / 'nowhere'}; bundled checkpoints: ")


def test_a_preset_without_weights_says_so():
    with pytest.raises(CheckpointError, match="'dinov2-b' has no bundled weights"):
        resolve_checkpoint("dinov2-b")


def test_reading_gives_what_was_written(tokenizer, checkpoint):
    parts = read_parts(checkpoint, open_checkpoint(checkpoint).files, tokenizer.shapes())
    assert set(parts) == {"encoder", "fusion", "decoder", "statistics"}
    written = tokenizer.decoder.state_dict()
    assert all(torch.equal(parts["decoder"][name], tensor) for name, tensor in written.items())


def test_files_are_as_readable_as_their_configuration(checkpoint: Path) -> None:
    assert len({file.stat().st_mode for file in checkpoint.iterdir()}) == 1
