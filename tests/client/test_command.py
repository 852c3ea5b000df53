"""The ``drorae-client`` command: what it writes, what it says, and its exit statuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drorae_client import Latents
from drorae_client.command import main


@pytest.fixture
def photos(tmp_path: Path, png: bytes) -> Path:
    """A folder of two photos, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    (folder / "a.png").write_bytes(png)
    (folder / "below" / "b.png").write_bytes(png)
    return folder


@pytest.fixture
def run(server: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; gives its status, output and errors."""

    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        status = main([command, "--url", server.url, *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_photos_to_one_file_and_back(run: Any, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "l.safetensors"
    assert run("encode", photos, photos / "a.png", "-o", file, "--dtype", "bfloat16")[0] == 0
    latents = Latents.load(file)
    assert (latents.array.shape, latents.dtype, latents.model) == ((3, 32, 8, 8), "bfloat16", "tiny")
    assert run("decode", file, tmp_path / "pictures")[0] == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"{number:04d}.png" for number in range(3)
    ]
    assert run("encode", photos / "a.png", "-o", tmp_path / "l.npy")[0] == 0
    assert np.load(tmp_path / "l.npy").shape == (1, 32, 8, 8)
    for name in ("l.npy", "one.safetensors"):
        run("encode", photos / "a.png", "-o", tmp_path / "one.safetensors")
        assert run("decode", tmp_path / name, tmp_path / "out.jpg")[0] == 0
        with Image.open(tmp_path / "out.jpg") as picture:
            assert (picture.format, picture.size) == ("JPEG", (64, 64))


def test_folders(run: Any, photos: Path, tmp_path: Path) -> None:
    assert run("encode", photos, "-o", tmp_path / "latents")[0] == 0
    assert len(Latents.load(tmp_path / "latents/below/b.safetensors")) == 1
    status, output, _ = run("reconstruct", photos, tmp_path / "out")
    assert status == 0
    assert output.count("PSNR") == 2
    assert (tmp_path / "out/a.png").exists()
    assert (tmp_path / "out/below/b.png").exists()
    assert run("reconstruct", photos / "a.png", tmp_path / "one.jpg")[0] == 0
    assert (tmp_path / "one.jpg").read_bytes().startswith(b"\xff\xd8")


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_broken_photos_are_named_and_left_out(run: Any, photos: Path, tmp_path: Path, command: str) -> None:
    (photos / "broken.png").write_bytes(b"no photo")
    arguments = [photos, "-o", tmp_path / "out"] if command == "encode" else [photos, tmp_path / "out"]
    status, _, errors = run(command, *arguments)
    assert status == 3
    assert "broken.png" in errors
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 2
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no photo")
    assert run(command, *arguments)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("encode", "nowhere.png", "-o", "l.npy"), 2),
        (("encode", "{photo}", "-o", "l.bin"), 2),
        (("encode", "{photo}", "-o", "no/folder.npy"), 2),
        (("encode", "{broken}", "-o", "l.npy"), 2),
        (("encode", "{photo}", "-o", "l.npy", "--normalize", "--latent", "base"), 2),
        (("encode", "{photo}", "-o", "l.npy", "--batch", "0"), 2),
        (("decode", "{photo}", "out.png"), 2),
        (("decode", "nowhere.npy", "out.png"), 1),
        (("reconstruct", "{photo}", "out.gif"), 2),
        (("reconstruct", "{broken}", "out.png"), 2),
        (("reconstruct", "{empty}", "out"), 2),
        (("encode", "{photo}", "-o", "l.npy", "--timeout", "0"), 1),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    run: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no photo")
    names = {"photo": photos / "a.png", "broken": tmp_path / "broken.png", "empty": tmp_path / "empty"}
    found, output, errors = run(*(str(argument).format(**names) for argument in arguments))
    assert found == status
    assert output == ""
    assert errors.startswith("drorae-client: ")
    assert errors.count("\n") == 1


def test_a_wrong_key_and_a_wrong_address(
    serve: Any, tokenizer: Any, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    from service.app import create_app
    from service.settings import Settings

    key = "k" * 16
    arguments = ["encode", str(photos), "-o", str(tmp_path / "l.npy"), "--url"]
    with serve(create_app(Settings(api_keys=key), tokenizer)) as running:
        assert main([*arguments, running.url]) == 2
        monkeypatch.setenv("DRORAE_API_KEY", key)
        assert main([*arguments, running.url]) == 0
    monkeypatch.setattr("drorae_client.attempts.PATIENCE_S", 0.2)
    assert main([*arguments, "http://127.0.0.1:9"]) == 1
    assert main([*arguments, "nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_program_starts_without_torch() -> None:
    script = "import sys, drorae_client.command; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "drorae_client", "encode"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: drorae-client encode")
