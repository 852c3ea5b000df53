"""Suggestions: the nearest name, the right section, or none."""

import pytest

from model.spelling import suggest

KNOWN = ["name", "optimizer", "optimizer.learning_rate", "loss.l1"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("nam", "name"),
        ("optimiser", "optimizer"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("loss.learning_rate", "optimizer.learning_rate"),
        ("learning_rat", "optimizer.learning_rate"),
    ],
)
def test_the_nearest_name(name: str, nearest: str) -> None:
    assert suggest(name, KNOWN) == f"; did you mean {nearest!r}?"


def test_nothing_where_nothing_is_near() -> None:
    assert suggest("x", KNOWN) == suggest("name", []) == ""
