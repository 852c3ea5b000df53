"""The data sets: every row once an epoch, one order for any number of workers and ranks, going on."""

import pickle
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from tests.training.latents.reading.lightning_dit import ImgLatentDataset
from training.errors import LatentsError
from training.latents.reading.datasets import LatentDataset, LatentStream


def keys_of(batches):
    return [batch.keys for batch in batches]


def order_of(stream):
    """Names of the rows in their order."""
    return [key for batch in stream for key in batch.keys]


def make_stream(folder, epoch=0, batch=0, **options):
    stream = LatentStream(folder, **{"batch_size": 2, "seed": 1, **options})
    stream.start(epoch, batch)
    return stream


def test_items_are_rows_and_then_their_mirror_images(latents):
    folder = latents(flip=True)
    plain, both = LatentDataset(folder), LatentDataset(folder, flips=True)
    assert (len(plain), len(both)) == (12, 24)
    item = both[13]
    assert (item.key, item.label) == ("more/01", 1)
    assert not torch.equal(item.latent, plain[1].latent)
    with pytest.raises(IndexError):
        plain[12]
    with pytest.raises(LatentsError, match="--flip"):
        LatentDataset(latents("other"), flips=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_collates_items(latents, num_workers):
    loader = DataLoader(LatentDataset(latents(dtype="bfloat16")), batch_size=5, num_workers=num_workers)
    batches = list(loader)
    assert [len(batch.key) for batch in batches] == [5, 5, 2]
    assert batches[0].latent.shape == (5, 32, 4, 4)
    assert batches[1].label.tolist() == [2, 0, 1, 2, 0]
    assert list(batches[1].key) == [f"more/{index:02d}" for index in range(5, 10)]


def test_an_epoch_visits_every_row_once_in_another_order_each_time(latents):
    folder = latents()
    first, again, other, reseeded = (
        order_of(make_stream(folder, epoch, seed=seed)) for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2))
    )
    assert sorted(first) == [f"more/{index:02d}" for index in range(12)]
    assert first == again
    assert len({tuple(order) for order in (first, other, reseeded)}) == 3


def test_latents_labels_and_names_of_a_batch_belong_together(latents):
    folder = latents()
    items = {item.key: item for item in LatentDataset(folder)}
    for batch in make_stream(folder):
        for latent, label, key in zip(*batch, strict=True):
            assert torch.equal(latent, items[key].latent)
            assert int(label) == items[key].label


def test_mirror_images_are_rows_of_an_epoch(latents):
    found = [
        latent.numpy().tobytes()
        for batch in make_stream(latents(flip=True), flips=True)
        for latent in batch[0]
    ]
    assert len(found) == len(set(found)) == 24


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(latents, num_workers):
    folder = latents()
    alone = keys_of(make_stream(folder))
    loader = DataLoader(make_stream(folder), batch_size=None, num_workers=num_workers)
    assert keys_of(loader) == alone


def test_persistent_workers_see_a_new_epoch(latents):
    folder = latents()
    stream = make_stream(folder)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch, batch in ((0, 0), (1, 0), (2, 3)):
        stream.start(epoch, batch)
        assert keys_of(loader) == keys_of(make_stream(folder, epoch, batch))


def test_ranks_share_the_batches_of_one_order(latents):
    folder = latents(count=13)
    whole = keys_of(make_stream(folder, batch_size=6))
    halves = [keys_of(make_stream(folder, batch_size=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert len(make_stream(folder, batch_size=3, rank=1, world_size=2)) == len(whole) == 2
    with pytest.raises(ValueError, match="together"):
        make_stream(folder, rank=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stopped_epoch_goes_on_where_it_was(latents, num_workers):
    folder = latents()
    whole = keys_of(make_stream(folder, epoch=3))
    rest = DataLoader(make_stream(folder, epoch=3, batch=4), batch_size=None, num_workers=num_workers)
    assert keys_of(rest) == whole[4:]


def test_rows_wander_less_than_the_buffer_is_long(latents):
    folder = latents(count=60, per_shard=10)
    order = order_of(make_stream(folder, buffer_rows=1))
    files = [int(key[5:]) // 10 for key in order]
    assert sorted(Counter(files[i : i + 10]).most_common(1)[0][1] for i in range(0, 60, 10)) == [10] * 6
    assert len(set(files[:10])) == 1  # a buffer of one row: file by file
    mixed = order_of(make_stream(folder, buffer_rows=15))
    place = {key: number for number, key in enumerate(order)}
    assert mixed != order
    assert max(abs(place[key] - number) for number, key in enumerate(mixed)) <= 15


def test_a_stream_travels_to_spawned_workers(latents):
    stream = make_stream(latents())
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert keys_of(loader) == keys_of(stream)
    assert pickle.dumps(stream.folder)


def test_fewer_rows_than_a_batch_are_told(latents):
    with pytest.raises(LatentsError, match="fewer than one batch"):
        make_stream(latents(), batch_size=13)


def test_a_cut_file_ends_a_loader_with_one_sentence(latents):
    folder = latents()
    stream = make_stream(folder)
    (folder / "latents-000001.safetensors").write_bytes(b"")
    with pytest.raises(LatentsError, match="latents-000001"):
        list(DataLoader(stream, batch_size=None, num_workers=1))


def test_lightning_dits_loader_reads_the_folder(latents):
    folder = latents(flip=True, dtype="float16")
    theirs, ours = ImgLatentDataset(folder), LatentDataset(folder, flips=True)
    assert len(theirs) == 12
    latent, label = theirs.view(7, "latents_flip")
    assert label == 1
    expected = (ours[19].latent - theirs.mean) / theirs.std
    assert torch.equal(latent, expected[0])
    every = torch.stack(
        [theirs.view(row, name)[0] for row in range(12) for name in ("latents", "latents_flip")]
    )
    every = every.double()
    assert every.mean(dim=(0, 2, 3)).abs().max() < 1e-2
    assert (every.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-2
    assert theirs[0][0].shape == (32, 4, 4)
