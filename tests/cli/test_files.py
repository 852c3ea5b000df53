"""Output files: whole or not at all, and refused before the work where possible."""

import errno
import os
from pathlib import Path

import pytest

from cli import files
from cli.errors import CommandError


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cli.files.os.replace", refuse)
    with pytest.raises(CommandError, match=r"out\.png: cannot be written: No space left on device"):
        files.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_status_1(refused, photo, checkpoint, tmp_path):
    output = tmp_path / "out.npy"
    output.symlink_to("/dev/full")
    message = refused("encode", photo, "-o", output, "--checkpoint", checkpoint, status=1)
    assert "No space left on device" in message


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_missing_output_folder_is_found_before_the_work(refused, command, photo, tmp_path, monkeypatch):
    module = {"encode": "latents.encode"}.get(command, command)
    monkeypatch.setattr(f"cli.commands.{module}.load_tokenizer", None)
    option = ["-o"] if command == "encode" else []
    name = "out.npy" if command == "encode" else "out.png"
    message = refused(command, photo, *option, tmp_path / "no" / name, status=1)
    assert f"there is no folder {tmp_path / 'no'}" in message


def test_read_only_output_is_found_before_the_work(refused, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("cli.files.os.access", lambda *_: False)
    message = refused("reconstruct", photo, tmp_path / "out.png", status=1)
    assert "cannot be written: Permission denied" in message


def test_output_folder_under_a_file(refused, photos, photo, tmp_path):
    assert "cannot be made a folder" in refused("reconstruct", photos, photo / "out", status=1)


def test_output_file_that_is_a_folder(refused, photo, tmp_path):
    (tmp_path / "out.npy").mkdir()
    assert "is a folder" in refused("encode", photo, "-o", tmp_path / "out.npy")


def test_progress_is_shown_to_people_only(capsys, monkeypatch):
    paths = [Path(str(number)) for number in range(5)]
    assert [len(batch) for batch in files.batches(paths, 2, "encode")] == [2, 2, 1]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(files.batches(paths, 2, "encode"))
    assert "encode: 100%" in capsys.readouterr().err
