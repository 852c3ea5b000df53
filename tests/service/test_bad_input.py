"""Bad input: its documented status, one sentence, and the next request works."""

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from model.tokenizer import Tokenizer
from service.app import create_app
from service.settings import Settings

Check = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _the_next_request_works(client: httpx.Client, png: bytes) -> Iterator[None]:
    yield
    assert client.post("/encode", content=png).status_code == 200


def huge_png() -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def safetensors_of(tensor: Tensor, name: str = "latents", **metadata: str) -> bytes:
    return safetensors.torch.save({name: tensor}, metadata)


def npy_of(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("route", ["/encode", "/decode", "/reconstruct"])
def test_empty_body(client: httpx.Client, check_problem: Check, route: str) -> None:
    check_problem(client.post(route), 400, "malformed", "body is empty")


@pytest.mark.parametrize("route", ["/encode", "/reconstruct"])
class TestImages:
    """Through every route that takes images."""

    def test_text_declared_as_an_image(self, client: httpx.Client, check_problem: Check, route: str) -> None:
        response = client.post(route, content=b"hello", headers={"Content-Type": "image/jpeg"})
        check_problem(response, 400, "malformed", "not an image", "JPEG, PNG, WebP, GIF, BMP, TIFF")

    @pytest.mark.parametrize("content_type", ["text/plain", "image/heic", "application/x-npy", "a;b=c"])
    def test_media_types_that_are_not_read(
        self, client: httpx.Client, check_problem: Check, route: str, content_type: str
    ) -> None:
        response = client.post(route, content=b"hello", headers={"Content-Type": content_type})
        check_problem(response, 415, "unsupported-media-type", content_type.split(";")[0], "image/png")

    def test_text_of_no_declared_type(self, client: httpx.Client, check_problem: Check, route: str) -> None:
        check_problem(client.post(route, content=b"hello"), 415, "unsupported-media-type", "no Content-Type")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_truncated(
        self,
        client: httpx.Client,
        check_problem: Check,
        route: str,
        photo: Image.Image,
        to_file: Callable[..., bytes],
        kind: str,
    ) -> None:
        data = to_file(photo, kind)
        for kept in (len(data) // 2, len(data) - 20, 30):
            response = client.post(route, content=data[:kept])
            check_problem(response, 400, "malformed", f"damaged or truncated {kind} file")

    def test_one_pixel_is_an_image(
        self, client: httpx.Client, check_problem: Check, route: str, to_file: Callable[..., bytes]
    ) -> None:
        response = client.post(route, content=to_file(Image.new("RGB", (1, 1), "red"), "PNG"))
        assert response.status_code == 200

    @pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
    def test_a_thread_of_pixels(
        self,
        client: httpx.Client,
        check_problem: Check,
        route: str,
        to_file: Callable[..., bytes],
        size: tuple[int, int],
    ) -> None:
        response = client.post(route, content=to_file(Image.new("RGB", size), "PNG"))
        check_problem(response, 422, "invalid-image", "ratio of 5000", "at most 20")

    def test_30000x30000_in_the_header(self, client: httpx.Client, check_problem: Check, route: str) -> None:
        started_s = time.monotonic()
        response = client.post(route, content=huge_png())
        check_problem(response, 413, "too-large", "30000x30000", "50000000")
        assert time.monotonic() - started_s < 2

    def test_the_bad_image_is_named(
        self, client: httpx.Client, check_problem: Check, route: str, png: bytes
    ) -> None:
        files = [("images", png), ("images", png[:200]), ("images", b"text")]
        check_problem(client.post(route, files=files), 400, "malformed", "Image 1 is a damaged")
        encoded = [base64.b64encode(file).decode() for file in (png, b"text")]
        check_problem(
            client.post(route, json={"images": encoded}), 400, "malformed", "Image 1 is not an image"
        )

    def test_too_many_images(
        self, client: httpx.Client, check_problem: Check, route: str, png: bytes
    ) -> None:
        check_problem(client.post(route, files=[("images", png)] * 9), 413, "too-large", "more than 8 items")
        encoded = [base64.b64encode(png).decode()] * 9
        check_problem(client.post(route, json={"images": encoded}), 413, "too-large", "9 items; at most 8")
        response = client.post(
            route, content=bytes(9 * 3 * 4), params={"shape": [9, 3, 2, 2], "dtype": "uint8"}
        )
        check_problem(response, 413, "too-large", "9 items")

    @pytest.mark.parametrize(
        ("body", "status", "slug", "words"),
        [
            (b'{"images": [', 400, "malformed", "not valid JSON"),
            (b"[1, 2]", 422, "invalid-option", "object"),
            (b"{}", 422, "invalid-option", "'images' is missing"),
            (b'{"images": []}', 422, "invalid-option", "images"),
            (b'{"images": [1]}', 422, "invalid-option", "images.0"),
            (b'{"images": ["AAAA"], "extra": 1}', 422, "invalid-option", "Unknown field 'extra'"),
            (b'{"images": ["not base64!"]}', 400, "malformed", "Image 0 is not standard base64"),
            (b'{"images": ["AAA"]}', 400, "malformed", "Image 0 is not standard base64"),
            (b'{"images": ["\xc3\xa9"]}', 400, "malformed", "Image 0 is not standard base64"),
            (b'{"images": [""]}', 400, "malformed", "image is empty"),
            (b"[" * 100_000, 400, "malformed", "not valid JSON"),
            (b'{"images": [' + b"0," * 100_000 + b"0]}", 422, "invalid-option", "images.0"),
            (b'{"images": ["AAAA"], "x": [' + b"[]," * 10_000 + b"0]}", 413, "too-large", "beside"),
            (b'{"images": ["AAAA"], "images": ["AAAA"]}', 400, "malformed", "one name"),
            ('{"images": ["AAAA"]}'.encode("utf-16"), 400, "malformed", "UTF-8"),
            (b'{"images": ["\\ud800"]}', 400, "malformed", "Image 0 is not standard base64"),
            (b'{"images": ["AAAA"], "\\ud800": 1}', 400, "malformed", "not valid JSON"),
            (b'{"images": ["AAAA"], "\xff": 1}', 400, "malformed", "not valid JSON"),
        ],
    )
    def test_json(
        self,
        client: httpx.Client,
        check_problem: Check,
        route: str,
        body: bytes,
        status: int,
        slug: str,
        words: str,
    ) -> None:
        response = client.post(route, content=body, headers={"Content-Type": "application/json"})
        check_problem(response, status, slug, words)

    @pytest.mark.parametrize(
        ("boundary", "body", "status", "slug", "words"),
        [
            ("", b"--x\r\n", 400, "malformed", "no boundary"),
            ("; boundary=x", b"hello", 400, "malformed", "multipart"),
            ("; boundary=x", b"--x--\r\n", 400, "malformed", "no part"),
            (
                "; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\nabc',
                400,
                "malformed",
                "truncated",
            ),
            (
                "; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--x--\r\n',
                422,
                "invalid-option",
                "Unknown multipart field 'file'",
            ),
            ("; boundary=x", b"--x\r\nA: b\r\n\r\nabc\r\n--x--\r\n", 400, "malformed", "no name"),
        ],
    )
    def test_multipart(
        self,
        client: httpx.Client,
        check_problem: Check,
        route: str,
        boundary: str,
        body: bytes,
        status: int,
        slug: str,
        words: str,
    ) -> None:
        headers = {"Content-Type": f"multipart/form-data{boundary}"}
        check_problem(client.post(route, content=body, headers=headers), status, slug, words)

    @pytest.mark.parametrize(
        ("shape", "dtype", "num_bytes", "status", "slug", "words"),
        [
            ([1, 3, 4, 4], None, 48, 422, "invalid-option", "'dtype'"),
            (None, "float16", 48, 415, "unsupported-media-type", "no Content-Type"),
            ([1, 3, 4, 4], "uint8", 47, 422, "unprocessable", "48 bytes"),
            ([1, 4, 4, 3], "uint8", 48, 422, "invalid-image", "[N, 3, H, W]"),
            ([48], "uint8", 48, 422, "invalid-image", "[N, 3, H, W]"),
            ([1, 3, 4, 0], "uint8", 0, 422, "invalid-option", "shape"),
            ([1, 3, 4, 4], "int64", 384, 422, "invalid-option", "dtype"),
            ([1, 3, 1, 500], "uint8", 1500, 422, "invalid-image", "ratio"),
        ],
    )
    def test_raw_tensors(
        self,
        client: httpx.Client,
        check_problem: Check,
        route: str,
        shape: list[int] | None,
        dtype: str | None,
        num_bytes: int,
        status: int,
        slug: str,
        words: str,
    ) -> None:
        params = {key: value for key, value in (("shape", shape), ("dtype", dtype)) if value is not None}
        check_problem(client.post(route, content=bytes(num_bytes), params=params), status, slug, words)

    @pytest.mark.parametrize(
        ("value", "words"),
        [("nan", "Image 1 holds a NaN"), ("inf", "Image 1 holds"), ("255", "0 to 255 are sent as uint8")],
    )
    def test_raw_tensor_values(
        self, client: httpx.Client, check_problem: Check, route: str, value: str, words: str
    ) -> None:
        images = np.zeros((2, 3, 4, 4), dtype=np.float32)
        images[1, 0, 0, 0] = float(value)
        response = client.post(
            route, content=images.tobytes(), params={"shape": [2, 3, 4, 4], "dtype": "float32"}
        )
        check_problem(response, 422, "invalid-image", words)

    def test_shape_beside_an_image_file(
        self, client: httpx.Client, check_problem: Check, route: str, png: bytes
    ) -> None:
        response = client.post(
            route, content=png, params={"shape": [1]}, headers={"Content-Type": "image/png"}
        )
        check_problem(response, 422, "invalid-option", "'shape'")


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


class TestLatents:
    """Through /decode."""

    @pytest.mark.parametrize(
        "shape", [(1, 4, 8, 8), (1, 32, 8, 9), (32, 64), (1, 1, 32, 8, 8), (0, 32, 8, 8)]
    )
    def test_shape(self, client: httpx.Client, check_problem: Check, shape: tuple[int, ...]) -> None:
        zeros = shaped(*shape)
        words = (f"shape {list(shape)}", "[N, 32, 8, 8]")
        bodies = [safetensors_of(zeros), npy_of(zeros.numpy())]
        for body in bodies:
            check_problem(client.post("/decode", content=body), 422, "invalid-latents", *words)
        if 0 not in shape:
            response = client.post("/decode", json={"latents": zeros.tolist()})
            check_problem(response, 422, "invalid-latents", *words)
            response = client.post(
                "/decode", content=bytes(4 * zeros.numel()), params={"shape": list(shape), "dtype": "float32"}
            )
            check_problem(response, 422, "invalid-latents", *words)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8, torch.bool])
    def test_dtype(self, client: httpx.Client, check_problem: Check, dtype: torch.dtype) -> None:
        zeros = shaped(1, 32, 8, 8, dtype=dtype)
        for body in (safetensors_of(zeros), npy_of(zeros.numpy())):
            check_problem(client.post("/decode", content=body), 422, "invalid-latents", "float16")

    def test_raw_dtype(self, client: httpx.Client, check_problem: Check) -> None:
        params = {"shape": [1, 32, 8, 8], "dtype": "uint8"}
        response = client.post("/decode", content=bytes(2048), params=params)
        check_problem(response, 422, "invalid-latents", "floating-point")
        response = client.post("/decode", content=bytes(2048 * 8), params={**params, "dtype": "int64"})
        check_problem(response, 422, "invalid-option", "'dtype'", "float16")

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
    def test_values(self, client: httpx.Client, check_problem: Check, latents: Tensor, value: str) -> None:
        bad = latents.clone()
        bad[1, 3, 2, 1] = float(value)
        bodies = (safetensors_of(bad), npy_of(bad.numpy()), json.dumps({"latents": bad.tolist()}))
        for body in bodies:
            check_problem(client.post("/decode", content=body), 422, "invalid-latents", "Latent 1 holds")
        response = client.post(
            "/decode", content=bad.numpy().tobytes(), params={"shape": [3, 32, 8, 8], "dtype": "float32"}
        )
        check_problem(response, 422, "invalid-latents", "Latent 1 holds")

    def test_values_that_overflow_the_model(
        self, client: httpx.Client, check_problem: Check, latents: Tensor
    ) -> None:
        huge = latents.clone()
        huge[2] = 3e38
        response = client.post("/decode", content=safetensors_of(huge))
        check_problem(response, 422, "invalid-latents", "Item 2", "overflow")

    def test_foreign_checkpoint(
        self, client: httpx.Client, check_problem: Check, tokenizer: Tokenizer, latents: Tensor
    ) -> None:
        foreign = "0" * 64
        body = safetensors_of(latents[:1], checkpoint_sha256=foreign)
        check_problem(client.post("/decode", content=body), 422, "foreign-checkpoint", foreign)
        response = client.post(
            "/decode", json={"latents": latents[:1].tolist(), "checkpoint_sha256": foreign}
        )
        check_problem(response, 422, "foreign-checkpoint", foreign)
        assert tokenizer.checkpoint is not None
        own = safetensors_of(latents[:1], checkpoint_sha256=tokenizer.checkpoint.sha256)
        assert client.post("/decode", content=own).status_code == 200

    def test_metadata(self, client: httpx.Client, check_problem: Check, latents: Tensor) -> None:
        body = safetensors_of(latents[:1], normalized="perhaps")
        check_problem(client.post("/decode", content=body), 422, "invalid-latents", "perhaps")

    def test_tensor_names(self, client: httpx.Client, check_problem: Check, latents: Tensor) -> None:
        body = safetensors_of(latents, name="z")
        check_problem(client.post("/decode", content=body), 422, "invalid-latents", "['z']", "'latents'")
        body = safetensors.torch.save({"latents": latents, "more": latents.clone()})
        check_problem(client.post("/decode", content=body), 422, "invalid-latents", "just one")

    def test_too_many(self, client: httpx.Client, check_problem: Check) -> None:
        body = safetensors_of(shaped(9, 32, 8, 8))
        check_problem(client.post("/decode", content=body), 413, "too-large", "9 items; at most 8")

    @pytest.mark.parametrize("cut", [10, 60, 200])
    def test_truncated(self, client: httpx.Client, check_problem: Check, latents: Tensor, cut: int) -> None:
        for media_type, body in (
            ("application/x-safetensors", safetensors_of(latents)),
            ("application/x-npy", npy_of(latents.numpy())),
        ):
            response = client.post("/decode", content=body[:cut], headers={"Content-Type": media_type})
            check_problem(response, 400, "malformed")
            response = client.post("/decode", content=body[:-cut], headers={"Content-Type": media_type})
            check_problem(response, 400, "malformed")

    @pytest.mark.parametrize("header", [b"(", b"{'descr': '<f4'", b"\0", b"'''", b"{'a': 1}", b"[" * 200])
    def test_npy_headers_that_are_no_literals(
        self, client: httpx.Client, check_problem: Check, header: bytes
    ) -> None:
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        check_problem(client.post("/decode", content=body), 400, "malformed", "header is damaged")

    def test_npy_headers_cost_nothing(self, client: httpx.Client, check_problem: Check) -> None:
        """A header may declare terabytes: they are neither allocated nor unpickled."""
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }\n"
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        check_problem(client.post("/decode", content=body), 400, "malformed", "truncated")
        body = npy_of(np.array([{"a": 1}], dtype=object))
        check_problem(client.post("/decode", content=body), 422, "invalid-latents", "object")

    def test_safetensors_headers_are_bounded(self, client: httpx.Client, check_problem: Check) -> None:
        headers = {"Content-Type": "application/x-safetensors"}
        for body in (
            struct.pack("<Q", 2**60) + b"{}",
            struct.pack("<Q", 200_000) + b"{" + b" " * 200_000,
            struct.pack("<Q", 4) + b"{,,}",
            struct.pack("<Q", 24) + b'{"__metadata__": [1, 2]}',
            struct.pack("<Q", 14) + b'{"latents": 1}',
        ):
            check_problem(client.post("/decode", content=body, headers=headers), 400, "malformed")

    @pytest.mark.parametrize(
        ("latents_json", "status", "slug", "words"),
        [
            ("[[1, 2], [3]]", 422, "invalid-latents", "differ in length"),
            ('[["a"]]', 422, "invalid-latents", "other than numbers"),
            ("[[null]]", 422, "invalid-latents", "other than numbers"),
            ("[[true]]", 422, "invalid-latents", "other than numbers"),
            ("3", 422, "invalid-option", "latents"),
            ("[]", 422, "invalid-option", "latents"),
            ("[" * 3000 + "]" * 3000, 400, "malformed", "not valid JSON"),
            ("[[" * 50 + "]]" * 50, 422, "invalid-latents", "."),
            ('["' + "x" * 100_000 + '"' + ', ""' * 8000 + "]", 422, "invalid-latents", "other than numbers"),
            ("[" + "[]," * 3000 + "1]", 422, "invalid-latents", "."),
            ("[" + "0," * 20_000 + "0]", 413, "too-large", "more numbers"),
            ("[" + "9" * 5000 + "]", 400, "malformed", "not valid JSON"),
            ("[" + "9" * 400 + "]", 422, "invalid-latents", "too large"),
            ("[[[1e999999]]]", 422, "invalid-latents", "shape [1, 1, 1]"),
            ('[1], "latents": [1]', 400, "malformed", "one name"),
            ('[1], "checkpoint_sha256": "\\ud800"', 400, "malformed", "not valid JSON"),
            ("[1]" + ', "x": 1' * 10_000, 413, "too-large", "beside"),
        ],
    )
    def test_json(
        self,
        client: httpx.Client,
        check_problem: Check,
        latents_json: str,
        status: int,
        slug: str,
        words: str,
    ) -> None:
        response = client.post("/decode", content=f'{{"latents": {latents_json}}}')
        check_problem(response, status, slug, words)

    def test_media_types(self, client: httpx.Client, check_problem: Check, png: bytes) -> None:
        response = client.post("/decode", content=png, headers={"Content-Type": "image/png"})
        check_problem(response, 415, "unsupported-media-type", "image/png", "application/x-safetensors")
        check_problem(client.post("/decode", content=png), 415, "unsupported-media-type", "shape and dtype")


class TestOptions:
    """Options, on the routes that have them."""

    @pytest.mark.parametrize("route", ["/encode", "/decode", "/reconstruct"])
    @pytest.mark.parametrize(
        ("query", "words"),
        [
            ("colour=red", "Unknown option 'colour'"),
            ("dtype=float64", "'dtype'"),
            ("format=tar", "'format'"),
            ("shape=a", "'shape.0'"),
            ("shape=-1", "'shape.0'"),
            ("do_scaling=true", "do_scaling=False"),
            ("scaling_factor=0.5", "scaling_factor=0.5 is impossible"),
            ("scaling_factor=nan", "scaling_factor=nan is impossible"),
            ("shift_factor=1", "shift_factor=1 is impossible"),
            ("range=unit&range=signed", "'range' is given 2 times"),
        ],
    )
    def test_any_route(
        self, client: httpx.Client, check_problem: Check, png: bytes, route: str, query: str, words: str
    ) -> None:
        check_problem(client.post(f"{route}?{query}", content=png), 422, "invalid-option", words)

    @pytest.mark.parametrize(
        ("query", "words"),
        [
            ("/encode?latent=middle", "'latent'"),
            ("/encode?fit=cover", "'fit'"),
            ("/encode?format=png", "'format'"),
            ("/encode?dtype=uint8", "dtype=uint8"),
            ("/encode?latent=base&normalize=true", "latent=enriched"),
            ("/encode?partial_postprocess=true", "Unknown option 'partial_postprocess'"),
            ("/decode?latent=base", "Unknown option 'latent'"),
            ("/decode?output_type=mp4", "'output_type'"),
            ("/reconstruct?normalize=true", "Unknown option 'normalize'"),
            ("/reconstruct?height=63", "height=63 is impossible"),
        ],
    )
    def test_one_route(
        self, client: httpx.Client, check_problem: Check, png: bytes, query: str, words: str
    ) -> None:
        check_problem(client.post(query, content=png), 422, "invalid-option", words)

    def test_not_acceptable(self, client: httpx.Client, check_problem: Check, png: bytes) -> None:
        for route, accept in (
            ("/encode", "image/png"),
            ("/decode", "text/html"),
            ("/reconstruct", "text/plain"),
        ):
            response = client.post(route, content=png, headers={"Accept": accept})
            check_problem(response, 406, "not-acceptable", accept)

    def test_normalize_needs_statistics(
        self, serve: Any, tokenizer: Tokenizer, png: bytes, latents: Tensor, check_problem: Check
    ) -> None:
        plain = Tokenizer(tokenizer.config).eval()
        with serve(create_app(Settings(), plain)) as running:
            assert running.client.get("/info").json()["checkpoint_sha256"] is None
            assert running.client.post("/encode", content=png).status_code == 200
            response = running.client.post("/encode", content=png, params={"normalize": "true"})
            check_problem(response, 422, "invalid-option", "no latent statistics")
            body = safetensors_of(latents, normalized="true")
            response = running.client.post("/decode", content=body)
            check_problem(response, 422, "invalid-option", "no latent statistics")


class TestTransport:
    """Sizes, encodings, paths and methods."""

    def test_body_limit(self, serve: Any, tokenizer: Tokenizer, png: bytes, check_problem: Check) -> None:
        settings = Settings(max_body_bytes=100_000)
        with serve(create_app(settings, tokenizer)) as running:
            large = bytes(200_000)
            check_problem(running.client.post("/encode", content=large), 413, "too-large", "100000 bytes")
            chunks = iter([large[:60_000]] * 3)
            check_problem(running.client.post("/encode", content=chunks), 413, "too-large", "100000 bytes")
            assert running.client.post("/encode", content=png).status_code == 200
            assert running.client.post("/encode", content=iter([png[:100], png[100:]])).status_code == 200

    def test_declared_length_is_refused_before_the_body_comes(self, server: Any) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    def test_a_client_that_goes_away_harms_nobody(self, server: Any) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")

    def test_compressed_bodies(self, client: httpx.Client, check_problem: Check, png: bytes) -> None:
        response = client.post("/encode", content=png, headers={"Content-Encoding": "gzip"})
        check_problem(response, 415, "unsupported-media-type", "gzip")

    def test_unknown_paths_and_methods(self, client: httpx.Client, check_problem: Check) -> None:
        check_problem(client.get("/nothing"), 404, "not-found")
        check_problem(client.post("/encode/"), 404, "not-found")
        response = client.get("/encode")
        check_problem(response, 405, "method-not-allowed")
        assert response.headers["allow"] == "POST"


def test_float16_overflow_is_said(tokenizer: Tokenizer, serve: Any, png: bytes, check_problem: Check) -> None:
    """Statistics of a tiny variance make normalised latents too large for float16."""
    loud = Tokenizer(tokenizer.config).eval()
    loud.set_statistics(torch.full((32, 8, 8), 1e5), torch.full((32, 8, 8), 1.0))
    with serve(create_app(Settings(), loud)) as running:
        response = running.client.post("/encode", content=png, params={"normalize": "true"})
        check_problem(response, 422, "invalid-option", "too large for float16", "bfloat16 or float32")
        params = {"normalize": "true", "dtype": "bfloat16"}
        assert running.client.post("/encode", content=png, params=params).status_code == 200
