"""The fusion benchmark, end to end at a size for tests."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fusion
from benchmarks.cases import fusions as implementations
from benchmarks.harness.provenance import ROOT

SIZE = ("--width", "64", "--layers", "3", "--tokens", "16", "--repeats", "2")
SMALL = (*SIZE, "--device", "cpu", "--batch", "1", "2", "--hidden-width", "16", "96")


def test_every_size_and_implementation_has_a_row(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(fusion.main, *SMALL, "--implementations", "definition", "folded", "--commit", "0123abc")
    cases = [(row["hidden_width"], row["batch"], row["implementation"]) for row in rows]
    assert cases == [
        (width, batch, name) for width in ("16", "96") for batch in "12" for name in ("definition", "folded")
    ]
    for row in rows:
        assert {row["dtype"], row["commit"], row["num_runs"]} == {"float32", "0123abc", "2"}
        assert 0 < float(row["relative_error"]) < 1e-5
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["speedup_over_compiled"] == ""
    definition, folded = rows[-2:]
    assert definition["speedup_over_definition"] == "1"
    measured = float(definition["p50_ms"]) / float(folded["p50_ms"])
    assert float(folded["speedup_over_definition"]) == pytest.approx(measured, rel=1e-4)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_appends_to_earlier_results(run: Any) -> None:
    arguments = (*SIZE, "--device", "cpu", "--batch", "1", "--hidden-width", "16")
    run(fusion.main, *arguments, "--implementations", "folded")
    assert len(run(fusion.main, *arguments, "--implementations", "folded")) == 2


def test_what_cannot_run_is_one_line(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.WARNING):
        rows = run(
            fusion.main,
            *(*SIZE, "--device", "cpu", "--batch", "1", "--hidden-width", "16"),
            *("--implementations", *implementations.IMPLEMENTATIONS),
        )
    assert [row["implementation"] for row in rows] == ["definition", "folded"]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split(":")[0] for line in lines] == [
        "skipped fused",
        "skipped fused_fp8",
        "skipped fused_graph",
        "skipped definition_compiled (batch 1, H 16)",
    ]
    assert lines[-1].endswith("RuntimeError: no C++ compiler")


def test_a_wrong_result_is_not_timed(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("--implementations", "definition", "folded")
    arguments = (*SIZE, "--device", "cpu", "--batch", "1", "--hidden-width", "16", *names)
    right = implementations.folded.fuse_layers
    for wrong in (lambda tokens: tokens.roll(1, 1), lambda tokens: tokens * float("nan")):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                implementations.folded,
                "fuse_layers",
                lambda *a, w=wrong: right(*a)._replace(tokens=w(right(*a)[0])),
            )
            rows = run(fusion.main, *arguments)
        assert {row["implementation"] for row in rows} == {"definition"}
        assert "skipped folded (batch 1, H 16): wrong result" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_left_out_is_not_timed(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    right = implementations.folded.fuse_layers

    def without_a_layer(states: Any, experts: Any, spec: Any) -> Any:
        return right([torch.zeros_like(states[0]), *states[1:]], experts, spec)

    monkeypatch.setattr(implementations.folded, "fuse_layers", without_a_layer)
    arguments = ("--layers", "12", "--width", "64", "--tokens", "16", "--repeats", "1", "--dtype", dtype)
    rows = run(
        fusion.main,
        *(*arguments, "--device", "cpu", "--batch", "1", "--hidden-width", "96"),
        *("--implementations", "definition", "folded"),
    )
    assert [row["implementation"] for row in rows] == ["definition"]
    assert "skipped folded (batch 1, H 96): wrong result, relative error" in caplog.text


def test_an_element_left_unwritten_is_not_timed(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no token is checked against the definition."""
    right = implementations.folded.fuse_layers
    static: list[torch.Tensor] = []

    def leave_one(*arguments: Any) -> Any:
        result = right(*arguments)
        if not static:
            static.append(result.tokens)
        static[0][:, : fusion.CHECK_STRIDE - 1] = result.tokens[:, : fusion.CHECK_STRIDE - 1]
        static[0][:, fusion.CHECK_STRIDE :] = result.tokens[:, fusion.CHECK_STRIDE :]
        return result._replace(tokens=static[0])

    monkeypatch.setattr(implementations.folded, "fuse_layers", leave_one)
    arguments = (*SIZE, "--device", "cpu", "--batch", "1", "--hidden-width", "16")
    rows = run(fusion.main, *arguments, "--implementations", "definition", "folded")
    assert [row["implementation"] for row in rows] == ["definition"]
    assert "skipped folded (batch 1, H 16): wrong result, not finite" in caplog.text


def test_a_size_that_memory_does_not_hold_is_skipped(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_states = fusion.random_states

    def small_memory(operands: Any, batch: int, tokens: int) -> Any:
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return random_states(operands, batch, tokens)

    monkeypatch.setattr(fusion, "random_states", small_memory)
    rows = run(fusion.main, *SMALL, "--implementations", "folded")
    assert [(row["hidden_width"], row["batch"]) for row in rows] == [("16", "1"), ("96", "1")]
    assert "skipped batch 2, H 96: OutOfMemoryError: CUDA out of memory" in caplog.text


def test_nothing_to_measure_is_a_failure(run: Any) -> None:
    assert run(fusion.main, *SMALL, "--implementations", "fused_graph", status=1) == []


def test_a_file_of_other_columns_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        fusion.main([*SMALL, "--output", str(path)])
    assert caught.value.code == 2
    assert "has other columns" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["no-such-device", "meta", "cuda:99"])
def test_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(SystemExit) as caught:
        fusion.main([*SIZE, "--device", device])
    assert caught.value.code == 2
    assert f"--device {device}" in capsys.readouterr().err


def test_needs_torch_alone() -> None:
    absent = ("pydantic", "pydantic_settings", "fastapi", "triton", "tqdm", "diffusers", "transformers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "from benchmarks.fusion import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [*SIZE, "--device", "cpu", "--batch", "1", "--hidden-width", "16", "--help"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "definition_compiled" in result.stdout


@pytest.mark.gpu
def test_fused_kernels_and_their_graph(run: Any) -> None:
    names = ("--implementations", "definition", "fused", "fused_graph")
    rows = run(fusion.main, *SIZE, "--device", "cuda", "--batch", "2", "--hidden-width", "96", *names)
    assert [row["implementation"] for row in rows] == ["definition", "fused", "fused_graph"]
