"""Many images against the real service: overload, a restart, killed connections, broken images, memory."""

import asyncio
import contextlib
import io
import signal
import socket
import threading
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness.service import launch
from drorae_client import AsyncClient, DeadlineError, InputError, UnreachableError
from drorae_client.errors import MalformedError, MediaTypeError, UnauthorizedError
from drorae_client.wire.tensors import write_safetensors
from model.tokenizer import Tokenizer
from service.app import create_app
from service.codecs.images import read_image
from service.photos.decode import ImageRules
from service.settings import Settings
from tests.client.conftest import Connect
from tests.client.test_attempts import StartStub, answer

SIDE = 64
KEY = "a key for the tests".replace(" ", "-")


def picture(number: int) -> bytes:
    """A PNG whose colours tell its number."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4], pixels[4:] = (number % 256, number // 256 * 50, 99), (255 - number % 256, 0, number % 7 * 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def check(results: list[Any], pictures: list[bytes], tokenizer: Tokenizer) -> None:
    """Every picture has its own latents, in order."""
    images = torch.stack([read_image(data, ImageRules(SIDE, 10**6, 20, exact=False)) for data in pictures])
    expected = tokenizer.encode(images).numpy()
    found = np.concatenate([result.array for result in results])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.02
    assert np.abs(expected[1:] - expected[:-1]).max(axis=(1, 2, 3)).min() > 0.05, "neighbours differ"


class Recorder:
    """An application that notes when a request of which id came, and how it was answered."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.state = app.state
        self.begun_s: defaultdict[str, list[float]] = defaultdict(list)
        self.answers: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name = dict(scope.get("headers", ())).get(b"x-request-id", b"").decode()
        if name:
            self.begun_s[name].append(time.monotonic())

        async def note(message: Any) -> None:
            if name and message["type"] == "http.response.start":
                again_s = float(dict(message["headers"]).get(b"retry-after", b"0"))
                self.answers[name].append((message["status"], time.monotonic() + again_s))
            await send(message)

        await self._app(scope, receive, note)


def test_ten_times_the_load(connect: Connect, serve: Any, tokenizer: Tokenizer) -> None:
    """40 requests at once where 4 have room: all 500 images arrive, once, in order, no earlier than told."""
    settings = Settings(
        queue_limit_items=4, max_items_per_request=4, cpu_workers=1, cpu_threads=1, batch_size=2
    )
    recorder = Recorder(create_app(settings, tokenizer))
    pictures = [picture(number) for number in range(500)]
    with serve(recorder) as running:
        client = connect(running.url, timeout=300)
        results = list(client.encode_many(pictures, batch=1, concurrency=40, dtype="float32"))
    check(results, pictures, tokenizer)
    statuses = Counter(status for answers in recorder.answers.values() for status, _ in answers)
    assert statuses[200] == 500
    assert statuses[429] > 20
    assert set(statuses) == {200, 429}
    for name, answers in recorder.answers.items():
        for (_, allowed_s), begun_s in zip(answers, recorder.begun_s[name][1:], strict=False):
            assert begun_s >= allowed_s
    assert {result.request_id for result in results} == set(recorder.answers)


def test_a_restart_in_the_middle(connect: Connect, checkpoint: Path, tokenizer: Tokenizer) -> None:
    """The service drains, ends with status 0, is away, and starts again: nothing is lost or doubled."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {"checkpoint": str(checkpoint), "port": str(port), "cpu_workers": "1", "cpu_threads": "1"}
    pictures = [picture(number) for number in range(200)]
    restart = threading.Event()
    results: list[Any] = []

    def feed() -> Iterator[bytes]:
        for number, data in enumerate(pictures):
            if number == 100:
                restart.set()
            yield data

    def use(url: str) -> None:
        client = connect(url, timeout=120)
        results.extend(client.encode_many(feed(), batch=2, concurrency=4, dtype="float32"))

    with launch(settings) as first:
        consumer = threading.Thread(target=use, args=(first.url,))
        consumer.start()
        assert restart.wait(60)
        assert first.stop(signal.SIGTERM) == 0
    with launch(settings, ready_path=None):
        consumer.join(120)
    assert not consumer.is_alive()
    check(results, pictures, tokenizer)


class KillingProxy:
    """Forwards to a service, and kills every third connection: before, within or after the request's body."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_killed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes up the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            number += 1
            limits = (10**9, 10**9)
            if number % 3 == 0:
                self.num_killed += 1
                limits = [(0, 0), (300, 10**9), (10**9, 500)][number // 3 % 3]
            threading.Thread(target=self._forward, args=(near, *limits), daemon=True).start()

    def _forward(self, near: socket.socket, most_up: int, most_down: int) -> None:
        with near, socket.create_connection(self._target) as far:
            down = threading.Thread(target=self._copy, args=(far, near, most_down))
            down.start()
            self._copy(near, far, most_up)
            down.join()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, most: int) -> None:
        """Copy so many bytes, then end both connections."""
        with contextlib.suppress(OSError):
            while most > 0 and (data := source.recv(min(most, 65536))):
                sink.sendall(data)
                most -= len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_killed_connections(connect: Connect, server: Any, tokenizer: Tokenizer) -> None:
    pictures = [picture(number) for number in range(60)]
    results = []
    proxy = KillingProxy(server.url)
    for number in range(0, 60, 6):  # a client of its own, and so a connection, every few
        client = connect(proxy.url, timeout=120)
        results += client.encode_many(pictures[number : number + 6], batch=1, concurrency=3, dtype="float32")
    proxy.close()
    assert proxy.num_killed >= 9
    check(results, pictures, tokenizer)


def test_keys(connect: Connect, serve: Any, tokenizer: Tokenizer) -> None:
    with serve(create_app(Settings(api_keys=KEY), tokenizer)) as running:
        results = connect(running.url, api_key=KEY).encode_many([picture(0)])
        assert len(list(results)) == 1
        for keys in ({}, {"api_key": KEY + "x"}):
            client = connect(running.url, **keys)
            with pytest.raises(UnauthorizedError):
                client.info()
            with pytest.raises(UnauthorizedError):
                list(client.encode_many([picture(0)] * 20, on_error="return"))


def test_a_deadline_ends_the_work_there_and_here(connect: Connect, serve: Any, gated: Any) -> None:
    """The service was told the deadline: it takes back what no device has begun."""
    with serve(create_app(Settings(cpu_workers=1), gated)) as running:
        client = connect(running.url)
        with pytest.raises(DeadlineError):
            client.encode(picture(0), timeout=0.5)
        assert gated.entered.acquire(timeout=30)
        found = list(client.encode_many([picture(1)] * 3, batch=3, timeout=0.5, on_error="return"))
        assert [type(error) for error in found] == [DeadlineError] * 3
        gated.gate.set()
        client.encode(picture(2))
        admission = running.app.state.parts.admission
        assert admission.num_requests == 0
    assert gated.batch_sizes == [1, 1], "what came too late was not computed"


@pytest.mark.parametrize("batch", [1, 4])
def test_a_broken_image_fails_alone(
    connect: Connect, server: Any, tokenizer: Tokenizer, tmp_path: Path, batch: int
) -> None:
    pictures: list[Any] = [picture(number) for number in range(12)]
    broken: dict[int, Any] = {2: b"no image", 7: tmp_path / "missing.png", 8: pictures[8][:40]}
    mixed = [broken.get(number, data) for number, data in enumerate(pictures)]
    client = connect(server.url)
    results = list(client.encode_many(iter(mixed), batch=batch, on_error="return", dtype="float32"))
    assert [number for number, result in enumerate(results) if isinstance(result, Exception)] == [2, 7, 8]
    assert isinstance(results[7], InputError)
    assert isinstance(results[8], MalformedError)
    good = [number for number in range(12) if number not in broken]
    check([results[number] for number in good], [pictures[number] for number in good], tokenizer)
    with pytest.raises(MediaTypeError) as caught:
        list(client.encode_many(mixed, batch=batch))
    assert any("image 2" in note for note in caught.value.__notes__)


def test_images_of_many_kinds(connect: Connect, server: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A batch is cut where files and arrays meet, and arrays of different shapes."""
    (tmp_path / "0.png").write_bytes(picture(0))
    arrays = [np.array(Image.open(io.BytesIO(picture(number)))) for number in range(4)]
    big = np.repeat(arrays[3], 2, axis=0)
    images = [tmp_path / "0.png", picture(0), arrays[1], arrays[2], big, Image.open(tmp_path / "0.png")]
    results = list(connect(server.url).encode_many(images, batch=4, dtype="float32"))
    assert len(results) == 6
    assert np.abs(results[0].array - results[5].array).max() < 1e-3
    assert results[2].request_id == results[3].request_id != results[4].request_id


def test_no_images(connect: Connect, server: Any) -> None:
    assert list(connect(server.url).encode_many([])) == []


def test_one_image_is_not_several(connect: Connect, server: Any) -> None:
    for one in ("photo.png", Path("photo.png"), picture(0)):
        with pytest.raises(InputError):
            list(connect(server.url).encode_many(one))


@pytest.mark.parametrize("options", [{"batch": 0}, {"concurrency": 0}, {"on_error": "skip"}])
def test_impossible_plans(connect: Connect, server: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        list(connect(server.url).encode_many([], **options))


def test_progress(connect: Connect, server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    list(connect(server.url).encode_many([picture(0)] * 3, progress=True))
    assert "3/3" in capsys.readouterr().err


def test_an_asynchronous_source_and_an_early_end(server: Any) -> None:
    async def source() -> Any:
        for number in range(10**6):
            yield picture(number % 500)

    async def run() -> int:
        async with AsyncClient(server.url) as client:
            count = 0
            async with aclosing(client.encode_many(source(), concurrency=2)) as results:
                async for _ in results:
                    count += 1
                    if count == 20:
                        break
            assert len(asyncio.all_tasks()) == 1, "nothing is left running"
            return count

    assert asyncio.run(run()) == 20


def test_an_early_end_leaves_no_thread(server: Any) -> None:
    from drorae_client import Client

    with Client(server.url) as client:
        for count, _ in enumerate(client.encode_many(picture(0) for _ in range(10**6))):
            if count == 20:
                break
        deadline_s = time.monotonic() + 60
        while any(thread.name == "drorae-client" for thread in threading.enumerate()):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_errors_of_the_callers_own_iterable(connect: Connect, server: Any) -> None:
    def failing() -> Iterator[bytes]:
        yield picture(0)
        raise KeyError("theirs")

    with pytest.raises(KeyError):
        list(connect(server.url).encode_many(failing()))


def test_a_service_that_is_not_there(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drorae_client.attempts.PATIENCE_S", 0.2)
    with pytest.raises(UnreachableError):
        list(connect("http://127.0.0.1:9").encode_many([picture(0)] * 50, on_error="return"))


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_images(stub: StartStub) -> None:
    """Of 10,000 images of 100 kB, whose latents take 160 MB, a few batches are held."""
    from drorae_client import Client

    batch, concurrency = 8, 4
    body = write_safetensors("latents", np.zeros((batch, 32, 16, 16), np.float16), "float16", {})
    server = stub(answer(body))
    with Client(server.url) as client:
        peaks = []
        tracemalloc.start()
        results = client.encode_many(
            (bytes(100_000) for _ in range(10_000)), batch=batch, concurrency=concurrency
        )
        for count, _ in enumerate(results, 1):
            if count % 1000 == 0:
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.reset_peak()
        tracemalloc.stop()
    assert len(peaks) == 10
    assert max(peaks[5:]) < 1.25 * max(peaks[:5])
    assert max(peaks) < 64 * 2**20, "what is held here and in the stub, of 1 GB"
