import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.images.files import fit_picture
from tests.training.conftest import make_image
from training.data.batches import (
    decode_image,
    evaluation_batches,
    random_crop,
    random_resized_crop,
    training_batches,
)
from training.data.sources import list_samples
from training.errors import DataError
from training.recipes.recipe import DataConfig


def config(photos: Path, num_workers: int = 0) -> DataConfig:
    return DataConfig(train=[photos], resize_short_side=(32, 40), num_workers=num_workers)


def take(photos: Path, start: int, count: int, num_workers: int = 0) -> list[torch.Tensor]:
    data = config(photos, num_workers)
    stream = training_batches(
        list_samples(data.train), data, random_crop(data, 32), 5, seed=3, start_batch=start
    )
    return [next(stream).images for _ in range(count)]


def test_stream_is_a_function_of_position(photos: Path) -> None:
    whole = take(photos, 0, 6)
    for number, images in enumerate(take(photos, 3, 3)):
        assert torch.equal(images, whole[3 + number])


def test_workers_do_not_change_the_stream(photos: Path) -> None:
    for alone, parallel in zip(take(photos, 0, 4), take(photos, 0, 4, num_workers=2), strict=True):
        assert torch.equal(alone, parallel)


def test_every_epoch_visits_every_image_once(photos: Path) -> None:
    data = DataConfig(train=[photos], resize_short_side=(32, 32), flip=False, num_workers=0)
    stream = training_batches(
        list_samples(data.train), data, lambda image, rng: fit_picture(image, 32), 12, seed=0, start_batch=0
    )
    epochs = [{image.numpy().tobytes() for image in next(stream).images} for _ in range(2)]
    assert len(epochs[0]) == 12
    assert epochs[0] == epochs[1]


def test_broken_images_are_skipped_and_counted(photos: Path) -> None:
    (photos / "03.png").write_bytes(b"text, not an image")
    whole = (photos / "05.png").read_bytes()
    (photos / "05.png").write_bytes(whole[: len(whole) // 2])
    data = config(photos)
    stream = training_batches(
        list_samples(data.train), data, random_crop(data, 32), 12, seed=0, start_batch=0
    )
    batch = next(stream)
    assert batch.images.shape == (12, 3, 32, 32)
    assert batch.num_broken >= 2
    assert sum(b.num_broken for _, b in evaluation_batches(list_samples([photos]), 32, 5)) == 2


def test_only_broken_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    data = config(tmp_path)
    with pytest.raises(DataError, match="none of the 1 listed images"):
        next(
            training_batches(list_samples(data.train), data, random_crop(data, 32), 2, seed=0, start_batch=0)
        )


@pytest.mark.parametrize("size", [(500, 20), (20, 500), (7, 9), (32, 32)])
def test_crops_have_the_size_asked_for(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    data = DataConfig(train=[Path()], resize_short_side=(32, 64))
    image = make_image(0, size)
    for transform in (random_crop(data, 32), random_resized_crop(data, 32)):
        assert transform(image, rng).size == (32, 32)


def test_decoding_applies_exif_orientation_and_composites_alpha() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    make_image(0, (40, 20)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (20, 40)
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
