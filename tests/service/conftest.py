"""A tiny tokenizer, and real servers on real sockets."""

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from model.config import DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig
from model.tokenizer import Tokenizer
from service.app import create_app
from service.server import listen, uvicorn_config
from service.settings import Settings

SIDE = 64
LATENT_SHAPE = (32, 8, 8)


def tiny_config(name: str = "tiny") -> TokenizerConfig:
    return TokenizerConfig(
        name=name,
        image_size=SIDE,
        encoder=EncoderConfig(
            width=32, depth=4, num_heads=2, mlp_ratio=2, patch_size=7, image_size=56, position_grid=8
        ),
        fusion=FusionConfig(num_layers=3, hidden_width=48, num_heads=2),
        decoder=DecoderConfig(width=32, depth=2, num_heads=2, mlp_width=64, patch_size=8),
    )


@pytest.fixture(scope="session", autouse=True)
def _one_decoder() -> Iterator[None]:
    """Of the many servers here, few decode more than an image at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRORAE_NUM_DECODERS", "1")
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny tokenizer with random weights and statistics."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(tiny_config())
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    tokenizer.set_statistics(torch.randn(LATENT_SHAPE) * 0.1, torch.rand(LATENT_SHAPE) + 0.5)
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="session")
def side() -> int:
    return SIDE


@dataclass(frozen=True)
class RunningServer:
    """A server in a thread, a client for it, and the application inside."""

    url: str
    client: httpx.Client
    app: Any

    @property
    def engine(self) -> Any:
        return self.app.state.parts.engine


Serve = Callable[..., Any]


@contextmanager
def _serve(app: Any, wait_ready: bool = True) -> Iterator[RunningServer]:
    listener = listen("127.0.0.1", 0)
    parts = app.state.parts
    config = uvicorn_config(app, parts.settings, parts.metrics)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            client.get("/livez")  # waits in the socket's backlog until the server accepts
            engine = app.state.parts.engine
            if wait_ready:
                assert engine.wait_until_settled(30)
                while engine.failure is None and client.get("/readyz").status_code != 200:
                    time.sleep(0.02)  # for the decoders
                assert client.get("/readyz").status_code == 200, engine.failure
                getattr(engine.tokenizer, "arm", lambda: None)()
            yield RunningServer(url, client, app)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """The server that most tests share."""
    with _serve(create_app(Settings(checkpoint=str(checkpoint), max_items_per_request=8))) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> httpx.Client:
    return server.client


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Start a server of one's own: ``with serve(create_app(...)) as running``."""
    return _serve


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A smooth RGB picture, 96x80, whose corners differ."""
    y, x = np.mgrid[0:80, 0:96].astype(np.float32)
    planes = [x / 95 * 255, y / 79 * 255, (np.sin(x / 9) * np.cos(y / 7) + 1) * 127]
    return Image.fromarray(np.stack(planes, axis=-1).round().astype(np.uint8))


@pytest.fixture(scope="session")
def png(photo: Image.Image) -> bytes:
    return encode_picture(photo, "PNG")


@pytest.fixture(scope="session")
def to_file() -> Callable[..., bytes]:
    """``to_file(picture, "JPEG", quality=90)``."""
    return encode_picture


def encode_picture(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def latents(tokenizer: Tokenizer) -> torch.Tensor:
    """Three latents [3, 32, 8, 8], as the tokenizer makes them."""
    generator = torch.Generator().manual_seed(1)
    return tokenizer.encode(torch.rand((3, 3, SIDE, SIDE), generator=generator))


class GatedTokenizer:
    """A tokenizer whose ``encode`` waits at a gate, once it is armed, so that tests decide when the model is
    busy. Serve it with ``cpu_workers=1``, where the order of batches matters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._armed = False
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batch_sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def arm(self) -> None:
        """From now on encodes wait, and are counted: the engine has warmed up."""
        self._armed = True

    def encode(self, images: torch.Tensor, **options: Any) -> torch.Tensor:
        if self._armed:
            self.batch_sizes.append(len(images))
            self.entered.release()
            assert self.gate.wait(30)
        return self._tokenizer.encode(images, **options)


@pytest.fixture
def gated(tokenizer: Tokenizer) -> Iterator[GatedTokenizer]:
    wrapped = GatedTokenizer(tokenizer)
    yield wrapped
    wrapped.gate.set()


@pytest.fixture(scope="session")
def check_problem() -> Callable[..., dict[str, Any]]:
    return assert_problem


def assert_problem(response: httpx.Response, status: int, slug: str, *words: str) -> dict[str, Any]:
    """The response is a problem document: one sentence that holds the words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["type"] == f"urn:drorae:problem:{slug}"
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    detail = problem["detail"]
    assert detail.endswith(".")
    assert "\n" not in detail
    for word in words:
        assert word in detail, detail
    return dict(problem)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received
