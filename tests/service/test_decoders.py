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

from service import decoders as module
from service.app import create_app
from service.decoder import NUM_SLOTS, SLOT_BYTES
from service.decoders import Decoders
from service.decoding import ImageRules
from service.errors import MalformedError, ServiceError, TooLargeError, UnavailableError
from service.images import read_image
from service.metrics import Metrics
from service.payloads import ImagePart
from service.settings import Settings

Test = Callable[[Decoders, Metrics], Awaitable[None]]

RULES = ImageRules(side=64, max_pixels=4_000_000, max_aspect_ratio=20)
FAULTY = """
import os, sys, time
from service import decoder
decode = decoder.decode_image
def faulty(data, rules, name):
    if b"crash" in data:
        os._exit(11)
    if b"hang" in data:
        time.sleep(60)
    if b"slow" in data:
        time.sleep(0.3)
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


def run(test: Test, processes: int = 2, timeout_s: float = 30) -> None:
    """Run a test with a pool, on the service's own kind of loop."""

    @asynccontextmanager
    async def pool(metrics: Metrics) -> AsyncIterator[Decoders]:
        decoders = Decoders(processes, timeout_s, metrics)
        await decoders.start()
        try:
            yield decoders
        finally:
            await decoders.close()

    async def main() -> None:
        metrics = Metrics()
        async with asyncio.timeout(60), pool(metrics) as decoders:
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
    return [decoder._process.pid for decoder in decoders._decoders]


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
        assert num_failures(metrics) == 3  # it was tried so often

    run(test, processes=1)


@pytest.mark.usefixtures("faulty")
def test_a_hang_is_ended() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        begun_s = time.monotonic()
        hanging = asyncio.ensure_future(decoders.decode(parts(png((1, 2, 3), b"hang")), RULES))
        waiting = asyncio.ensure_future(decoders.decode(parts(png((4, 5, 6))), RULES))
        with pytest.raises(MalformedError):
            await hanging
        assert time.monotonic() - begun_s < 10
        assert (await waiting)[0][:, 0, 0].tolist() == [4, 5, 6]
        assert num_failures(metrics) == 1

    run(test, processes=1, timeout_s=1.0)


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


@pytest.mark.usefixtures("faulty")
def test_what_nobody_waits_for_is_not_decoded() -> None:
    async def test(decoders: Decoders, metrics: Metrics) -> None:
        slow = asyncio.ensure_future(decoders.decode(parts(*[png((1, 2, 3), b"slow")] * NUM_SLOTS), RULES))
        crash = asyncio.ensure_future(decoders.decode(parts(png((1, 2, 3), b"crash")), RULES))
        await asyncio.sleep(0.1)
        crash.cancel()
        with pytest.raises(asyncio.CancelledError):
            await crash
        assert len(await slow) == NUM_SLOTS
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
        processes = [decoder._process for decoder in decoders._decoders]
        waiting = asyncio.ensure_future(decoders.decode(parts(*[png((1, 1, 1))] * 200), RULES))
        await asyncio.sleep(0)
        await decoders.close()
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError):
            await decoders.decode(parts(png((1, 1, 1))), RULES)
        assert [process.poll() for process in processes] == [0] * len(processes)

    run(test)


def test_decoders_need_no_torch_and_end_with_their_service(tmp_path: Path) -> None:
    """The processes stay small, and a service that was killed leaves none behind."""
    script = (
        "import asyncio, sys, time\n"
        "from service.decoders import Decoders\n"
        "from service.metrics import Metrics\n"
        "async def main():\n"
        "    pool = Decoders(1, 30, Metrics()); await pool.start()\n"
        "    print(pool._decoders[0]._process.pid, flush=True); await asyncio.sleep(60)\n"
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
            for pid in pids(running.app.state.pipeline.decoders):
                os.kill(pid, signal.SIGKILL)
            answer = running.client.post("/encode?format=raw", content=file)
            assert answer.status_code == 200
        assert "drorae_decoder_failures_total 0.0" not in running.client.get("/metrics").text
