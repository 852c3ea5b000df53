"""What ``encode_many`` of both clients shares."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from drorae_client.errors import DroraeError, InputError
from drorae_client.wire.results import Latents

OnError = Literal["raise", "return"]


@dataclass(frozen=True)
class Plan:
    """How ``encode_many`` goes about its images.

    Attributes:
        batch: most images per request.
        concurrency: most requests at once.
        on_error: what happens to the error of an image: it is raised, or it stands in the image's place.
        progress: whether a bar on standard error shows how far it is.

    Raises:
        InputError: an impossible value.
    """

    batch: int
    concurrency: int
    on_error: OnError
    progress: bool

    def __post_init__(self) -> None:
        if self.batch < 1 or self.concurrency < 1:
            raise InputError(f"batch={self.batch} and concurrency={self.concurrency} must be 1 or more")
        if self.on_error not in ("raise", "return"):
            raise InputError(f"on_error={self.on_error!r} is not possible: 'raise' or 'return'")

    def bar(self, images: object) -> "tqdm[Any]":
        """A progress bar, with the number of images where they tell it."""
        total = len(images) if hasattr(images, "__len__") else None
        return tqdm(total=total, unit="image", disable=not self.progress)

    def checked(self, results: Iterable[Latents | DroraeError], first: int) -> list[Latents | DroraeError]:
        """The results of images from the ``first`` on.

        Raises:
            DroraeError: of an image, where errors are raised; a note has its position.
        """
        checked = list(results)
        for position, result in enumerate(checked, first):
            if isinstance(result, DroraeError) and self.on_error == "raise":
                result.add_note(f"encode_many: image {position}, counted from 0")
                raise result
        return checked
