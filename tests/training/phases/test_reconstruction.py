"""The phases end to end on a tiny tokenizer: what they train, what they leave, kill and resume."""

import csv
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.tokenizer import Tokenizer
from tests.training.conftest import encode_png, make_image
from training.distributed.modules import module_sha256
from training.errors import DataError, RecipeError, TrainingError
from training.phases import starting_point as starting
from training.run import run_phase


def parts_of(checkpoint: Path) -> dict[str, str]:
    tokenizer = Tokenizer.load(checkpoint)
    parts = {"encoder": tokenizer.encoder, "fusion": tokenizer.fusion, "decoder": tokenizer.decoder}
    return {name: module_sha256(part) for name, part in parts.items() if part is not None}


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(Tokenizer.load(checkpoint).state_dict())


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_three_phases_train_their_part_and_nothing_else(
    recipe_file: Path, encoder_checkpoint: Path, tmp_path: Path
) -> None:
    previous, seen = encoder_checkpoint, [parts_of(encoder_checkpoint)]
    for phase in ("phase1", "phase2", "phase3"):
        output = tmp_path / phase
        assert run_phase(phase, recipe_file, [f"init={previous}"], output) == 0
        previous = output / "checkpoint"
        seen.append(parts_of(previous))
    assert len({parts["encoder"] for parts in seen}) == 1
    start, one, two, three = seen
    assert one["decoder"] != start["decoder"]
    assert "fusion" not in one
    assert two["decoder"] == one["decoder"]
    assert three["decoder"] != two["decoder"]
    assert three["fusion"] == two["fusion"]


def test_phase1_keeps_the_statistics_of_latents_it_does_not_change(
    recipe_file: Path, encoder_checkpoint: Path, tmp_path: Path
) -> None:
    """Published ones are over far more images than a run can take."""
    source = Tokenizer.load(encoder_checkpoint)
    mean = torch.randn(source.config.latent_shape)
    source.set_statistics(mean, mean.square())
    source.save(tmp_path / "published")
    init = f"init={tmp_path / 'published'}"
    for phase, keeps in (("phase1", True), ("joint", False)):
        run_phase(phase, recipe_file, [init, "num_steps=1"], tmp_path / phase)
        found = Tokenizer.load(tmp_path / phase / "checkpoint")
        assert torch.equal(found.latent_mean, mean) is keeps
    run_phase("phase1", recipe_file, [init, "num_steps=1", "train_encoder=true"], tmp_path / "unfrozen")
    assert not Tokenizer.load(tmp_path / "unfrozen" / "checkpoint").has_statistics


def test_run_leaves_logs_grids_provenance_and_statistics(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("joint", recipe_file, [], tmp_path / "run")
    log = rows(tmp_path / "run" / "train.csv")
    assert [int(row["step"]) for row in log] == [1, 2, 3, 4, 5, 6]
    assert all(float(row["perceptual"]) > 0 for row in log)
    assert [float(row["discriminator"]) > 0 for row in log] == [False, True, True, True, True, True]
    assert [float(row["adversarial_weight"]) > 0 for row in log] == [False, False, True, True, True, True]
    assert [row["step"] for row in rows(tmp_path / "run" / "validation.csv")] == ["3", "6"]
    assert (tmp_path / "run" / "grids" / "000006.png").read_bytes().startswith(b"\x89PNG")
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    assert provenance["networks"] == {"perceptual": "efficientnet-lite0", "discriminator": "encoder"}
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["discriminator"]["backbone"] == "encoder"
    tokenizer = Tokenizer.load(tmp_path / "run" / "checkpoint")
    assert tokenizer.has_statistics
    assert tokenizer.checkpoint is not None
    assert tokenizer.checkpoint.provenance["phase"] == "joint"


def test_training_reduces_the_loss(recipe_file: Path, tmp_path: Path) -> None:
    overrides = [
        "num_steps=60",
        "noise_tau=0",
        "loss.adversarial=0",
        "loss.perceptual=0",
        "optimizer.learning_rate=1e-2",
    ]
    run_phase("phase1", recipe_file, overrides, tmp_path / "run")
    l1 = [float(row["l1"]) for row in rows(tmp_path / "run" / "train.csv")]
    assert sum(l1[-5:]) < 0.8 * sum(l1[:5])


def test_killed_run_resumes_to_the_same_weights(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("joint", recipe_file, [], tmp_path / "whole")
    killed = tmp_path / "killed"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from training.phases.reconstruction import ReconstructionTask\n"
        "from training.run import run_phase\n"
        "step_once = ReconstructionTask.train_step\n"
        "def dying(self, step, batches):\n"
        "    if step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step_once(self, step, batches)\n"
        "ReconstructionTask.train_step = dying\n"
        "run_phase('joint', Path(sys.argv[1]), [], Path(sys.argv[2]))\n"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [sys.executable, "-c", script, str(recipe_file), str(killed)],
        env={**os.environ, **threads},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert not (killed / "checkpoint").exists()
    with pytest.raises(TrainingError, match="--resume"):
        run_phase("joint", recipe_file, [], killed)
    run_phase("joint", recipe_file, [], killed, resume=True)
    expected, resumed = weights_of(tmp_path / "whole" / "checkpoint"), weights_of(killed / "checkpoint")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(killed / "train.csv")]
    assert strip == [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / "whole/train.csv")
    ]


def test_changed_frozen_part_is_caught(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.phases.reconstruction import ReconstructionTask

    step_once = ReconstructionTask.train_step

    def meddling(self, step, batches):
        with torch.no_grad():
            self.tokenizer.encoder.class_token.add_(1e-3)
        return step_once(self, step, batches)

    monkeypatch.setattr(ReconstructionTask, "train_step", meddling)
    with pytest.raises(TrainingError, match="changed the frozen encoder"):
        run_phase("phase1", recipe_file, [], tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_full_disk_keeps_the_last_state(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_phase("phase1", recipe_file, ["num_steps=2"], tmp_path / "run")
    before = (tmp_path / "run" / "state.pt").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.output.files.os.fsync", full)
    with pytest.raises(TrainingError, match="no space left under"):
        run_phase("phase1", recipe_file, ["num_steps=4"], tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.partial"))


@pytest.mark.parametrize(
    ("phase", "overrides", "error", "message"),
    [
        ("phase3", [], RecipeError, "phase 3 starts from phase 2"),
        ("phase2", ["fusion=null"], RecipeError, "field 'fusion'"),
        ("phase2", ["fusion.num_layers=9"], RecipeError, "field 'fusion': fusion.num_layers=9 exceeds"),
        ("phase1", ["init=null"], RecipeError, "field 'init'"),
        ("phase1", ["data.validation=[]"], RecipeError, "data.validation"),
        ("phase1", ["accumulation_steps=3"], RecipeError, "accumulation_steps"),
        ("phase1", ["data.train=[/nowhere]"], DataError, "/nowhere does not exist"),
        ("phase1", ["preset=huge"], RecipeError, "field 'preset'"),
        ("phase2", ["decoder_init=ridge"], RecipeError, "field 'decoder_init'"),
        ("phase1", ["fusion_init={num_steps: 2}"], RecipeError, "field 'fusion_init'"),
    ],
)
def test_impossible_recipes_name_the_field(
    recipe_file: Path, phase: str, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_phase(phase, recipe_file, overrides)


def test_fitted_starts_run_once_and_not_on_resume(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state holds what they became; fitting again would cost minutes for nothing."""
    fitted = []
    for name in ("initialize_decoder", "initialize_fusion"):
        function = getattr(starting, name)
        monkeypatch.setattr(
            starting,
            name,
            lambda *args, function=function, name=name: fitted.append(name) or function(*args),
        )
    fusion_init = "fusion_init={num_images: 12, num_steps: 3, batch_tokens: 32}"
    run_phase("phase1", recipe_file, ["decoder_init=ridge"], tmp_path / "one")
    two = [f"init={tmp_path / 'one' / 'checkpoint'}", fusion_init]
    run_phase("phase2", recipe_file, two, tmp_path / "two")
    assert fitted == ["initialize_decoder", "initialize_fusion"]
    run_phase("phase1", recipe_file, ["decoder_init=ridge"], tmp_path / "one", resume=True)
    run_phase("phase2", recipe_file, two, tmp_path / "two", resume=True)
    assert len(fitted) == 2


def test_squared_error_is_a_loss_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("phase1", recipe_file, ["loss.l2=1", "loss.l1=0", "num_steps=1"], tmp_path / "run")
    (row,) = rows(tmp_path / "run" / "train.csv")
    assert 0 < float(row["l2"]) < float(row["l1"])


def test_broken_images_are_counted_in_the_log(recipe_file: Path, photos: Path, tmp_path: Path) -> None:
    data = encode_png(make_image(99))
    (photos / "broken.png").write_bytes(data[: len(data) // 2])
    run_phase("phase1", recipe_file, ["num_steps=8"], tmp_path / "run")
    assert int(rows(tmp_path / "run" / "train.csv")[-1]["num_broken"]) >= 2


def test_ablation_that_unfreezes_the_encoder(
    recipe_file: Path, encoder_checkpoint: Path, tmp_path: Path
) -> None:
    run_phase("phase1", recipe_file, ["train_encoder=true"], tmp_path / "run")
    assert parts_of(tmp_path / "run" / "checkpoint")["encoder"] != parts_of(encoder_checkpoint)["encoder"]


@pytest.mark.usefixtures("exact")
def test_accumulated_micro_batches_equal_one_batch(recipe_file: Path, tmp_path: Path) -> None:
    """Noise and the discriminator's updates included; alpha is balanced for each micro-batch."""
    options = ["discriminator.adversarial_start_step=9", "num_steps=3"]
    for steps in (1, 4):
        run_phase("joint", recipe_file, [*options, f"accumulation_steps={steps}"], tmp_path / str(steps))
    states = [torch.load(tmp_path / str(steps) / "state.pt", weights_only=True) for steps in (1, 4)]
    whole_heads, parts_heads = (state["task"]["heads"] for state in states)
    for name, tensor in whole_heads.items():
        torch.testing.assert_close(parts_heads[name], tensor, rtol=0, atol=1e-11)
    whole, parts = (weights_of(tmp_path / str(steps) / "checkpoint") for steps in (1, 4))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)  # exported as float32


def test_activation_checkpointing_changes_nothing(recipe_file: Path, tmp_path: Path) -> None:
    for flag in ("false", "true"):
        run_phase("joint", recipe_file, [f"activation_checkpointing={flag}"], tmp_path / flag)
    kept, recomputed = (weights_of(tmp_path / flag / "checkpoint") for flag in ("false", "true"))
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


@pytest.mark.usefixtures("exact")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look
def test_compiled_phase_equals_the_plain_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a backend that traces forward and backward but generates no code, which would take a minute."""
    compiled = []

    def traced(forward: Callable[..., Any], **options: Any) -> Any:
        compiled.append(forward)
        return compile_with(forward, backend="aot_eager", **options)

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    for flag in ("false", "true"):
        options = ["num_steps=3", "evaluate_every_steps=9", f"compile={flag}"]
        run_phase("phase2", recipe_file, options, tmp_path / flag)
    plain, fast = (weights_of(tmp_path / flag / "checkpoint") for flag in ("false", "true"))
    assert len(compiled) == 4 + 2 + 1  # encoder, decoder, fusion
    for name, tensor in plain.items():
        torch.testing.assert_close(fast[name], tensor, rtol=0, atol=1e-6)  # exported as float32


def test_signal_saves_the_step_under_way(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.phases.reconstruction import ReconstructionTask

    run_phase("phase1", recipe_file, [], tmp_path / "whole")
    step_once = ReconstructionTask.train_step

    def signalled(self, step, batches):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_once(self, step, batches)

    monkeypatch.setattr(ReconstructionTask, "train_step", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_phase("phase1", recipe_file, [], tmp_path / "cut")
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(ReconstructionTask, "train_step", step_once)
    run_phase("phase1", recipe_file, [], tmp_path / "cut", resume=True)
    whole, cut = (weights_of(tmp_path / name / "checkpoint") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_mixed_precision_trains_float32_weights(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("joint", recipe_file, ["precision=bfloat16", "num_steps=3"], tmp_path / "run")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "run" / "checkpoint").values()} == {
        torch.float32
    }
    assert all(float(row["l1"]) < 1 for row in rows(tmp_path / "run" / "train.csv"))


def test_resuming_with_another_recipe_says_what_changed(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_phase("phase1", recipe_file, ["num_steps=2"], tmp_path / "run")
    run_phase("phase1", recipe_file, ["num_steps=4"], tmp_path / "run", resume=True)
    assert "resumed with another recipe than before: num_steps changed" in caplog.text


STOPPED = """
import os, signal, sys
from cli.main import main
from training.phases.reconstruction import ReconstructionTask

step_once = ReconstructionTask.train_step

def stopping(self, step, batches):
    if step == 2:
        for name in sys.argv[1].split(","):
            os.killpg(0, getattr(signal, name))
    return step_once(self, step, batches)

ReconstructionTask.train_step = stopping
sys.exit(main(["train", "phase1", "--config", sys.argv[2], "--output", sys.argv[3]]))
"""


@pytest.mark.parametrize("signals", ["SIGTERM", "SIGTERM,SIGTERM", "SIGINT"])
def test_signals_to_the_group_save_the_step_under_way(
    recipe_file: Path, tmp_path: Path, signals: str
) -> None:
    """As timeout, systemd and SLURM send them: to the processes that decode images too."""
    text = recipe_file.read_text().replace("num_workers: 0", "num_workers: 2")
    recipe_file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, signals, str(recipe_file), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "drorae: interrupted" in done.stderr
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3


def test_a_killed_loader_process_loses_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.phases.reconstruction import ReconstructionTask

    step_once = ReconstructionTask.train_step

    def killing(self, step, batches):
        if step == 2:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
        return step_once(self, step, batches)

    monkeypatch.setattr(ReconstructionTask, "train_step", killing)
    options = ["data.num_workers=1", "num_steps=60"]  # more than a loader has ready
    with pytest.raises(TrainingError, match="a process that decodes images ended before step"):
        run_phase("phase1", recipe_file, [*options, "checkpoint_every_steps=99"], tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
    assert saved == len(rows(tmp_path / "run" / "train.csv")) >= 3


def test_validation_that_fails_costs_no_training(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.phases.reconstruction import ReconstructionTask

    def stopped(self, step, directory):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the validation went on")

    monkeypatch.setattr(ReconstructionTask, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_phase("phase1", recipe_file, ["checkpoint_every_steps=99"], tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3


def test_a_damaged_state_resumes_from_the_one_before(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_phase("phase1", recipe_file, [], tmp_path / "run")
    whole = weights_of(tmp_path / "run" / "checkpoint")
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    run_phase("phase1", recipe_file, [], tmp_path / "run", resume=True)
    assert "state.pt is damaged" in caplog.text
    resumed = weights_of(tmp_path / "run" / "checkpoint")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resuming_with_other_images_says_so(
    recipe_file: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_phase("phase1", recipe_file, ["num_steps=2"], tmp_path / "run")
    run_phase("phase1", recipe_file, ["num_steps=3"], tmp_path / "run", resume=True)
    assert "the list of training images changed" not in caplog.text
    make_image(99).save(photos / "99.png")
    run_phase("phase1", recipe_file, ["num_steps=4"], tmp_path / "run", resume=True)
    assert (
        "the list of training images changed since the state was saved (12 images then, 13 now)"
        in caplog.text
    )


def test_an_occupied_directory_is_refused_before_anything_is_loaded(
    recipe_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"")
    with pytest.raises(TrainingError, match="holds a run"):
        run_phase("phase1", recipe_file, ["init=/nowhere", "data.train=[/nowhere]"])


def test_a_checkpoint_that_is_not_there_yet_says_how_to_get_one(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"field 'init': no checkpoint directory at .* --set init=mini"):
        run_phase("phase1", recipe_file, ["init=runs/tiny/phase0/checkpoint"])
