"""Lines in the log while something long goes on."""

import pytest

import training.output.progress
from training.output.progress import log_progress


def test_it_says_how_far_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.output.progress, "LOG_EVERY_S", 0.0)
    with caplog.at_level("INFO"):
        assert list(log_progress("abcd", 4, "the cache")) == list("abcd")
    messages = [record.message for record in caplog.records]
    assert messages == ["the cache: begins", *(f"the cache: {done} % done" for done in (0, 25, 50, 75))]
