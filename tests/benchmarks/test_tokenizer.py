"""The tokenizer benchmark, end to end with the small preset."""

import logging
from typing import Any

import pytest

from benchmarks import tokenizer

MINI = ("--device", "cpu", "--preset", "mini", "--batch", "1", "--repeats", "1")
OURS = ("encode_base", "encode_reference", "encode_folded", "decode")


def test_our_own(run: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.WARNING):
        rows = run(tokenizer.main, *MINI, "--implementations", *OURS, "encode_triton", "encode_graph")
    assert [row["implementation"] for row in rows] == list(OURS)
    assert [row["fusion"] for row in rows] == ["none", "reference", "folded", "none"]
    for row in rows:
        assert float(row["relative_error"]) < 1e-5
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["p50_ms"]), rel=1e-4)
        assert row["speedup_over_diffusers"] == ""
    base, _, folded, decode = rows
    assert base["time_over_base"] == "1"
    measured = float(folded["p50_ms"]) / float(base["p50_ms"])
    assert float(folded["time_over_base"]) == pytest.approx(measured, rel=1e-4)
    assert decode["time_over_base"] == ""
    assert float(base["gflop"]) < float(folded["gflop"]) < float(decode["gflop"])
    skipped = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split(":")[0] for line in skipped] == ["skipped encode_triton", "skipped encode_graph"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


@pytest.mark.slow
def test_diffusers_gives_the_same_from_the_same_weights(run: Any) -> None:
    pytest.importorskip("diffusers")
    names = ("encode_base", "diffusers_encode", "decode", "diffusers_decode")
    rows = run(tokenizer.main, *MINI, "--implementations", *names)
    assert [row["implementation"] for row in rows] == list(names)
    for ours, theirs in (rows[:2], rows[2:]):
        # Its latents are divided by 1 + 1e-5.
        assert float(theirs["relative_error"]) < 5e-5
        measured = float(theirs["p50_ms"]) / float(ours["p50_ms"])
        assert float(ours["speedup_over_diffusers"]) == pytest.approx(measured, rel=1e-4)


def test_diffusers_may_be_absent(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "why_no_diffusers", lambda: "diffusers not installed")
    rows = run(tokenizer.main, *MINI, "--implementations", "encode_base", "diffusers_encode")
    assert [row["implementation"] for row in rows] == ["encode_base"]
    assert "skipped diffusers_encode: diffusers not installed" in caplog.text


@pytest.mark.gpu
def test_graphs_and_kernels_on_a_gpu(run: Any) -> None:
    names = ("encode_base", "encode_triton", "encode_base_graph", "encode_graph")
    arguments = ("--device", "cuda", "--preset", "mini", "--batch", "2", "--repeats", "2")
    rows = run(tokenizer.main, *arguments, "--implementations", *names)
    assert [row["implementation"] for row in rows] == list(names)
