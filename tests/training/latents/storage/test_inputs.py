"""Data and latents at URLs: the same files as from and in folders."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.training.conftest import encode_png, make_image, write_shard
from tests.training.latents.conftest import digests
from training.errors import DataError
from training.latents.planning import plan_units
from training.latents.storage.inputs import Range, fetch, list_remote
from training.latents.storage.places import as_place, is_remote
from training.latents.tokenize import EXIT_SOME_BROKEN, tokenize_command
from training.latents.units import read_images


def urls(paths):
    """The same places, by fsspec's own file system of this machine, which other processes see too."""
    places = [as_place(f"file://{path}") for path in paths]
    assert all(map(is_remote, places))
    return places


def test_a_data_set_at_urls_gives_the_same_folder(expected, options, data):
    options = replace(options, data=urls(data), output=urls([options.output])[0])
    assert tokenize_command(options) == EXIT_SOME_BROKEN
    assert digests(options.output) == expected


def test_a_listing_is_that_of_the_folder(data, tmp_path):
    base = data[0].parent
    local, remote = (plan_units([place], 1000, 4) for place in (base, urls([base])[0]))
    for one, other in zip(local.units, remote.units, strict=True):
        assert (one.input, one.start, one.keys) == (other.input, other.start, other.keys)
        assert [image.label for image in one.images] == [image.label for image in other.images]
        assert list(read_images(one, 0, len(one))) == list(read_images(other, 0, len(other)))
    assert (local.inputs, local.classes, local.left_out) == (remote.inputs, remote.classes, remote.left_out)


def test_a_list_names_files_and_urls_beside_one_another(tmp_path, data):
    images = [encode_png(make_image(index)) for index in range(3)]
    for index, image in enumerate(images):
        (tmp_path / f"{index}.png").write_bytes(image)
    gone = f"file://{tmp_path}/gone.png"
    (tmp_path / "list.txt").write_text(f"0.png\t4\nfile://{tmp_path}/1.png\t5\n{gone}\t6\n2.png\t7\n")
    (unit,) = plan_units([tmp_path / "list.txt"], 1000, 4).units
    assert [image.label for image in unit.images] == [4, 5, 6, 7]
    assert list(read_images(unit, 0, 4)) == [*images[:2], f"{gone} does not exist", images[2]]


def test_what_cannot_be_used_is_told_by_its_url(tmp_path):
    with pytest.raises(DataError, match="nosuch://bucket"):
        as_place("nosuch://bucket/photos")
    with pytest.raises(DataError, match="memory://empty"):
        list_remote(as_place("memory://empty/photos"), Counter())
    shard = write_shard(tmp_path / "cut.tar", {"0.png": encode_png(make_image(0))})
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"file://.*cut.tar"):
        plan_units(urls([shard]), 1000, 4)


def test_an_object_that_became_shorter_is_told(tmp_path):
    (tmp_path / "0.bin").write_bytes(b"0123456789")
    url = f"file://{tmp_path}/0.bin"
    whole, cut = fetch([Range(url, 2, 8), Range(url, 5, 15)])
    assert whole == b"234567"
    assert cut == f"{url} ends within it"
