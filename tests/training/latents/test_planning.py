"""Units of folders, tars and lists: their order, names and labels, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.training.conftest import encode_png, make_image, write_shard
from training.data.names import NO_JSON
from training.errors import DataError
from training.latents import planning
from training.latents.units import read_images

IMAGES = [encode_png(make_image(seed)) for seed in range(6)]


def plan_units(paths, batch_size=10):
    return planning.plan_units(paths, 1000, batch_size)


def make_folder(folder: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(IMAGES[index])
    return folder


def labels(plan) -> dict[str, int]:
    return {image.key: image.label for unit in plan.units for image in unit.images}


def test_a_folder_becomes_units_in_order_and_each_tar_in_it_units_of_its_own(tmp_path):
    data = make_folder(tmp_path / "data", "a.png", "c.png", "d.png")
    write_shard(data / "b.tar", {"x.png": IMAGES[3], "y.png": IMAGES[4]})
    plan = plan_units([data], 2)
    found = [(unit.number, unit.input, unit.start, unit.keys) for unit in plan.units]
    assert found == [
        (0, "data", 0, ["a", "c"]),
        (1, "data", 2, ["d"]),
        (2, "data/b.tar", 0, ["x", "y"]),
    ]
    assert [(one.name, one.images) for one in plan.inputs] == [("data", 3), ("data/b.tar", 2)]
    assert plan.classes == ()


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz"), ("s.tgz", "w:gz")])
def test_members_of_tars_are_read_at_their_places(tmp_path, name, mode):
    shard = write_shard(
        tmp_path / name,
        {"a.png": IMAGES[0], "a.cls": b"7", "b.png": IMAGES[1], "b.json": json.dumps({"label": 3}).encode()},
        mode,
    )
    plan = plan_units([shard])
    (unit,) = plan.units
    assert unit.is_compressed == (mode != "w")
    assert labels(plan) == {"a": 7, "b": 3}
    assert list(read_images(unit, 0, 2)) == IMAGES[:2]
    assert list(read_images(unit, 1, 2)) == IMAGES[1:2]


def test_class_folders_are_labels_over_all_folders_together(tmp_path):
    first = make_folder(tmp_path / "first", "cat/1.png", "dog/2.png")
    second = make_folder(tmp_path / "second", "bee/3.png", "dog/4.png", "none.png")
    plan = plan_units([first, second])
    assert plan.classes == ("bee", "cat", "dog")
    assert labels(plan) == {"cat/1": 1, "dog/2": 2, "bee/3": 0, "dog/4": 2, "none": -1}


def test_a_list_names_files_tars_and_labels(tmp_path):
    make_folder(tmp_path, "a.png", "sub/b.png")
    write_shard(tmp_path / "c.tar", {"x.png": IMAGES[3], "x.cls": b"4"})
    (tmp_path / "list.txt").write_text("sub/b.png\t5\n\na.png\nc.tar\ngone.png\t1\n")
    plan = plan_units([tmp_path / "list.txt"])
    assert labels(plan) == {"sub/b.png": 5, "a.png": -1, "gone.png": 1, "x": 4}
    assert [unit.input for unit in plan.units] == ["list.txt", "c.tar"]
    assert list(read_images(plan.units[0], 0, 3))[2] == "No such file or directory"


def test_names_need_not_be_utf_8(tmp_path):
    data = make_folder(tmp_path / "data", "a.png")
    (data / b"\xff.png".decode(errors="surrogateescape")).write_bytes(IMAGES[1])
    plan = plan_units([data])
    assert all(key.isprintable() for key in labels(plan))
    assert sorted(read_images(plan.units[0], 0, 2)) == sorted(IMAGES[:2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\tcat\n", "line 1: the label 'cat'"),
        ("a.png\t-1\n", "line 1: the label '-1'"),
        ("a.png\t3\na.png\t4\n", "line 2: a.png is there twice, first in line 1"),
        ("gone.tar\n", "gone.tar does not exist"),
        ("\n", "no images in"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_its_line(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        plan_units([tmp_path / "list.txt"])


@pytest.mark.parametrize("label", ['"cat"', "1.5", "-1", "true", "[1]", str(10**10)])
def test_a_label_in_json_that_is_no_number_is_named(tmp_path, label):
    shard = write_shard(tmp_path / "s.tar", {"a.png": IMAGES[0], "a.json": f'{{"label": {label}}}'.encode()})
    with pytest.raises(DataError, match=r"s\.tar: a\.json holds the label"):
        plan_units([shard])


def test_json_without_a_label_is_no_label(tmp_path):
    members = {
        "a.png": IMAGES[0],
        "a.json": b'{"caption": "a"}',
        "b.png": IMAGES[1],
        "b.json": b"{",
        "c.png": IMAGES[2],
    }
    members["c.json"] = b'{"label": null}'
    plan = plan_units([write_shard(tmp_path / "s.tar", members)])
    assert labels(plan) == {"a": -1, "b": -1, "c": -1}
    assert plan.left_out[NO_JSON] == 1


def test_numbers_and_class_folders_do_not_mix(tmp_path):
    data = make_folder(tmp_path / "data", "cat/a.png")
    shard = write_shard(tmp_path / "s.tar", {"x.png": IMAGES[3], "x.cls": b"4"})
    with pytest.raises(DataError, match="their numbers may differ"):
        plan_units([data, shard])


def test_inputs_of_one_name_are_told_apart_and_one_input_is_not_taken_twice(tmp_path):
    paths = [make_folder(tmp_path / parent / "photos", "a.png") for parent in ("one", "two")]
    assert [one.name for one in plan_units(paths).inputs] == [str(path) for path in paths]
    with pytest.raises(DataError, match="given twice"):
        plan_units([paths[0], paths[0]])


def test_units_are_whole_batches_of_about_a_thousand_images_or_256_mib():
    assert planning.images_per_unit(10**6, 98304, 8) == 1000
    assert planning.images_per_unit(10**6, 393216, 64) == 640
    assert planning.images_per_unit(10**6, 2**40, 8) == 8


def test_a_small_job_has_units_for_many_cores():
    assert planning.images_per_unit(12, 98304, 8) == 8
    assert planning.images_per_unit(1600, 98304, 8) == 104
