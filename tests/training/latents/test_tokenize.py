"""The command: the same bytes whoever makes them and however often, and what is refused."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from model.images.files import fit_picture
from model.images.tensors import to_byte_tensor
from model.tokenizer import Tokenizer
from tests.training.conftest import ROOT, encode_png, make_image, write_shard
from tests.training.latents.conftest import BROKEN, digests
from training.data.batches import decode_image
from training.errors import DataError, LatentsError, TrainingError, WorkerError
from training.latents import tokenize
from training.latents.engine import LocalEngine
from training.latents.lanes import Encoded
from training.latents.manifest import read_manifest
from training.latents.shards import read_header
from training.latents.store import FolderStore
from training.latents.tokenize import TokenizeOptions, tokenize_command


def command_line(options: TokenizeOptions) -> list[str]:
    flags = [
        "--output",
        str(options.output),
        "--checkpoint",
        options.checkpoint,
        "--batch-size",
        "4",
        "--flip",
    ]
    return [sys.executable, "-m", "cli.main", "tokenize", *map(str, options.data), *flags, "--workers", "1"]


def test_the_folder_has_every_image_its_name_label_and_statistics(expected, options):
    tokenize_command(options)
    store = FolderStore(options.output)
    manifest = read_manifest(store)
    assert (manifest.complete, manifest.totals.images, manifest.totals.broken) == (True, 41, 1)
    assert manifest.classes == ("class0", "class1")
    assert [one.name for one in manifest.inputs] == ["photos", "a.tar", "b.tar.gz"]
    assert set(expected) == {record.name for record in manifest.shards} | {
        "manifest.json",
        "statistics.safetensors",
        "latents_stats.pt",
    }
    rows, latents = [], []
    for record in manifest.shards:
        tensors, info = load_file(options.output / record.name), read_header(store, record.name).info
        assert len(info.keys) == len(tensors["labels"]) == record.n
        rows += zip(info.keys, tensors["labels"].tolist(), strict=True)
        latents += [tensors["latents"], tensors["latents_flip"]]
    names = [f"class{c}/{i:02d}" for c in range(2) for i in range(c, 20, 2) if i != BROKEN]
    assert rows == [(name, int(name[5])) for name in names] + [(str(i), -1) for i in range(20, 42)]
    found, whole = load_file(options.output / "statistics.safetensors"), torch.cat(latents).double()
    torch.testing.assert_close(found["mean"], whole.mean(dim=0).float())
    torch.testing.assert_close(found["var"], whole.var(dim=0, correction=0).float())
    torch.testing.assert_close(found["channel_mean"], whole.mean(dim=(0, 2, 3)).float())
    torch.testing.assert_close(found["channel_var"], whole.var(dim=(0, 2, 3), correction=0).float())
    assert found["count"].tolist() == [82]


def test_latents_are_those_of_the_tokenizer(expected, options, checkpoint, data):
    tokenize_command(options)
    first = load_file(options.output / "latents-000000.safetensors")
    tokenizer = Tokenizer.load(checkpoint)
    pixels = to_byte_tensor(fit_picture(decode_image(encode_png(make_image(0))), 32))[None]
    torch.testing.assert_close(first["latents"][:1].float(), tokenizer.encode(pixels), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        first["latents_flip"][:1].float(), tokenizer.encode(pixels.flip(-1)), atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize("num_workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(expected, options, num_workers):
    assert tokenize_command(replace(options, num_workers=num_workers)) == 3
    assert digests(options.output) == expected


@pytest.mark.parametrize(
    "order", [[(0, 1)], [(1, 2), (0, 2)], [(2, 3), (0, 3), (1, 3)], [(0, 2), (2, 3), (0, 1)]]
)
def test_any_split_by_shard_gives_the_same_bytes(expected, options, order):
    statuses = [tokenize_command(replace(options, part=part)) for part in order]
    assert statuses == [0] * (len(order) - 1) + [3]
    assert digests(options.output) == expected


def test_decoder_processes_give_the_same_bytes(expected, options, monkeypatch):
    def with_decoders(*arguments):
        engine = local_engine(*arguments)
        engine._configs = [replace(config, num_decoders=2) for config in engine._configs]
        return engine

    local_engine = tokenize.local_engine
    monkeypatch.setattr(tokenize, "local_engine", with_decoders)
    tokenize_command(options)
    assert digests(options.output) == expected


def test_a_command_killed_at_any_file_goes_on(expected, options):
    """The kill comes when a number of files is there; where it is too late, resuming does nothing."""
    for wanted in (1, 6):
        process = subprocess.Popen(
            command_line(options), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(options.output.glob("latents-*"))) < wanted:
            pass
        process.kill()
        process.wait()
    tokenize_command(options)
    assert digests(options.output) == expected


def test_a_killed_lane_is_replaced(expected, options, monkeypatch):
    def killing(self):
        kills = iter((2, 12))  # at different units
        num_images, kill_at = 0, next(kills)
        for event in run(self):
            num_images += event.num_images if isinstance(event, Encoded) else 0
            if num_images >= kill_at and self._lanes:
                os.kill(self._lanes[0].process.pid, signal.SIGKILL)
                kill_at = next(kills, 100)
            yield event

    run = LocalEngine.run
    monkeypatch.setattr(LocalEngine, "run", killing)
    tokenize_command(options)
    assert digests(options.output) == expected


def test_a_unit_whose_process_ends_again_and_again_is_named(options, monkeypatch):
    def killing(self):
        for event in run(self):
            for lane in self._lanes:
                os.kill(lane.process.pid, signal.SIGKILL)
            yield event

    run = LocalEngine.run
    monkeypatch.setattr(LocalEngine, "run", killing)
    with pytest.raises(WorkerError, match="3 processes ended"):
        tokenize_command(options)


def test_a_finished_folder_is_left_alone_and_what_is_lost_is_made_again(expected, options, caplog):
    tokenize_command(options)
    before = {file: file.stat().st_mtime_ns for file in options.output.iterdir()}
    assert tokenize_command(options) == 3
    assert {file: file.stat().st_mtime_ns for file in options.output.iterdir()} == before
    cut, gone, flipped = (options.output / f"latents-{number:06d}.safetensors" for number in (1, 4, 7))
    cut.write_bytes(cut.read_bytes()[:-5])
    gone.unlink()
    contents = bytearray(flipped.read_bytes())
    contents[-1] ^= 1
    flipped.write_bytes(contents)
    tokenize_command(options)
    assert [name for name, digest in digests(options.output).items() if digest != expected[name]] == [
        flipped.name
    ]
    tokenize_command(replace(options, verify=True))
    assert digests(options.output) == expected
    assert f"{flipped}: its checksum is another" in caplog.text


def test_retrying_takes_images_that_were_repaired(expected, options, data, tmp_path):
    copy = tmp_path / "photos"
    shutil.copytree(data[0], copy)
    options = replace(options, data=[copy, *data[1:]])
    tokenize_command(options)
    (copy / "class1" / f"{BROKEN:02d}.png").write_bytes(encode_png(make_image(BROKEN)))
    with pytest.raises(LatentsError, match="--retry-broken"):
        tokenize_command(options)
    assert tokenize_command(replace(options, retry_broken=True)) == 0
    changed = [name for name, digest in digests(options.output).items() if digest != expected[name]]
    assert len(changed) == 4  # the file, both files of statistics and the manifest
    fresh = replace(options, output=tmp_path / "fresh")
    assert tokenize_command(fresh) == 0
    assert digests(fresh.output) == digests(options.output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": False}, "flip is True, not False"),
        ({"dtype": "float32"}, "dtype is float16, not float32"),
        ({"latent": "base"}, "latent is enriched, not base"),
        ({"normalize": True}, "normalized is False, not True"),
        ({"fit": "pad"}, "fit is crop, not pad"),
        ({"batch_size": 2}, "batch_size is 4, not 2"),
        ({"checkpoint": "mini"}, "model is tiny, not mini"),
    ],
)
def test_another_checkpoint_or_option_is_refused(options, changes, message):
    part = replace(options, part=(0, 7))
    tokenize_command(part)
    before = digests(options.output)
    with pytest.raises(LatentsError, match=message):
        tokenize_command(replace(part, **changes))
    assert digests(options.output) == before


def test_other_data_is_refused_by_what_differs(options, data, tmp_path):
    shard = tmp_path / "s.tar"
    members = {f"{index}.png": encode_png(make_image(index)) for index in range(6)}
    options = replace(options, data=[write_shard(shard, members)])
    tokenize_command(replace(options, part=(0, 2)))
    whole = shard.read_bytes()
    changes = {
        "s.tar had 6 images, and has 7": lambda: write_shard(shard, {**members, "x.png": members["0.png"]}),
        "s.tar has other names": lambda: write_shard(
            shard, {name.replace("0", "y"): image for name, image in members.items()}
        ),
        "had [0-9]+ bytes": lambda: write_shard(shard, {**members, "0.png": members["0.png"] + b"x"}),
        "not a readable tar shard": lambda: shard.write_bytes(whole[:3000]),
        "does not exist": shard.unlink,
    }
    for message, change in changes.items():
        change()
        with pytest.raises(TrainingError, match=message):
            tokenize_command(options)
    shard.write_bytes(whole)
    assert tokenize_command(options) == 0


def test_images_that_cannot_be_read_end_a_job_that_has_too_many(options, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"gone{index}.png\n" for index in range(40)))
    options = replace(options, data=[tmp_path / "list.txt"])
    with pytest.raises(LatentsError, match="more than 9 images"):
        tokenize_command(replace(options, max_broken=9))
    with pytest.raises(DataError, match="no image could be read, of 40: the first is"):
        tokenize_command(options)


class FullStore(FolderStore):
    """A folder whose disk is full when the sixth file comes."""

    def write(self, name, data):
        if name == "latents-000005.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path(name))
        super().write(name, data)


def test_a_full_disk_ends_the_job_and_keeps_what_is_whole(expected, options, monkeypatch):
    monkeypatch.setattr(tokenize, "FolderStore", FullStore)
    with pytest.raises(OSError, match="files that are there are whole") as caught:
        tokenize_command(options)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    there = {name: digest for name, digest in digests(options.output).items() if name.startswith("latents-")}
    assert len(there) == 5
    assert there.items() <= expected.items()
    assert tokenize_command(options) == 3
    assert digests(options.output) == expected


def test_no_room_is_told_before_anything_is_written(options, monkeypatch):
    monkeypatch.setattr(FolderStore, "free_bytes", lambda self: 1000)
    with pytest.raises(LatentsError, match="has 1 kB free"):
        tokenize_command(options)
    assert not options.output.exists()


def test_a_folder_of_something_else_is_refused(options):
    options.output.mkdir()
    (options.output / "notes.txt").touch()
    with pytest.raises(LatentsError, match=r"holds other files \(notes.txt\)"):
        tokenize_command(options)
    (options.output / "manifest.json").write_text("{}")
    with pytest.raises(LatentsError, match="no manifest of latents"):
        tokenize_command(options)


def test_a_dry_run_prints_size_room_and_time_and_writes_nothing(options, capsys):
    assert tokenize_command(replace(options, dry_run=True)) == 0
    text = capsys.readouterr().out
    assert "42 images in 11 units" in text
    assert "free" in text
    assert "images/s" in text
    assert not options.output.exists()
