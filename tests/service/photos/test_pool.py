"""The pool of decoder processes: what comes out of it, and what it survives."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop
from PIL import Image

from service.app import create_app
from service.codecs.images import read_image
from service.errors import MalformedError, QueueFullError, ServiceError, TooLargeError, UnavailableError
from service.photos import pool as module
from service.photos.decode import ImagePart, ImageRules
from service.photos.pool import Decoders
from service.photos.process import NUM_SLOTS, SLOT_BYTES
from service.photos.room import LARGE_PIXELS, PixelLimits, PixelRoom
from service.processes.tally import Tally
from service.settings import Settings
from service.telemetry.metrics import Metrics

Test = Callable[[Decoders, Metrics], Awaitable[None]]

RULES = ImageRules(side=64, max_pixels=4_000_000, max_aspect_ratio=20)
FAULTY = """
import os, sys, time
from service.photos import process as decoder
decode = decoder.decode_image
def faulty(data, rules, name):
    if b"crash" in data:
        os._exit(11)
    if b"hang" in data:
        time.sleep(60)
    if b"killed" in data:
        os.kill(os.getpid(), 9)
    if b"slow" in data:
        time.sleep(0.3)
    if b"spin" in data:
        while True:
            pass
    if b"hoard" in data:
        bytearray(2**30)
    return decode(data, rules, name)
decoder.decode_image = faulty
sys.exit(decoder.main())
"""


def png(colour: tuple[int, int, int], note: bytes = b"", size: tuple[int, int] = (80, 70)) -> bytes:
    """A file of one colour; the note stands behind its end, where Pillow does not look."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue() + note


def parts(*files: bytes) -> list[ImagePart]:
    return [ImagePart(f"image {index}", file) for index, file in enumerate(files)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the test's own limit ends the wait."""
    while not condition():
        await asyncio.sleep(0.01)


def run(test: Test, processes: int = 2, timeout_s: float = 30, limits: PixelLimits | None = None) -> None:
    """Run a test with a pool, on the service's own kind of loop."""

    @asynccontextmanager
    async def pool(metrics: Metrics) -> AsyncIterator[Decoders]:
        decoders = Decoders(processes, timeout_s, metrics, limits)
        await decoders.start()
        await until(lambda: all(link.ready for link in decoders._decoders) and bool(decoders._decoders))
        try:
            yield decoders
        finally:
            await decoders.close()

    async def main() -> None:
        metrics = Metrics()
        async with asyncio.timeout(180), pool(metrics) as decoders:
            await test(decoders, metrics)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders that crash, hang or dawdle where a file says so."""
    (tmp_path / "faulty_decoder.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "_MODULE", "faulty_decoder")


def num_failures(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("drorae_decoder_failures_total") or 0.0


def pids(decoders: Decoders) -> list[int]:
    return [link.pid for link in decoders._decoders]


def test_pixels_are_those_of_this_process() -> None:
    noise = Image.effect_noise((1500, 1400), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "BMP")
    large = buffer.getvalue()
    assert len(large) > SLOT_BYTES  # comes through the socket
    files = [png((index, 2 * index, 7)) for index in range(3 * NUM_SLOTS)] + [large]

    async def test(decoders: Decoders, _: Metrics) -> None:
        decoded = await decoders.decode(parts(*files), RULES)
        assert len(decoded) == len(files)
        for file, pixels in zip(files, decoded, strict=True):
            expected = read_image(file, RULES)
            assert pixels.dtype == torch.uint8
            assert pixels.shape == (3, 64, 64)
            assert torch.equal(pixels, expected)

    run(test)


@pytest.mark.parametrize(
    ("file", "kind", "words"),
    [
        (b"", MalformedError, "Image 0 is empty"),
        (b"GIF89a", MalformedError, "damaged or truncated GIF"),
        (png((1, 2, 3), size=(3000, 2000)), TooLargeError, "3000x2000"),
    ],
)
def test_errors_are_those_of_this_process(file: bytes, kind: type[ServiceError], words: str) -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        with pytest.raises(kind, match=words) as caught:
            await decoders.decode(parts(file, png((1, 1, 1))), RULES)
        with pytest.raises(kind) as here:
            read_image(file, RULES, "image 0")
        assert caught.value.detail == here.value.detail
        assert len(await decoders.decode(parts(png((1, 1, 1))), RULES)) == 1
        assert num_failures(metrics) == 0

    run(test, processes=1)


@pytest.mark.usefixtures("faulty")
def test_a_crash_costs_the_guilty_image_alone() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        innocent = [asyncio.ensure_future(decoders.decode(parts(png((9, 9, i))), RULES)) for i in range(6)]
        with pytest.raises(MalformedError, match="the image brought its decoder down"):
            await decoders.decode([ImagePart("the image", png((1, 2, 3), b"crash"))], RULES)
        for index, (pixels,) in enumerate(await asyncio.gather(*innocent)):
            assert pixels[:, 0, 0].tolist() == [9, 9, index]
        assert num_failures(metrics) == 2  # it was tried so often

    run(test, processes=1)


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("fault", [b"hang", b"killed"])
def test_a_decoder_that_does_nothing_or_was_killed_proves_nothing(fault: bytes) -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        hanging = asyncio.ensure_future(decoders.decode(parts(png((1, 2, 3), fault)), RULES))
        waiting = asyncio.ensure_future(decoders.decode(parts(png((4, 5, 6))), RULES))
        with pytest.raises(UnavailableError) as caught:
            await hanging
        assert int(caught.value.headers["Retry-After"]) >= 1
        assert (await waiting)[0][:, 0, 0].tolist() == [4, 5, 6]
        assert num_failures(metrics) == 2

    run(test, processes=1, timeout_s=0.8)


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(("fault", "words"), [(b"spin", "more time"), (b"hoard", "more memory")])
def test_cost_that_the_header_hides_is_ended_by_the_decoders_own_limits(fault: bytes, words: str) -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        costly = asyncio.ensure_future(decoders.decode(parts(png((1, 2, 3), fault)), RULES))
        honest = asyncio.ensure_future(decoders.decode(parts(png((4, 5, 6))), RULES))
        with pytest.raises(TooLargeError, match=words):
            await costly
        assert (await honest)[0][:, 0, 0].tolist() == [4, 5, 6]
        assert len(await decoders.decode(parts(png((1, 1, 1))), RULES)) == 1

    run(test, processes=1)


def test_a_stopped_decoder_costs_no_image() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        for pid in pids(decoders):
            os.kill(pid, signal.SIGSTOP)
        (pixels,) = await decoders.decode(parts(png((1, 2, 3))), RULES)
        assert pixels[:, 0, 0].tolist() == [1, 2, 3]
        assert decoders.is_ready

    run(test, timeout_s=0.8)


def test_idle_decoders_that_are_stopped_are_found_and_replaced() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        stopped = set(pids(decoders))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        await until(lambda: not decoders.is_ready)
        await until(lambda: decoders.is_ready and not stopped & set(pids(decoders)))
        assert num_failures(metrics) == 2

    run(test, timeout_s=0.8)


def test_the_use_of_decoders_is_measured() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        def value(name: str) -> float:
            return metrics.registry.get_sample_value(f"drorae_{name}") or 0.0

        assert value("decoders") == decoders.num_processes
        assert value("decoder_busy_seconds_total") == 0
        await decoders.decode(parts(png((1, 2, 3)), png((4, 5, 6))), RULES)
        busy_s = value("decoder_busy_seconds_total")
        assert busy_s > 0
        os.kill(pids(decoders)[0], signal.SIGKILL)
        await until(lambda: value("decoders") == decoders.num_processes - 1)
        await until(lambda: value("decoders") == decoders.num_processes)
        assert value("decoder_busy_seconds_total") == busy_s

    run(test)


@pytest.mark.usefixtures("faulty")
def test_an_image_whose_decoder_was_killed_is_tried_again() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        await decoders.decode(parts(png((1, 1, 1))), RULES)
        slow = asyncio.ensure_future(decoders.decode(parts(png((1, 2, 3), b"slow")), RULES))
        await asyncio.sleep(0.1)
        for pid in pids(decoders):
            os.kill(pid, signal.SIGKILL)
        assert (await slow)[0][:, 0, 0].tolist() == [1, 2, 3]
        assert num_failures(metrics) == 2

    run(test)


def large(side: int = 4001) -> bytes:
    """A file of under 100 bytes that takes a decoder long; one of this size counts as large."""
    assert side**2 > LARGE_PIXELS
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


LARGE_RULES = ImageRules(side=64, max_pixels=50_000_000, max_aspect_ratio=20)


def test_requests_take_turns_and_large_images_leave_a_decoder_to_others() -> None:
    ended: list[str] = []

    async def test(decoders: Decoders, metrics: Metrics) -> None:
        async def decode(name: str, *files: bytes) -> None:
            await decoders.decode(parts(*files), LARGE_RULES)
            ended.append(name)

        greedy = asyncio.ensure_future(decode("greedy", *[large()] * 2))
        await asyncio.sleep(0)
        assert sum(bool(link.jobs) for link in decoders._decoders) == 1
        await asyncio.gather(*(decode(f"photo {index}", png((1, 1, index))) for index in range(8)))
        await greedy
        assert ended[-1] == "greedy"

    run(test)


@pytest.mark.usefixtures("faulty")
def test_one_request_of_many_images_does_not_keep_the_next_waiting() -> None:
    """One decoder, which has some of the first request's images when the second comes."""
    ended: list[str] = []

    async def test(decoders: Decoders, metrics: Metrics) -> None:
        async def decode(name: str, *files: bytes) -> None:
            await decoders.decode(parts(*files), RULES)
            ended.append(name)

        many = asyncio.ensure_future(decode("many", *[png((1, 2, 3), b"slow")] * (NUM_SLOTS + 4)))
        await asyncio.sleep(0)
        await decode("one", png((1, 2, 3)))
        await many
        assert ended == ["one", "many"]

    run(test, processes=1)


def test_a_request_that_ends_gives_its_decoder_back() -> None:
    """Its client went away, or another of its images was bad: none is begun, and the large one is ended."""

    async def test(decoders: Decoders, metrics: Metrics) -> None:
        before = pids(decoders)
        going = asyncio.ensure_future(decoders.decode(parts(*[large(7000)] * 4), LARGE_RULES))
        await until(lambda: any(link.jobs for link in decoders._decoders))
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        assert not decoders._waiting
        assert metrics.registry.get_sample_value("drorae_pending_pixels") == 0
        assert len(await decoders.decode(parts(png((1, 1, 1))), RULES)) == 1
        await until(lambda: len(pids(decoders)) == 2 and before != pids(decoders))
        with pytest.raises(MalformedError):
            await decoders.decode(parts(large(7000), b"GIF89a" + bytes(100), large(7000)), LARGE_RULES)
        assert not decoders._waiting
        assert num_failures(metrics) == 0

    run(test, processes=2)


def test_bytes_of_requests_that_ended_are_not_kept() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        for pid in pids(decoders):
            os.kill(pid, signal.SIGSTOP)
        for _ in range(20):
            task = asyncio.ensure_future(decoders.decode(parts(png((1, 1, 1))), RULES))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert not decoders._waiting
        assert sum(len(link.jobs) for link in decoders._decoders) <= NUM_SLOTS

    run(test, processes=1)


def test_a_long_file_of_a_request_that_ended_leaves_with_it() -> None:
    """Also where its decoder was stopped before it had read the file."""
    long_file = png((1, 1, 1)) + bytes(4 * SLOT_BYTES)

    async def test(decoders: Decoders, metrics: Metrics) -> None:
        (link,) = decoders._decoders
        os.kill(link.pid, signal.SIGSTOP)
        tasks = [asyncio.ensure_future(decoders.decode(parts(long_file), RULES)) for _ in range(4)]
        await asyncio.sleep(0)
        assert len(link.jobs) == 1, "further ones wait where they are counted"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not decoders._waiting
        assert not any(job.part.data for job in link.jobs)
        assert link.discarded
        assert len(await decoders.decode(parts(long_file), RULES)) == 1

    run(test, processes=1)


def test_pixels_are_admitted() -> None:
    limits = PixelLimits(max_request_pixels=40_000_000, queue_limit_pixels=60_000_000, retry_after_s=3)

    async def test(decoders: Decoders, metrics: Metrics) -> None:
        with pytest.raises(TooLargeError, match="in total"):
            await decoders.decode(parts(*[large()] * 3), LARGE_RULES)
        first = asyncio.ensure_future(decoders.decode(parts(large(), large()), LARGE_RULES))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as caught:
            await decoders.decode(parts(large(), large()), LARGE_RULES)
        assert int(caught.value.headers["Retry-After"]) >= 3
        with pytest.raises(QueueFullError, match="deadline"):
            await decoders.decode(parts(large()), LARGE_RULES, deadline_s=time.monotonic() + 0.01)
        assert len(await decoders.decode(parts(png((1, 1, 1))), RULES)) == 1
        assert len(await first) == 2
        assert len(await decoders.decode(parts(large()), LARGE_RULES)) == 1

    run(test, limits=limits)


def test_headers_are_judged_before_any_decoder_has_the_files() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        for pid in pids(decoders):
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TooLargeError, match="Image 1"):
            await decoders.decode(parts(png((1, 1, 1)), large()), RULES)
        for pid in pids(decoders):
            os.kill(pid, signal.SIGCONT)

    run(test)


def test_decoders_that_cannot_start_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_MODULE", "service.no_such_module")

    async def main() -> None:
        decoders = Decoders(1, 30, Metrics())
        await decoders.start()
        try:
            async with asyncio.timeout(60):
                with pytest.raises(
                    UnavailableError
                ) as caught:  # it waits for a decoder until there is no hope
                    await decoders.decode(parts(png((1, 1, 1))), RULES)
                assert "Retry-After" in caught.value.headers
                with pytest.raises(UnavailableError):
                    await decoders.decode(parts(png((1, 1, 1))), RULES)
            assert not decoders.is_ready
        finally:
            await decoders.close()

    asyncio.run(main())
    assert "before it was ready" in caplog.text


@pytest.mark.usefixtures("faulty")
def test_what_nobody_waits_for_is_not_decoded() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        slow = [
            asyncio.ensure_future(decoders.decode(parts(png((1, 2, 3), b"slow")), RULES))
            for _ in range(NUM_SLOTS)
        ]
        crash = asyncio.ensure_future(decoders.decode(parts(png((1, 2, 3), b"crash")), RULES))
        await asyncio.sleep(0)
        crash.cancel()
        with pytest.raises(asyncio.CancelledError):
            await crash
        assert len(await asyncio.gather(*slow)) == NUM_SLOTS
        assert num_failures(metrics) == 0

    run(test, processes=1)


def test_signals_to_the_whole_group_leave_the_decoders_to_the_drain() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        await decoders.decode(parts(*[png((1, 1, 1))] * NUM_SLOTS), RULES)
        for pid in pids(decoders):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        await decoders.decode(parts(*[png((1, 1, 1))] * NUM_SLOTS), RULES)
        assert num_failures(metrics) == 0

    run(test)


def test_closing_answers_who_waits_and_ends_the_processes() -> None:
    async def test(decoders: Decoders, _: Metrics) -> None:
        await decoders.decode(parts(png((1, 1, 1))), RULES)
        processes = [link._process for link in decoders._decoders]
        waiting = asyncio.ensure_future(decoders.decode(parts(*[png((1, 1, 1))] * 200), RULES))
        await asyncio.sleep(0)
        await decoders.close()
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError):
            await decoders.decode(parts(png((1, 1, 1))), RULES)
        assert all(process.poll() is not None for process in processes)

    run(test)


def test_decoders_need_no_torch_and_end_with_their_service(tmp_path: Path) -> None:
    """The processes stay small, and a service that was killed leaves none behind."""
    script = (
        "import asyncio, sys, time\n"
        "from service.photos.pool import Decoders\n"
        "from service.telemetry.metrics import Metrics\n"
        "async def main():\n"
        "    pool = Decoders(1, 30, Metrics()); await pool.start()\n"
        "    while not pool.is_ready: await asyncio.sleep(0.01)\n"
        "    print(pool._decoders[0].pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "_imaging" in libraries
        assert "libtorch" not in libraries
        parent.kill()
    limit_s = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1]:
        assert time.monotonic() < limit_s
        time.sleep(0.02)


def test_the_service_answers_while_its_decoders_are_killed(serve: Any, tokenizer: Any) -> None:
    file = png((120, 30, 60))
    with serve(create_app(Settings(), tokenizer)) as running:
        expected = running.client.post("/encode", content=file)
        assert expected.status_code == 200
        for _ in range(3):
            for pid in pids(running.app.state.parts.decoders):
                os.kill(pid, signal.SIGKILL)
            answer = running.client.post("/encode?format=raw", content=file)
            assert answer.status_code == 200
        assert "drorae_decoder_failures_total 0.0" not in running.client.get("/metrics").text


def test_small_files_that_take_long_do_not_spoil_the_estimate_for_large_ones() -> None:
    room = PixelRoom(PixelLimits(), 1, Metrics(), Tally())
    for _ in range(1000):
        room.record(64, 5.0)
        room.record(300_000, 1.5)
    with room.reserve(50_000_000, time.monotonic() + 30):
        pass
    for _ in range(100):
        room.record(1_000_000, 0.02)
    with room.reserve(50_000_000, time.monotonic() + 5):
        pass
