"""The last two states: whole ones are found, damaged ones passed over."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.errors import TrainingError
from training.phases.states import check_run_directory, newest_whole_state, read_state, save_state

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: data.replace(b"\x11" * 64, b"\x12" + b"\x11" * 63),
    "text": lambda data: b"no state",
}


def state(step: int) -> dict[str, object]:
    return {"step": step, "weights": torch.full((4096,), 0x11, dtype=torch.uint8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's, with states of steps 2 and 4; that of step 1 is gone."""
    for step in (1, 2, 4):
        save_state(tmp_path, state(step))
    return tmp_path


def test_the_last_two_are_kept(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {"state.pt", "state-previous.pt"}
    assert newest_whole_state(folder) == folder / "state.pt"
    assert [read_state(folder / name)["step"] for name in ("state-previous.pt", "state.pt")] == [2, 4]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = (folder / "state.pt").read_bytes()
    assert DAMAGES[damage](data) != data
    (folder / "state.pt").write_bytes(DAMAGES[damage](data))
    found = newest_whole_state(folder)
    assert read_state(found)["step"] == 2
    assert "state.pt is damaged" in caplog.text
    save_state(folder, state(3))  # the damaged one does not push the whole one out
    assert read_state(newest_whole_state(folder))["step"] == 3
    assert read_state(folder / "state-previous.pt")["step"] == 2


def test_a_crash_between_the_two_renames(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "state.pt").unlink()
    assert read_state(newest_whole_state(folder))["step"] == 2
    assert "state.pt is gone" in caplog.text


def test_two_damaged_ones_are_named(folder: Path) -> None:
    for name in ("state.pt", "state-previous.pt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(TrainingError, match=r"state\.pt: damaged, and state-previous\.pt"):
        newest_whole_state(folder)


def test_occupied_directories_are_refused(folder: Path, tmp_path: Path) -> None:
    check_run_directory(folder, resume=True)
    with pytest.raises(TrainingError, match="--resume"):
        check_run_directory(folder, resume=False)
    (folder / "state.pt").unlink()
    with pytest.raises(TrainingError, match="--resume"):
        check_run_directory(folder, resume=False)
    finished = tmp_path / "finished"
    finished.mkdir()
    check_run_directory(finished, resume=False)
    (finished / "run.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(TrainingError, match="finished run"):
            check_run_directory(finished, resume)
    with pytest.raises(TrainingError, match="is a file"):
        check_run_directory(finished / "run.json", resume=False)


def test_a_full_disk_leaves_both_states_and_names_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*state\.pt'"):
        save_state(folder, state(5))
    assert read_state(newest_whole_state(folder))["step"] == 4
    assert not list(folder.glob(".*"))
