"""Standard streams, broken photos and odd names, as programs around ``drorae`` meet them."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load, load_file

ROOT = Path(__file__).parents[2]
STRICT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}


@pytest.fixture
def program(checkpoint):
    """Runs the program in a process of its own, whose output is bytes."""

    def start(*argv, stdin=b"", **options):
        command = [sys.executable, "-m", "cli.main", *map(str, argv)]
        environment = {**STRICT, "DRORAE_CHECKPOINT": str(checkpoint)}
        return subprocess.run(
            command, input=stdin, capture_output=True, cwd=ROOT, env=environment, timeout=300, **options
        )

    return start


def test_encode_goes_on_after_a_broken_photo(run, checkpoint, photo, broken_image, tmp_path):
    output = tmp_path / "out.safetensors"
    outcome = run("encode", photo, broken_image, photo, "-o", output, "--checkpoint", checkpoint)
    assert outcome.status == 3
    assert outcome.err.startswith(f"drorae: skipped {broken_image}: ")
    assert outcome.err.count("\n") == 1
    assert "1 photos skipped" in outcome.out
    assert load_file(output)["latents"].shape[0] == 2


def test_nothing_but_broken_photos_give_no_file(run, refused, checkpoint, broken_image, tmp_path):
    output = tmp_path / "out.npy"
    outcome = run("encode", broken_image, broken_image, "-o", output, "--checkpoint", checkpoint)
    assert outcome.status == 1
    assert "none of the 2 photos could be read" in outcome.err
    assert str(broken_image) in refused("encode", broken_image, "-o", output, "--checkpoint", checkpoint)
    assert not output.exists()


def test_the_help_documents_the_status(run):
    for command in (["--help"], ["encode", "--help"], ["reconstruct", "--help"]):
        outcome = run(*command)
        assert outcome.status == 0
        assert re.search(r"\b3\b", outcome.out)


def test_photos_through_pipes(program, photo, tmp_path):
    encoded = program("encode", "-", "-o", "-", "--dtype", "float32", stdin=photo.read_bytes())
    assert encoded.returncode == 0
    assert b"enriched latents [1, " in encoded.stderr
    latents = load(encoded.stdout)["latents"]
    program("encode", photo, "-o", tmp_path / "file.npy", "--dtype", "float32")
    assert np.array_equal(latents.numpy(), np.load(tmp_path / "file.npy"))

    decoded = program("decode", "-", "-", stdin=encoded.stdout)
    direct = program("reconstruct", "-", "-", stdin=photo.read_bytes())
    assert b"standard input: PSNR" in direct.stderr
    pictures = [np.asarray(Image.open(io.BytesIO(result.stdout))).astype(int) for result in (decoded, direct)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_broken_photo_on_stdin(program):
    result = program("encode", "-", "-o", "-", stdin=b"no photo")
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.startswith(b"drorae: standard input: The image is not an image")


def test_names_that_are_no_text(program, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    (folder / "caf\u00e9.png").write_bytes(b"broken")
    result = program("reconstruct", folder, tmp_path / "out")
    assert result.returncode == 3
    assert b"caf\\udce9.png: PSNR" in result.stdout
    assert b"drorae: skipped" in result.stderr
    assert os.listdir(os.fsencode(tmp_path / "out")) == [b"caf\xe9.png"]


def test_evaluation_of_names_that_are_no_text(program, photo, tmp_path):
    shard = tmp_path / "photos.tar"
    with tarfile.open(shard, "w") as members:
        info = tarfile.TarInfo(os.fsdecode(b"caf\xe9.png"))
        info.size = photo.stat().st_size
        with photo.open("rb") as stream:
            members.addfile(info, stream)
        members.addfile(tarfile.TarInfo("b.heic"))
    result = program("evaluate", "--data", shard, "--output", tmp_path / "report", "--metrics", "psnr")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["num_images"], list(summary["left_out"].values())) == (1, [1])
    assert "caf\\udce9" in (tmp_path / "report" / "images.csv").read_text()
    assert "left out of the data: 1 x" in (tmp_path / "report" / "evaluation.md").read_text()


def test_a_tar_is_a_folder_that_no_member_leads_out_of(run, checkpoint, photo, tmp_path):
    shard = tmp_path / "photos.tar"
    with tarfile.open(shard, "w") as members:
        for name in ("../../up.png", "/root.png", "a/b.png", "a/b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = photo.stat().st_size
            with photo.open("rb") as stream:
                members.addfile(info, stream)
    output = tmp_path / "deep" / "er" / "out"
    assert run("reconstruct", shard, output, "--checkpoint", checkpoint).status == 0
    written = {str(path.relative_to(output)) for path in output.rglob("*.png")}
    assert written == {"up.png", "root.png", "a/b.png.png", "a/b.jpg.png"}
    assert not list(tmp_path.glob("*.png")) or (tmp_path / "photo.png").exists()
    latents = tmp_path / "l.safetensors"
    assert run("encode", shard, "-o", latents, "--checkpoint", checkpoint).status == 0
    assert load_file(latents)["latents"].shape[0] == 4


@pytest.mark.parametrize("argv", [("--help",), ("info",)])
def test_a_closed_pipe_ends_quietly(program, argv):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cli.main", *argv]
    result = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, env=STRICT, timeout=300, check=False
    )
    os.close(writer)
    assert result.stderr == b""


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("info mini 2>&-", 0, ""),
        ("encode PHOTO -o OUT >&- 2>&-", 0, ""),
        ("encode PHOTO -o - >&-", 2, "standard output is closed"),
        ("reconstruct PHOTO - >&-", 2, "standard output is closed"),
        ("encode - -o OUT <&-", 2, "standard input is closed"),
        ("decode - out.png <&-", 2, "standard input is closed"),
        ("info mini >&-", 0, ""),
        ("encode PHOTO -o - >/dev/full", 1, "standard output: cannot be written"),
    ],
)
def test_closed_streams(checkpoint, photo, tmp_path, command, status, message):
    output = tmp_path / "out.npy"
    command = command.replace("PHOTO", str(photo)).replace("OUT", str(output))
    environment = {**STRICT, "DRORAE_CHECKPOINT": str(checkpoint)}
    result = subprocess.run(
        ["sh", "-c", f"exec '{sys.executable}' -m cli.main {command}"],
        stderr=subprocess.PIPE, cwd=ROOT, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == status
    assert message in result.stderr.decode()
    assert b"Traceback" not in result.stderr
    assert b"unexpected" not in result.stderr
    assert status or result.stderr == b""
    if output.exists():
        assert np.load(output).shape[0] == 1
