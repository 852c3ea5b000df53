"""One unit to one file: what it holds, what is left out, and that equal units give equal bytes."""

import hashlib
import os
import socket
import subprocess

import pytest
import torch

from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, encode_png, make_image
from training.errors import LatentsError
from training.latents.encoding import decode_unit, encode_unit, latent_encoder
from training.latents.manifest import Identity
from training.latents.shards import read_header, read_receipt, read_record, read_tensors, receipt_name
from training.latents.store import FolderStore
from training.latents.units import Unit, UnitImage

CPU = torch.device("cpu")
LATENT_SHAPE = (32, 4, 4)


def make_identity(**changes) -> Identity:
    fields = {
        "model": "tiny",
        "checkpoint_sha256": "0" * 64,
        "latent": "base",
        "normalized": False,
        "dtype": "float16",
        "shape": LATENT_SHAPE,
        "flip": False,
        "fit": "crop",
        "image_size": 32,
        "precision": "float32",
        "batch_size": 4,
        "images_per_shard": 8,
        **changes,
    }
    return Identity(**fields)


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(7)
    return Tokenizer(TINY).eval()


@pytest.fixture
def unit(tmp_path) -> Unit:
    """Seven images, of which the third is none."""
    images = []
    for index in range(7):
        file = tmp_path / f"{index}.png"
        file.write_bytes(b"no image" if index == 2 else encode_png(make_image(index)))
        images.append(UnitImage(str(index), str(file), None, None, index * 10))
    return Unit(3, "photos", 100, tuple(images))


def encode(unit, tokenizer, identity, store):
    encoder = latent_encoder(tokenizer, identity)
    return encode_unit(unit, decode_unit(unit, identity), encoder, identity, CPU, store)


def test_a_file_holds_the_images_that_can_be_read_and_names_the_others(unit, tokenizer, tmp_path):
    identity, store = make_identity(flip=True), FolderStore(tmp_path / "latents")
    record = encode(unit, tokenizer, identity, store)
    assert (record.name, record.n, record.broken) == ("latents-000003.safetensors", 6, 1)
    assert store.names() == {record.name, receipt_name(record.name)}
    assert read_receipt(store, record.name) == record
    info = read_header(store, record.name).info
    assert info.keys == ("0", "1", "3", "4", "5", "6")
    assert [(broken.position, broken.key) for broken in info.broken] == [(102, "2")]
    assert info.is_of(unit, identity)
    assert not info.is_of(unit, make_identity(flip=False))
    found = read_tensors(store, record.name, ["latents", "latents_flip", "labels", "moments.mean"])
    assert found["labels"].tolist() == [0, 10, 30, 40, 50, 60]
    assert found["latents"].shape == (6, *LATENT_SHAPE)
    both = torch.cat([found["latents"], found["latents_flip"]]).double()
    torch.testing.assert_close(found["moments.mean"], both.mean(dim=0))
    assert read_record(store, record.name) == record
    data = store.read(record.name)
    assert hashlib.sha256(data).hexdigest() == record.sha256


def test_equal_units_give_equal_bytes_and_a_broken_image_changes_no_other_row(unit, tokenizer, tmp_path):
    identity = make_identity()
    stores = [FolderStore(tmp_path / name) for name in ("a", "b", "c")]
    first, second = (encode(unit, tokenizer, identity, store) for store in stores[:2])
    assert first == second
    (tmp_path / "2.png").write_bytes(encode_png(make_image(2)))
    repaired = encode(unit, tokenizer, identity, stores[2])
    assert repaired.n == 7
    before = read_tensors(stores[0], first.name, ["latents"])["latents"]
    after = read_tensors(stores[2], first.name, ["latents"])["latents"]
    assert torch.equal(before, after[[0, 1, 3, 4, 5, 6]])


def test_a_unit_of_broken_images_gives_a_file_without_rows(tokenizer, tmp_path):
    unit = Unit(0, "photos", 0, (UnitImage("a", str(tmp_path / "gone.png"), None, None),))
    store = FolderStore(tmp_path / "latents")
    assert encode(unit, tokenizer, make_identity(), store).n == 0
    assert read_tensors(store, unit.file_name, ["latents"])["latents"].shape == (0, *LATENT_SHAPE)
    assert "No such file" in read_header(store, unit.file_name).info.broken[0].reason


def test_a_value_beyond_the_dtype_is_refused_by_the_image_s_name(unit, tmp_path):
    def overflow(pixels):
        return torch.full((len(pixels), 1, *LATENT_SHAPE), 1e6).half()

    identity, store = make_identity(), FolderStore(tmp_path / "latents")
    with pytest.raises(LatentsError, match=r"^0 in photos.*float16"):
        encode_unit(unit, decode_unit(unit, identity), overflow, identity, CPU, store)
    assert store.names() == set()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40], lambda data: b"", bytes.upper]
)
def test_a_damaged_file_is_told_by_its_header(damage, unit, tokenizer, tmp_path):
    store = FolderStore(tmp_path / "latents")
    name = encode(unit, tokenizer, make_identity(), store).name
    store.write(name, damage(store.read(name)))
    with pytest.raises(LatentsError, match=name):
        read_header(store, name)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    store = FolderStore(tmp_path)
    store.write("whole", b"1")
    (tmp_path / ".other.tmp-elsewhere-1").touch()
    this = f".tmp-{socket.gethostname()}-"
    (tmp_path / f".whole{this}99999999").touch()
    (tmp_path / f".kept{this}{os.getpid()}").touch()
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as ended:
        ended.stdout.read()  # it has ended, and nobody has waited for it
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        (tmp_path / f".ended{this}{ended.pid}").touch()
        store.remove_remains()
    left = {".other.tmp-elsewhere-1", f".kept{this}{os.getpid()}", "whole"}
    assert {file.name for file in tmp_path.iterdir()} == left
