"""``drorae import`` and ``drorae export``: from foreign files to a checkpoint that works, and back."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig
from model.tokenizer import Tokenizer


@pytest.fixture
def decoder_file(tmp_path) -> Path:
    """RAE's ``model.pt`` for the tiny encoder's latents, images of 64 pixels."""
    config = TokenizerConfig(
        name="x",
        image_size=64,
        encoder=EncoderConfig(width=48, depth=1, num_heads=2, image_size=56),
        fusion=None,
        decoder=DecoderConfig(width=32, depth=1, num_heads=2, mlp_width=16),
    )
    from model.interop.rae_decoder_weights import decoder_state_to_diffusers

    decoder = Tokenizer(config).decoder
    state = decoder_state_to_diffusers(decoder.state_dict(), config.decoder)
    torch.save({**state, "decoder_pos_embed": decoder.positions}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_an_autoencoder_folder_becomes_a_checkpoint_that_works(run, autoencoder_folder, photo, tmp_path):
    output = tmp_path / "rae-b"
    outcome = run("import", autoencoder_folder, "--output", output)
    assert outcome.status == 0, outcome.err
    assert "rae-b, images of 64 pixels, latents 64 x 4 x 4 with statistics, no fusion" in outcome.out
    facts = json.loads(run("info", "--json", output).out)
    assert facts["name"] == "rae-b"
    assert facts["config"]["fusion"] is None
    assert set(facts["provenance"]["imported"]) == {"autoencoder"}
    assert "none: the last layer alone" in run("info", output).out
    assert run("reconstruct", photo, tmp_path / "out.png", "--checkpoint", output).status == 0
    latents = tmp_path / "latents.safetensors"
    encoded = run("encode", photo, "-o", latents, "--normalize", "--checkpoint", output)
    assert encoded.status == 0, encoded.err
    assert run("decode", latents, tmp_path / "decoded.png", "--checkpoint", output).status == 0


def test_parts_become_a_checkpoint(run, encoder_folder, decoder_file, tmp_path):
    torch.save({"mean": torch.zeros(48, 4, 4), "var": torch.ones(48, 4, 4)}, tmp_path / "stat.pt")
    parts = ["--encoder", encoder_folder, "--decoder", decoder_file, "--statistics", tmp_path / "stat.pt"]
    options = ["--decoder-heads", 2, "--name", "mine", "--dtype", "float16", "--output", tmp_path / "out"]
    outcome = run("import", *parts, *options)
    assert outcome.status == 0, outcome.err
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.config.name == "mine"
    assert tokenizer.has_statistics
    imported = tokenizer.checkpoint.provenance["imported"]
    assert set(imported) == {"encoder", "decoder", "statistics"}
    size = (tmp_path / "out" / "encoder.safetensors").stat().st_size
    assert size < 2.2 * sum(tensor.numel() for tensor in tokenizer.encoder.state_dict().values())


def test_phase_2_starts_from_an_import(run, autoencoder_folder, photos, tmp_path):
    from training.data.sources import list_samples
    from training.phases.reconstruction import ReconstructionTask
    from training.recipes.recipe import DataConfig, PhaseRecipe

    run("import", autoencoder_folder, "--output", tmp_path / "imported")
    recipe = PhaseRecipe(
        output=tmp_path / "run",
        init=str(tmp_path / "imported"),
        device="cpu",
        data=DataConfig(train=[photos], validation=[photos], num_workers=0, resize_short_side=[64, 64]),
        num_steps=1,
        batch_size=2,
        loss={"perceptual": 0, "adversarial": 0},
        fusion=FusionConfig(num_layers=2, hidden_width=16, num_heads=2),
    )
    task = ReconstructionTask("phase2", recipe, list_samples([photos]))
    assert task.tokenizer.config.fusion == recipe.fusion
    source = Tokenizer.load(tmp_path / "imported")
    before = {name: tensor.clone() for name, tensor in task.tokenizer.fusion.state_dict().items()}
    figures = task.train_step(0, next(task.batches(0)))
    assert figures["l1"] > 0
    after = task.tokenizer.fusion.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    for part in ("encoder", "decoder"):
        found = getattr(task.tokenizer, part).state_dict()
        expected = getattr(source, part).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_new_decoder_is_random_and_said_to_be(run, encoder_folder, tmp_path, monkeypatch):
    small = DecoderConfig(width=32, depth=1, num_heads=2, mlp_width=16)
    monkeypatch.setitem(sys.modules["model.interop.rae_decoder_weights"].RAE_DECODERS, "b", small)
    outcome = run("import", "--encoder", encoder_folder, "--new-decoder", "b", "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.config.image_size == 256
    assert tokenizer.checkpoint.provenance["imported"]["decoder"] == {"format": "random", "seed": 0}


def test_export_and_import_are_inverse(run, autoencoder_folder, tmp_path):
    first, second, folder = tmp_path / "first", tmp_path / "second", tmp_path / "folder"
    run("import", autoencoder_folder, "--output", first)
    outcome = run("export", "--format", "diffusers", first, "--output", folder)
    assert outcome.status == 0, outcome.err
    assert f"{folder}: README.md, config.json, diffusion_pytorch_model.safetensors" in outcome.out
    assert run("import", folder, "--output", second, "--name", "first").status == 0
    assert Tokenizer.load(first).config == Tokenizer.load(second).config
    for part in ("encoder", "decoder"):
        assert (first / f"{part}.safetensors").read_bytes() == (second / f"{part}.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no weights are named"),
        (["--encoder", "dinov2"], "--encoder needs one decoder"),
        (["--encoder", "dinov2", "--decoder", "x", "--new-decoder", "b"], "--encoder needs one decoder"),
        (["rae", "--encoder", "dinov2"], "--encoder does not go with FOLDER"),
        (["rae", "--image-size", "64"], "--image-size does not go with FOLDER"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["stat.pt"], "stat.pt: is a file, and a folder is expected"),
        (["empty"], "config.json: cannot be read: No such file or directory"),
        (["rae", "--statistics", "nowhere.pt"], "nowhere.pt: there is no such file"),
        (
            ["--encoder", "dinov2", "--new-decoder", "b", "--image-size", "4"],
            "--image-size 4: expected at least 8",
        ),
        (["dinov2"], "which has no decoder: import it as the encoder, beside a decoder"),
        (["--encoder", "rae", "--new-decoder", "b"], "field 'model_type' is 'None', no encoder known here"),
        (["--encoder", "dinov2", "--new-decoder", "b", "--image-size", "100"], "not divisible"),
        (
            ["--encoder", "dinov2", "--decoder", "stat.pt"],
            "stat.pt: tensor 'decoder_embed.weight' is missing",
        ),
    ],
)
def test_wrong_imports_are_one_sentence_and_leave_nothing(
    refused, encoder_folder, autoencoder_folder, tmp_path, monkeypatch, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save({"mean": torch.zeros(1, 1, 1), "var": torch.ones(1, 1, 1)}, "stat.pt")
    before = sorted(os.listdir())
    assert expected in refused("import", *arguments, "--output", "out")
    assert sorted(os.listdir()) == before


def test_an_output_that_holds_something_is_never_replaced(refused, autoencoder_folder, checkpoint, tmp_path):
    before = {file: file.read_bytes() for file in autoencoder_folder.iterdir()}
    message = refused("import", autoencoder_folder, "--output", autoencoder_folder)
    assert "the folder is not empty; name a new one, or remove it first" in message
    assert "not empty" in refused("export", checkpoint, "--output", autoencoder_folder)
    assert "is a file" in refused("export", checkpoint, "--output", next(iter(before)))
    assert {file: file.read_bytes() for file in autoencoder_folder.iterdir()} == before


def test_exports_of_what_diffusers_does_not_have(refused, checkpoint, tmp_path):
    assert "encoder.width=32: AutoencoderRAE builds heads" in refused(
        "export", checkpoint, "--output", tmp_path / "out"
    )
    assert "no checkpoint directory" in refused("export", tmp_path / "none", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource, signal, sys
from cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on the size of files here")
def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(autoencoder_folder, tmp_path):
    """Real writes that fail: the process may write no file over 100 kB."""
    command = ["import", str(autoencoder_folder), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"drorae: {tmp_path / 'out'}: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == [autoencoder_folder.name]


@pytest.mark.slow
def test_neither_diffusers_nor_transformers_is_needed(autoencoder_folder, tmp_path):
    code = """
import sys
sys.modules["diffusers"] = sys.modules["transformers"] = None
from cli.main import main
folder, checkpoint, exported = sys.argv[1:]
assert main(["import", folder, "--output", checkpoint]) == 0
assert main(["export", checkpoint, "--output", exported]) == 0
"""
    paths = [str(autoencoder_folder), str(tmp_path / "checkpoint"), str(tmp_path / "exported")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
