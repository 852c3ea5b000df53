"""A server that speaks the hub's protocol: listings, files, large files behind a redirect, refusals."""

import contextlib
import hashlib
import http.server
import json
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

TOKEN = "hf_" + "a" * 34
COMMIT = "1" * 40


class Request(NamedTuple):
    """One request as it arrived, and how many bytes of a file were sent for it."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    num_bytes: int


@dataclass
class Repository:
    """Files, how the hub keeps them, and who may read them."""

    files: dict[str, bytes]
    large: frozenset[str] = frozenset()
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    private: bool = False
    gated: bool = False


class Hub:
    """The state of the server, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = {}
        """Bytes after which the connection is closed, for each request of a file."""
        self.stall_at: dict[str, int] = {}
        """Bytes after which nothing more comes, until the client leaves."""
        self.stalled = threading.Event()
        self.status: int | None = None
        """Answered to everything."""
        self.page: bytes | None = None
        """Answered to everything, as a captive portal does."""
        self.knows_ranges = True
        self.corrupt: set[str] = set()
        self.url = ""
        self.storage_url = ""

    def sent(self, path: str) -> list[Request]:
        """Requests that a file's contents were sent for."""
        return [asked for asked in self.requests if asked.num_bytes and asked.path == path]

    def file_requests(self) -> Counter[str]:
        """How often contents of each file were sent."""
        return Counter(asked.path for asked in self.requests if asked.num_bytes)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does, and as the storage that large files are redirected to."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.path_asked = unquote(urlsplit(self.path).path)
        if self.hub.page is not None:
            return self.reply(HTTPStatus.OK, self.hub.page)
        if self.hub.status is not None:
            return self.reply(self.hub.status)
        if self.path_asked.startswith("/storage/"):
            _, _, owner, name, path = self.path_asked.split("/", 4)
            return self.send_file(self.hub.repositories[f"{owner}/{name}"].files[path], path)
        parts = self.path_asked.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(name)
        known = self.headers["authorization"] == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known):
            return self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        revision = rest[1] if rest else "main"
        if revision not in repository.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit = repository.commits[revision]
        if self.path_asked.startswith("/api/"):
            listing = self.tree(repository) if rest[:1] == ["tree"] else self.info(name, commit, repository)
            return self.reply(HTTPStatus.OK, json.dumps(listing).encode())
        if repository.gated and not known:
            return self.refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
        path = "/".join(rest[2:])
        if path not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.resolve(name, repository, commit, path)

    def info(self, name: str, commit: str, repository: Repository) -> dict[str, object]:
        return {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in repository.files]}

    def tree(self, repository: Repository) -> list[dict[str, object]]:
        folders = {path.rpartition("/")[0] for path in repository.files} - {""}
        listing: list[dict[str, object]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders
        ]
        for path, data in repository.files.items():
            entry: dict[str, object] = {"type": "file", "oid": git_oid(data), "size": len(data), "path": path}
            if path in repository.large:
                entry["oid"] = git_oid(b"pointer to " + data[:10])
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            listing.append(entry)
        return listing

    def resolve(self, name: str, repository: Repository, commit: str, path: str) -> None:
        data = repository.files[path]
        if path not in repository.large:
            return self.send_file(data, path, {"X-Repo-Commit": commit, "ETag": f'"{git_oid(data)}"'})
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-ETag": f'"{sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage_url}/storage/{name}/{path}",
        }
        return self.reply(HTTPStatus.FOUND, b"", headers)

    def send_file(self, data: bytes, path: str, headers: dict[str, str] | None = None) -> None:
        if path in self.hub.corrupt:
            data = bytes(byte ^ 255 for byte in data)
        asked = self.headers["range"] if self.hub.knows_ranges else None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        cuts = self.hub.cuts.get(path) if self.command == "GET" else None
        limit = self.hub.stall_at.get(path) or (cuts.pop(0) if cuts else len(data))
        body = data[start : start + limit] if self.command == "GET" else b""
        self.record(len(body))
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        for key, value in {**(headers or {}), "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):  # a client on a full disk leaves early
            self.wfile.write(body)
            self.wfile.flush()
        if path in self.hub.stall_at:
            self.hub.stalled.set()
            with contextlib.suppress(ConnectionError):
                self.rfile.read(1)  # until the client leaves
        self.close_connection = len(body) < len(data) - start

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.record(0)  # before the answer, so that a test which has it finds the request
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def record(self, num_bytes: int) -> None:
        path = self.path_asked
        for prefix in ("/storage/", "/"):  # a file by its path in the repository, wherever it was sent from
            name = next((n for n in self.hub.repositories if path.startswith(f"{prefix}{n}/")), None)
            if name and self.command == "GET" and (prefix == "/storage/" or num_bytes):
                path = path.removeprefix(f"{prefix}{name}/").removeprefix(f"resolve/{COMMIT}/")
                break
        asked = self.headers["range"], self.headers["authorization"]
        self.hub.requests.append(Request(self.command, path, *asked, num_bytes))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on two ports of this machine: its pages, and the storage of large files."""
    state = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": state})
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    state.url, state.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for thread in threads:
        thread.start()
    yield state
    close_session()  # the client keeps connections, and the server waits for them
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def home(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library as if its variables named the local hub and an empty home: it reads them at import."""
    folder = tmp_path / "home"
    use_endpoint(monkeypatch, hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hurried = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", hurried)
    return folder


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


WEIGHTS = bytes(range(256)) * 4096 * 3  # 3 MiB
ENCODER = "facebook/dinov2-with-registers-small"


@pytest.fixture
def encoder(hub: Hub) -> Repository:
    """A transformers repository, with everything that such repositories have besides."""
    files = {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# DINOv2",
        "config.json": b'{"model_type": "dinov2_with_registers"}',
        "preprocessor_config.json": b'{"image_mean": [0.485, 0.456, 0.406]}',
        "model.safetensors": WEIGHTS,
        "model.fp16.safetensors": b"half " * 100,
        "pytorch_model.bin": b"pickle" * 100,
        "onnx/model.onnx": b"onnx",
    }
    large = frozenset({"model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "onnx/model.onnx"})
    hub.repositories[ENCODER] = Repository(files, large)
    return hub.repositories[ENCODER]
