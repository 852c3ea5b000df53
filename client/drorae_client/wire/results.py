"""What the service answers, as objects.

Shape legend: N items, C h w one latent, S image side.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np

from drorae_client.errors import AnswerError, InputError
from drorae_client.wire.tensors import Array, read_safetensors, to_torch, write_safetensors


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """What every answer tells.

    Attributes:
        model: name of the model that made it.
        checkpoint_sha256: identity of its weights.
        request_id: the id that the service's log and traces have.
        timings: milliseconds by stage of the service (``queue``, ``device``, ...), as ``Server-Timing`` says.
    """

    model: str | None = None
    checkpoint_sha256: str | None = None
    request_id: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Latents(Result):
    """Latents of N images.

    Attributes:
        array: [N, C, h, w], float16 or float32; bfloat16 numbers are widened to float32, without loss.
        dtype: of the numbers on the wire: float16, bfloat16 or float32.
        latent: ``enriched`` or ``base``.
        normalized: whether they are normalised per position.
    """

    array: Array
    dtype: str = "float16"
    latent: str = "enriched"
    normalized: bool = False

    def __repr__(self) -> str:
        return f"Latents({list(self.array.shape)}, {self.dtype}, {self.latent}, model={self.model!r})"

    def __len__(self) -> int:
        return len(self.array)

    def split(self) -> list[Self]:
        """Each item as latents of its own, [1, C, h, w]."""
        return [replace(self, array=self.array[index : index + 1].copy()) for index in range(len(self))]

    def torch(self) -> Any:
        """A PyTorch tensor [N, C, h, w] of `dtype`. Imports torch."""
        return to_torch(self.array, self.dtype)

    def to_safetensors(self) -> bytes:
        """A safetensors file as ``/encode`` answers it, with model, checkpoint and kind in its metadata."""
        known = {"model": self.model, "checkpoint_sha256": self.checkpoint_sha256}
        metadata = {name: value for name, value in known.items() if value is not None}
        kind = {"latent": self.latent, "normalized": str(self.normalized).lower()}
        return write_safetensors("latents", self.array, self.dtype, metadata | kind)

    @classmethod
    def from_safetensors(cls, data: bytes, **told: Any) -> Self:
        """Latents of a file that ``/encode``, ``drorae encode`` or `to_safetensors` wrote.

        Raises:
            AnswerError: it is no such file.
        """
        array, dtype, metadata = read_safetensors("latents", data)
        return cls(
            array=array,
            dtype=dtype,
            latent=metadata.get("latent", "enriched"),
            normalized=metadata.get("normalized") == "true",
            model=metadata.get("model"),
            checkpoint_sha256=metadata.get("checkpoint_sha256"),
            **told,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a ``.safetensors`` file, or a ``.npy`` file of the numbers alone.

        Raises:
            InputError: another suffix.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".npy":
            np.save(path, self.array, allow_pickle=False)
        elif suffix == ".safetensors":
            Path(path).write_bytes(self.to_safetensors())
        else:
            raise InputError(f"{path}: files of latents end in .safetensors or .npy")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a ``.safetensors`` file.

        Raises:
            InputError: it holds no latents.
        """
        try:
            return cls.from_safetensors(Path(path).read_bytes())
        except AnswerError as exc:
            raise InputError(f"{path}: {exc.detail}") from exc


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Pictures(Result):
    """N pictures, as numbers or as the files that were asked for.

    Attributes:
        files: PNG or JPEG files; empty where no files were asked for.
        psnr: of each reconstruction, dB, infinite where it is exact; empty where no files were asked for.
        ssim: of each reconstruction, at most 1.
    """

    numbers: Array | None = None
    files: tuple[bytes, ...] = ()
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()

    def __repr__(self) -> str:
        form = "files" if self.files else "array"
        return f"Pictures({len(self)}, {form}, model={self.model!r})"

    def __len__(self) -> int:
        return len(self.files) if self.numbers is None else len(self.numbers)

    @cached_property
    def array(self) -> Array:
        """uint8 [N, 3, S, S]. Files are decoded for it, by Pillow."""
        if self.numbers is not None:
            return self.numbers
        return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in self.pil()])

    def pil(self) -> list[Any]:
        """Pillow's images, in RGB. Imports Pillow."""
        from PIL import Image

        if self.numbers is None:
            return [Image.open(io.BytesIO(file)).convert("RGB") for file in self.files]
        return [Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))) for picture in self.numbers]

    def torch(self) -> Any:
        """A PyTorch tensor, uint8 [N, 3, S, S]. Imports torch."""
        return to_torch(self.array, "uint8")


@dataclass(frozen=True, eq=False, kw_only=True)
class Info(Result):
    """What runs at the service.

    Attributes:
        version: of the service.
        image_size: side of pictures, pixels.
        latent_shape: (C, h, w).
        has_statistics: whether ``normalize=True`` is possible.
        limits: of a request, by the name of the setting, such as ``max_items_per_request``.
        document: the whole answer of ``/info``.
    """

    version: str
    image_size: int
    latent_shape: tuple[int, int, int]
    has_statistics: bool
    limits: Mapping[str, float]
    document: Mapping[str, Any] = field(repr=False)
