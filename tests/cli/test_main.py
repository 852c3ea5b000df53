"""The command as a whole: help that teaches, exit codes, errors in one sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli.main
from cli.errors import CommandError, UsageError, describe
from model.errors import LatentError
from service.errors import InternalError, OptionError, UnavailableError
from training.errors import DivergenceError, RecipeError

COMMANDS = ["serve", "reconstruct", "encode", "decode", "info", "pull", "import", "export"]
COMMANDS += ["evaluate", "analyze", "stats", "train"]
SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "samples"
DRORAE = shutil.which("drorae", path=Path(sys.executable).parent) or shutil.which("drorae")


def process(*argv: object) -> subprocess.CompletedProcess[str]:
    """Runs the installed command."""
    if DRORAE is None:
        pytest.skip("the drorae command is not installed")
    return subprocess.run([DRORAE, *map(str, argv)], capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_every_command_and_first_steps(run):
    outcome = run("--help")
    assert outcome.status == 0
    assert all(f"\n    {command}" in outcome.out for command in COMMANDS)
    assert "drorae reconstruct photo.jpg out.png" in outcome.out
    assert "exit status" in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_examples(run, command):
    outcome = run(command, "--help")
    assert outcome.status == 0
    assert f"examples:\n  drorae {command}" in outcome.out


def test_version(run):
    assert run("--version").out.startswith("drorae 0.")


@pytest.mark.parametrize("argv", [[], ["paint"], ["encode"], ["reconstruct", "in.jpg"], ["train", "phase9"]])
def test_wrong_usage_is_status_2(run, argv):
    outcome = run(*argv)
    assert outcome.status == 2
    assert "usage: drorae" in outcome.err


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UsageError("wrong"), 2, "wrong"),
        (CommandError("failed"), 1, "failed"),
        (LatentError("latents"), 2, "latents"),
        (OptionError("An option."), 2, "An option."),
        (UnavailableError("No GPU."), 2, "No GPU."),
        (InternalError("Ours."), 1, "Ours."),
        (RecipeError("recipe.yaml"), 2, "recipe.yaml"),
        (DivergenceError("step 3"), 1, "step 3"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError(), 1, "out of memory"),
        (PermissionError(13, "Permission denied", "/some/file"), 1, "/some/file: Permission denied"),
        (OSError("odd"), 1, "odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_kind_of_error_has_its_status(error, status, sentence, monkeypatch, refused):
    def fail(_):
        raise error

    monkeypatch.setattr("cli.commands.info.read_settings", fail)
    assert sentence in refused("info", status=status)


def test_defects_of_ours_are_one_line_too_and_debug_shows_them(monkeypatch, refused):
    def fail(_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("cli.commands.info.read_settings", fail)
    message = refused("info", status=1)
    assert "unexpected RuntimeError: two lines" in message
    assert "--debug" in message
    with pytest.raises(RuntimeError):
        cli.main.main(["--debug", "info"])
    assert describe(RuntimeError()) is None


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample photos are not here")
def test_the_installed_command_reconstructs_a_real_photo(checkpoint, tmp_path):
    photo = sorted(SAMPLES.glob("*.jpg"))[0]
    done = process("reconstruct", photo, tmp_path / "out.png", "--checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr
    assert f"{photo}: PSNR " in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_installed_command_fails_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{")
    done = process("info", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"drorae: {tmp_path / 'config.json'}: not valid JSON")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_serving_needs_no_training_code():
    code = "import cli.parser, sys; print([name for name in sys.modules if name.startswith('training')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
