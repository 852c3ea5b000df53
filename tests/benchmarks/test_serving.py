"""The load generator against a server that answers as told, and a small run against the real service."""

import asyncio
import csv
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.harness.photos import SAMPLES, PhotoError, read_photos, stage_photos
from benchmarks.harness.provenance import Provenance
from benchmarks.harness.service import PARTS
from benchmarks.serving import __main__ as serving
from benchmarks.serving.client import BOUNDARY, Latency, Load, build_requests, run_client
from benchmarks.serving.report import Bar, ServingRow, row_of_trials
from benchmarks.serving.simulated import MAX_BATCH, SimulatedDevice
from benchmarks.serving.trials import Trial
from model.config import DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig
from model.tokenizer import Tokenizer

SIDE = 32
Reply = Callable[[int], bytes]
PROVENANCE = Provenance("CPU", "float32", "2", "3", "abc")


def tiny_config() -> TokenizerConfig:
    return TokenizerConfig(
        name="tiny",
        image_size=SIDE,
        encoder=EncoderConfig(
            width=32, depth=4, num_heads=2, mlp_ratio=2, patch_size=7, image_size=28, position_grid=4
        ),
        fusion=FusionConfig(num_layers=3, hidden_width=48, num_heads=2),
        decoder=DecoderConfig(width=32, depth=2, num_heads=2, mlp_width=64, patch_size=8),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    stage_photos(SAMPLES, SIDE, path)
    return path


def answer(status: int, body: bytes = b"x" * 1000, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body


@contextmanager
def server(reply: Reply) -> Iterator[str]:
    """Answers the n-th request of all with ``reply(n)``; an empty reply cuts the connection."""
    loop = asyncio.new_event_loop()
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                data, count = reply(count), count + 1
                if not data:
                    return
                writer.write(data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    listening = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def close() -> None:
        listening.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def load(url: str, folder: Path, clients: int = 4, **changes: float) -> Load:
    timing = {"duration_s": 0.4, "warmup_s": 0.1, "grace_s": 1.0}
    return Load(url, "/encode", str(folder), clients, **{**timing, **changes})  # type: ignore[arg-type]


def test_photos_become_squares_of_jpeg(folder: Path, tmp_path: Path) -> None:
    photos = read_photos(folder)
    assert len(photos) == 3
    assert all(photo.startswith(b"\xff\xd8\xff") for photo in photos)
    untouched = tmp_path / "untouched"
    untouched.mkdir()
    stage_photos(SAMPLES, 0, untouched)
    assert set(read_photos(untouched)) == {path.read_bytes() for path in SAMPLES.glob("*.jpg")}
    with pytest.raises(PhotoError, match="neither a folder nor a tar"):
        stage_photos(SAMPLES / "README.md", 0, untouched)


def test_requests_are_whole(folder: Path) -> None:
    photos = read_photos(folder)
    single = build_requests(load("http://h:1", folder, deadline_s=2.5), photos)
    assert len(single) == len(photos)
    head, _, body = single[1].partition(b"\r\n\r\n")
    assert body == photos[1]
    assert head.startswith(b"POST /encode HTTP/1.1\r\nHost: h:1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"X-Request-Timeout: 2.5" in head
    several = build_requests(load("http://h:1", folder, images_per_request=4), photos)[2]
    assert several.count(b"--" + BOUNDARY.encode() + b"\r\n") == 4
    assert several.endswith(b"--" + BOUNDARY.encode() + b"--\r\n")


def test_quantiles() -> None:
    assert Latency.of([]) == Latency()
    assert Latency.of([k / 1e3 for k in range(100)]) == pytest.approx(Latency(100, 50, 90, 99, 99))


def test_closed_loop_counts_what_comes_back(folder: Path) -> None:
    with server(lambda _: answer(200)) as url:
        report = run_client(load(url, folder))
    assert set(report.statuses) == {200}
    assert report.errors == {}
    assert report.num_total > report.statuses[200] > 50
    assert report.ok_per_s == pytest.approx(report.statuses[200] / 0.4, rel=0.2)
    assert 0 < report.latencies[200].p50_ms <= report.latencies[200].p99_ms
    assert 0 < report.cpu_s < 1


def test_open_loop_keeps_its_rate_and_notes_refusals(folder: Path) -> None:
    def reply(number: int) -> bytes:
        return answer(429, headers="Retry-After: 7\r\n") if number % 2 else answer(200)

    with server(reply) as url:
        report = run_client(load(url, folder, rate_per_s=200.0))
    assert sum(report.statuses.values()) == pytest.approx(80, abs=4)
    assert report.num(429, 429) == pytest.approx(40, abs=3)
    assert (report.num_without_retry_after, report.retry_after_s) == (0, 7)
    assert report.num_unsent == 0


def test_waits_for_a_connection_are_latency(folder: Path) -> None:
    """One connection, answers that take 20 ms, 100 arrivals a second: half of them must wait ever longer."""
    answered = threading.Event()  # never set: its timeout is the time that an answer takes

    def reply(_: int) -> bytes:
        answered.wait(0.02)
        return answer(200)

    with server(reply) as url:
        report = run_client(load(url, folder, clients=1, rate_per_s=100.0))
    assert report.answer_times[200].p50_ms < 60
    assert report.latencies[200].max_ms > 2 * report.answer_times[200].p50_ms
    assert report.num_unsent > 0


def test_cut_and_unanswered_requests_are_errors(folder: Path) -> None:
    with server(
        lambda number: b"" if number % 5 == 4 else answer(200, headers="connection: close\r\n")
    ) as url:
        report = run_client(load(url, folder, clients=2))
    assert report.errors["reset"] > 0
    assert report.statuses[200] > 0
    with server(lambda _: answer(200)[:-1]) as url:
        report = run_client(load(url, folder, clients=2, grace_s=0.1))
    assert report.errors == {"timeout": 2}
    assert report.num_total == 0


def test_late_answers_are_counted(folder: Path) -> None:
    with server(lambda _: answer(200)) as url:
        report = run_client(load(url, folder, deadline_s=1e-9))
    assert report.num_late == report.statuses[200] > 0


def test_a_device_does_one_batch_at_a_time(tmp_path: Path) -> None:
    config = tiny_config()
    device = SimulatedDevice(config, 1.0, tmp_path / "lock")
    assert device.latents(3).shape == (3, *config.latent_shape)
    assert device.pictures(MAX_BATCH + 1).shape == (MAX_BATCH + 1, 3, SIDE, SIDE)
    assert torch.equal(device.latents(2), device.latents(2))


def test_rows_hold_medians_and_bars(folder: Path) -> None:
    with server(lambda _: answer(200)) as url:
        report = run_client(load(url, folder))
    trials = [
        Trial(report, cpu_s, dict.fromkeys(PARTS, cpu_s / 3), 2**20, 3 * 2**20, 2**21)
        for cpu_s in (1.0, 3.0, 2.0)
    ]
    row = row_of_trials(PROVENANCE, "closed", "service", trials, clients=4)
    assert row.cpu_ms_per_request == pytest.approx(2e3 / report.num_total)
    assert row.decoders_cpu_ms_per_request == pytest.approx(2e3 / 3 / report.num_total)
    assert (row.rss_before_mib, row.rss_peak_mib, row.rss_after_mib) == (1, 3, 2)
    assert row.num_200 == 3 * report.statuses[200]
    assert row.met is None
    assert row.held_to(Bar("other", 1.6, 1.5)).met
    assert not row.held_to(Bar("other", 1.4, 1.5)).met
    assert row.held_to(Bar("other", 2.9, 3.0, upper=True)).met


@pytest.mark.slow
def test_a_small_run_against_the_real_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "tiny"
    torch.manual_seed(0)
    Tokenizer(tiny_config()).save(checkpoint)
    path = tmp_path / "serving.csv"
    status = serving.main(
        [
            "load",
            "--quick",
            f"--checkpoint={checkpoint}",
            "--duration-s=0.3",
            "--open-duration-s=0.3",
            "--max-connections=32",
            f"--output={path}",
        ]
    )
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["scenario"] for row in rows} == {"closed", "unloaded", "open", "overload"}
    assert status == int(any(row["met"] == "False" for row in rows))
    for row in rows:
        assert set(row) == set(ServingRow.__dataclass_fields__)
        assert (row["num_5xx"], row["num_late"]) == ("0", "0")
    single = next(row for row in rows if row["system"] == "service" and row["images_per_request"] == "1")
    bare = max(float(row["images_per_s"]) for row in rows if row["system"] == "bare")
    assert float(single["ratio"]) == pytest.approx(float(single["images_per_s"]) / bare, rel=1e-4)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_settings_and_photos_are_checked_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["load", "--set", "batch_size"], "not NAME=VALUE"),
        (["load", "--photos", str(tmp_path)], "holds no photos"),
    ):
        with pytest.raises(SystemExit):
            serving.main(arguments)
        assert words in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text(json.dumps([]))
    with pytest.raises(SystemExit):
        serving.main(["host", "--output", str(other)])
    assert "other columns" in capsys.readouterr().err
