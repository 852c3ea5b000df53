"""Which format an answer gets."""

import pytest

from service.codecs.media_types import (
    JPEG,
    JSON,
    LATENT_MEDIA_TYPES,
    NPY,
    PICTURE_MEDIA_TYPES,
    PNG,
    RAW,
    choose,
)
from service.errors import NotAcceptableError


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, PNG),
        ("", PNG),
        ("*/*", PNG),
        ("image/*", PNG),
        ("image/jpeg", JPEG),
        ("IMAGE/JPEG ; Q=0.5", JPEG),
        ("image/jpeg;q=0.5, image/png;q=0.4", JPEG),
        ("image/*;q=0.2, application/json", JSON),
        ("image/png;q=0, image/*", JPEG),
        ("text/html, */*;q=0.1", PNG),
        ("tensor/binary", RAW),
        ("nonsense, application/x-npy", NPY),
        ("image/png;q=high, image/jpeg", JPEG),
    ],
)
def test_accept(accept: str | None, expected: str) -> None:
    assert choose(None, accept, PICTURE_MEDIA_TYPES) == expected


@pytest.mark.parametrize(
    "accept", ["text/html", "image/png;q=0", "nonsense", "*/png", "image/png;q=2", ",;,"]
)
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(NotAcceptableError, match="can be produced"):
        choose(None, accept, LATENT_MEDIA_TYPES)


def test_format_wins_over_accept() -> None:
    assert choose("raw", "text/html", LATENT_MEDIA_TYPES) == RAW
    assert (
        choose("jpg", "image/png", PICTURE_MEDIA_TYPES) == choose("jpeg", None, PICTURE_MEDIA_TYPES) == JPEG
    )
