"""Rows of a folder by number and name, and folders that are refused."""

import json
import pickle

import pytest
import torch

from tests.training.conftest import make_image
from training.data.batches import fit_picture, to_byte_tensor
from training.errors import LatentsError
from training.latents.manifest import Identity, Manifest, write_manifest
from training.latents.reading.folder import LatentFolder
from training.latents.store import FolderStore


def expected(tokenizer, index, mirrored=False):
    pixels = to_byte_tensor(fit_picture(make_image(index), 32))[None]
    return tokenizer.encode(pixels.flip(-1) if mirrored else pixels)[0]


def test_rows_are_the_images_in_their_order_with_class_and_name(latents, saved):
    folder = LatentFolder(latents(broken=3))
    assert len(folder) == 11
    rows = folder.rows([0, 10, 3, 3])
    assert rows.keys == ["more/00", "more/11", "more/04", "more/04"]
    assert rows.labels.tolist() == [0, 2, 1, 1]
    for latent, index in zip(rows.latents, (0, 11, 4, 4), strict=True):
        torch.testing.assert_close(latent, expected(saved, index), rtol=1e-4, atol=1e-5)
    assert folder.labels() == [index % 3 for index in range(12) if index != 3]


def test_views_behind_the_rows_are_the_mirror_images(latents, saved):
    folder = LatentFolder(latents(flip=True))
    rows = folder.rows([1, 13])
    assert rows.keys == ["more/01", "more/01"]
    torch.testing.assert_close(rows.latents[1], expected(saved, 1, mirrored=True), rtol=1e-4, atol=1e-5)
    assert folder.shard_views(2).shape == (2, 2, 32, 4, 4)
    assert torch.equal(folder.shard_views(0)[1], rows.latents)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_have_the_type_of_the_folder(latents, dtype):
    assert LatentFolder(latents(dtype=dtype)).rows([0]).latents.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("number", [-1, 12, 99])
def test_there_is_no_other_row(latents, number):
    with pytest.raises(IndexError):
        LatentFolder(latents()).rows([number])


def test_names_lead_to_rows_and_statistics_are_of_all_views(latents):
    folder = LatentFolder(latents(flip=True))
    assert folder.find("more/07") == [7]
    assert folder.find("other") == []
    views = torch.cat([folder.shard_views(shard) for shard in range(3)]).double()
    mean, var = folder.statistics()
    torch.testing.assert_close(mean, views.mean(dim=(0, 1)).float())
    torch.testing.assert_close(var, views.var(dim=(0, 1), correction=0).float())


def test_a_folder_travels_to_other_processes(latents):
    folder = LatentFolder(latents())
    before = folder.rows([4])
    again = pickle.loads(pickle.dumps(folder))
    assert torch.equal(again.rows([4]).latents, before.latents)


def test_a_file_without_rows_is_passed_over(latents):
    folder = LatentFolder(latents(count=6, per_shard=5, broken=5))
    assert [len(rows) for rows in folder.shard_ranges] == [5, 0]
    assert folder.labels() == [0, 1, 2, 0, 1]
    assert folder.shard_views(1).shape == (0, 1, 32, 4, 4)


def damage_cut(folder):
    file = folder / "latents-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return file


def damage_missing(folder):
    file = folder / "latents-000001.safetensors"
    file.unlink()
    return file


def damage_incomplete(folder):
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "complete": False}))
    return file


def damage_no_manifest(folder):
    file = folder / "manifest.json"
    file.unlink()
    return file


def damage_foreign(folder):
    file = folder / "manifest.json"
    file.write_text("{}")
    return file


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_missing, damage_incomplete, damage_no_manifest, damage_foreign]
)
def test_what_is_no_complete_folder_is_told_by_file(latents, damage):
    folder = latents()
    file = damage(folder)
    with pytest.raises(LatentsError, match=str(file)):
        LatentFolder(folder)


def test_another_folders_file_of_the_same_size_is_told_when_it_is_read(latents):
    folder, other = latents(), latents("other", precision="float16")
    name = "latents-000000.safetensors"
    (folder / name).write_bytes((other / name).read_bytes())
    store = FolderStore(folder)
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    changed = manifest.shards[0].model_copy(update={"bytes": (folder / name).stat().st_size})
    write_manifest(store, manifest.with_shards([changed, *manifest.shards[1:]], complete=True))
    with pytest.raises(LatentsError, match="another folder"):
        LatentFolder(folder).rows([0])


def test_another_tokenizers_latents_are_refused(latents, saved):
    folder = latents()
    assert len(LatentFolder(folder, saved.checkpoint.sha256)) == 12
    with pytest.raises(LatentsError, match="another tokenizer"):
        LatentFolder(folder, "0" * 64)


def test_statistics_that_are_gone_are_told(latents):
    folder = latents()
    (folder / "statistics.safetensors").unlink()
    with pytest.raises(LatentsError, match="statistics"):
        LatentFolder(folder).statistics()


def test_the_identity_tells_whether_there_are_mirror_images(latents):
    folder = LatentFolder(latents())
    assert isinstance(folder.identity, Identity)
    with pytest.raises(LatentsError, match="--flip"):
        folder.num_views(True)
