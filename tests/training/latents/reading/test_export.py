"""Exports, read by the library and by the rules that they are for."""

import json
import tarfile
from unittest.mock import patch

import numpy as np
import pytest
import torch
import webdataset

from training.errors import LatentsError
from training.latents.reading import export
from training.latents.reading.export import export_npy, export_webdataset
from training.latents.reading.folder import LatentFolder

# The library leaves it to the garbage collector to close its tars.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def ignore(rows):
    """A progress bar that nobody sees."""


def read_tars(output):
    files = sorted(str(file) for file in output.glob("*.tar"))
    return list(webdataset.WebDataset(files, shardshuffle=False).decode())


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_webdataset_reads_arrays_and_classes(latents, tmp_path):
    folder = LatentFolder(latents(flip=True, dtype="float16"))
    export_webdataset(folder, tmp_path / "tars", ignore)
    samples = read_tars(tmp_path / "tars")
    assert [sample["__key__"] for sample in samples] == [f"more/{index:02d}" for index in range(12)]
    assert [sample["cls"] for sample in samples] == [index % 3 for index in range(12)]
    rows = folder.rows(range(24)).latents.numpy()
    assert np.array_equal(np.stack([sample["npy"] for sample in samples]), rows[:12])
    assert np.array_equal(np.stack([sample["flip.npy"] for sample in samples]), rows[12:])


def test_names_with_dots_or_twice_the_same_stay_apart(latents, tmp_path):
    folder = LatentFolder(latents(count=4, per_shard=4, has_labels=False, dtype="bfloat16"))
    names = ["a.b/c.d", "same", "same", "last"]
    with patch.object(folder, "shard_keys", lambda shard: names):
        export_webdataset(folder, tmp_path / "tars", ignore)
    samples = read_tars(tmp_path / "tars")
    assert [sample["__key__"] for sample in samples] == ["a.b/c%2Ed", "same-1", "same-2", "last"]
    assert "cls" not in samples[0]
    assert samples[0]["npy"].dtype == np.float32  # NumPy has no bfloat16


def test_edm2s_folder_has_moments_and_labels(latents, tmp_path):
    folder = LatentFolder(latents())
    export_npy(folder, tmp_path / "vae-sd", ignore)
    listed = json.loads((tmp_path / "vae-sd" / "dataset.json").read_text())
    files = sorted((tmp_path / "vae-sd").rglob("*.npy"))
    names = [str(file.relative_to(tmp_path / "vae-sd")) for file in files]
    assert names[1] == "00000/img-mean-std-00000001.npy"
    assert [dict(listed["labels"])[name] for name in names] == [index % 3 for index in range(12)]
    assert [listed["names"][name] for name in names] == [f"more/{index:02d}" for index in range(12)]
    mean, std = torch.from_numpy(np.stack([np.load(file) for file in files])).chunk(2, dim=1)
    assert torch.equal(mean, folder.rows(range(12)).latents)
    assert not std.any()


def test_labels_are_null_unless_every_sample_has_one(latents, tmp_path):
    export_npy(LatentFolder(latents(has_labels=False)), tmp_path / "out", ignore)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] is None


@pytest.mark.parametrize("write", [export_webdataset, export_npy])
def test_an_export_that_was_cut_off_goes_on(latents, tmp_path, write):
    folder = LatentFolder(latents())
    with patch.object(export, "ROWS_PER_FOLDER", 5):
        write(folder, tmp_path / "whole", ignore)
        done = []

        def stop_at_10(rows):
            done.append(rows)
            if sum(done) == 10:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(folder, tmp_path / "cut", stop_at_10)
        with patch.object(export, "_npy", side_effect=export._npy) as made:
            write(folder, tmp_path / "cut", ignore)
        assert made.call_count == 2
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_an_output_of_something_else_is_refused(latents, tmp_path):
    folder, other = LatentFolder(latents()), LatentFolder(latents("other", dtype="float16"))
    export_npy(folder, tmp_path / "out", ignore)
    for source, write in ((other, export_npy), (folder, export_webdataset)):
        with pytest.raises(LatentsError, match="out"):
            write(source, tmp_path / "out", ignore)
    (tmp_path / "out" / "export.json").write_bytes(b"\xff")
    with pytest.raises(LatentsError, match="out"):
        export_npy(folder, tmp_path / "out", ignore)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(LatentsError, match="not empty"):
        export_npy(folder, tmp_path / "full", ignore)


def test_equal_latents_give_equal_tars_without_owner_and_time(latents, tmp_path):
    folder = LatentFolder(latents())
    for name in ("a", "b"):
        export_webdataset(folder, tmp_path / name, ignore)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "latents-000000.tar") as archive:
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}
