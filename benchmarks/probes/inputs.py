"""Bodies of the scenarios: photos in every format, latents, and one image that a fault waits for."""

import base64
import io
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

from benchmarks.harness.photos import SAMPLES, read_photos, stage_photos
from benchmarks.probes.checks import Options
from benchmarks.probes.wire import Query, request

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BOUNDARY = "drorae-benchmark-boundary"
MARK_RGB = (255, 0, 128)
"""Colour of the image that injected faults wait for; no photo is all of one colour."""


@dataclass(frozen=True)
class Inputs:
    """Image files by format, and latents [C, h, w] of the served model's shape."""

    photos: list[bytes]
    files: dict[str, Sequence[bytes]]
    latents: np.ndarray
    side: int

    @property
    def marked(self) -> bytes:
        """The image that injected faults wait for."""
        return to_file(Image.new("RGB", (self.side, self.side), MARK_RGB), "PNG")


def make_inputs(photos: list[bytes], latent_shape: Sequence[int], side: int, seed: int) -> Inputs:
    """Inputs of photos.

    Args:
        photos: image files.
        latent_shape: [C, h, w].
        side: of the model's images, pixels.
        seed: of the latents.
    """
    files: dict[str, Sequence[bytes]] = {}
    for index, file_format in enumerate(FORMATS):
        pictures = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos[:4]]
        for number, picture in enumerate(pictures):
            picture.thumbnail((160 + 40 * number, 160 + 40 * ((number + index) % 4)))
        files[file_format] = [to_file(picture, file_format) for picture in pictures]
    latents = np.random.default_rng(seed).standard_normal(tuple(latent_shape)).astype(np.float32)
    return Inputs(photos, files, latents, side)


def load_inputs(options: Options, latent_shape: Sequence[int], side: int) -> Inputs:
    """The inputs that the options ask for, for a model's latents [C, h, w] and images of a side in pixels.

    Raises:
        PhotoError: there are no photos.
    """
    with tempfile.TemporaryDirectory(prefix="drorae-photos-") as folder:
        stage_photos(options.photos or SAMPLES, side, Path(folder))
        return make_inputs(read_photos(Path(folder)), latent_shape, side, options.seed)


def to_file(picture: Image.Image, file_format: str) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return buffer.getvalue()


def multipart(files: Sequence[bytes], boundary: str = BOUNDARY, name: str = "images") -> bytes:
    """A ``multipart/form-data`` body."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'
    parts = b"".join(head.encode() + file + b"\r\n" for file in files)
    return parts + f"--{boundary}--\r\n".encode()


def images_json(files: Sequence[bytes]) -> bytes:
    """``{"images": [base64, ...]}``."""
    encoded = ", ".join(f'"{base64.b64encode(file).decode()}"' for file in files)
    return f'{{"images": [{encoded}]}}'.encode()


def latents_safetensors(latents: np.ndarray) -> bytes:
    """A safetensors file with the tensor ``latents``."""
    return safetensors.numpy.save({"latents": np.ascontiguousarray(latents)})


def latents_npy(latents: np.ndarray) -> bytes:
    """A ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    return buffer.getvalue()


def encode_request(file: bytes, query: Query = (("format", "raw"),)) -> bytes:
    """``POST /encode`` with one image file."""
    return request("POST", "/encode", file, query=query)


def mixed_request(inputs: Inputs, rng: random.Random, max_items: int = 6) -> bytes:
    """A good request of any kind: one image or several, of any format, to any route."""
    file = rng.choice(inputs.files[rng.choice(FORMATS)])
    files = [rng.choice(inputs.photos) for _ in range(rng.randint(2, max_items))]
    batch = np.stack([inputs.latents] * rng.randint(1, max_items)).astype(np.float16)
    form = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    latent_format = ("format", rng.choice(("raw", "npy", "safetensors", "json")))
    picture_format = ("format", rng.choice(("png", "jpeg", "webp", "json", "raw")))
    return rng.choice(
        (
            lambda: request("POST", "/encode", file, query=[latent_format]),
            lambda: request("POST", "/encode", rng.choice(inputs.photos), query=[latent_format]),
            lambda: request("POST", "/encode", multipart(files), query=[latent_format], headers=form),
            lambda: request("POST", "/encode", images_json(files), query=[latent_format]),
            lambda: request("POST", "/decode", latents_npy(batch), query=[picture_format]),
            lambda: request("POST", "/decode", latents_safetensors(batch), query=[picture_format]),
            lambda: request("POST", "/reconstruct", file, query=[picture_format]),
            lambda: request("POST", "/reconstruct", multipart(files), query=[picture_format], headers=form),
        )
    )()
