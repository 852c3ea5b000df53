"""Every route in every format and option, against the tokenizer itself."""

import base64
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from model.images.similarity import psnr, ssim
from model.images.tensors import to_bytes
from model.tokenizer import Tokenizer
from service.app import create_app
from service.codecs.images import read_image
from service.codecs.tensors import DTYPES, write_npy
from service.photos.decode import ImageRules
from service.settings import Settings

SIDE = 64
RULES = ImageRules(SIDE, 10**6, 20, exact=False)
LATENT_FORMATS = ("safetensors", "npy", "json", "raw")
MEDIA_TYPES = {
    "safetensors": "application/x-safetensors",
    "npy": "application/x-npy",
    "json": "application/json",
    "raw": "tensor/binary",
}


def tensor_of(response: httpx.Response, name: str) -> Tensor:
    """The tensor of an answer in any tensor format."""
    assert response.status_code == 200, response.text
    media_type = response.headers["content-type"]
    if media_type == MEDIA_TYPES["safetensors"]:
        tensors = safetensors.torch.load(response.content)
        assert list(tensors) == [name]
        return tensors[name]
    if media_type == MEDIA_TYPES["npy"]:
        return torch.from_numpy(np.load(io.BytesIO(response.content), allow_pickle=False))
    if media_type == MEDIA_TYPES["json"]:
        document = response.json()
        return torch.tensor(document[name]).to(DTYPES[document["dtype"]])
    assert media_type == MEDIA_TYPES["raw"]
    dtype, shape = DTYPES[response.headers["dtype"]], json.loads(response.headers["shape"])
    return torch.frombuffer(bytearray(response.content), dtype=dtype).reshape(shape)


def body_of(latents: Tensor, body_format: str, **metadata: str) -> dict[str, Any]:
    """httpx arguments that send latents in a format."""
    headers = {"Content-Type": MEDIA_TYPES[body_format]}
    if body_format == "safetensors":
        return {"content": safetensors.torch.save({"latents": latents}, metadata), "headers": headers}
    if body_format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, latents.numpy())
        return {"content": buffer.getvalue(), "headers": headers}
    if body_format == "json":
        return {"content": json.dumps({"latents": latents.tolist(), **metadata}), "headers": headers}
    raw = latents.contiguous().view(torch.uint8).numpy().tobytes()
    params = {"shape": list(latents.shape), "dtype": str(latents.dtype).removeprefix("torch.")}
    return {"content": raw, "headers": headers, "params": params}


def opened(content: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def original(png: bytes) -> Tensor:
    """The shared photo as the model sees it, [1, 3, S, S]."""
    return read_image(png, RULES)[None].float().contiguous() / 255


@pytest.mark.parametrize("answer_format", LATENT_FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_encode_formats_and_dtypes(
    client: httpx.Client,
    tokenizer: Tokenizer,
    png: bytes,
    original: Tensor,
    answer_format: str,
    dtype: str,
    check_problem: Callable[..., Any],
) -> None:
    response = client.post("/encode", content=png, params={"format": answer_format, "dtype": dtype})
    if (answer_format, dtype) == ("npy", "bfloat16"):
        check_problem(response, 422, "invalid-option", "bfloat16", "float32")
        return
    latents = tensor_of(response, "latents")
    assert latents.dtype == DTYPES[dtype]
    expected = tokenizer.encode(original).to(DTYPES[dtype])
    torch.testing.assert_close(latents, expected, rtol=1e-2 if dtype != "float32" else 1e-4, atol=1e-3)


@pytest.mark.parametrize("answer_format", LATENT_FORMATS)
def test_encode_by_accept(client: httpx.Client, png: bytes, answer_format: str) -> None:
    response = client.post("/encode", content=png, headers={"Accept": MEDIA_TYPES[answer_format]})
    assert response.headers["content-type"] == MEDIA_TYPES[answer_format]
    assert tensor_of(response, "latents").shape == (1, 32, 8, 8)


def test_encode_defaults_and_metadata(client: httpx.Client, tokenizer: Tokenizer, png: bytes) -> None:
    response = client.post("/encode", content=png)
    assert tensor_of(response, "latents").dtype == torch.float16
    header = json.loads(response.content[8 : 8 + int.from_bytes(response.content[:8], "little")])
    assert tokenizer.checkpoint is not None
    assert header["__metadata__"] == {
        "model": "tiny",
        "checkpoint_sha256": tokenizer.checkpoint.sha256,
        "normalized": "false",
        "latent": "enriched",
    }


def test_encode_latent_kinds_and_normalization(
    client: httpx.Client, tokenizer: Tokenizer, png: bytes, original: Tensor
) -> None:
    for params in ({"latent": "base"}, {"normalize": "true"}, {"latent": "enriched", "normalize": "false"}):
        response = client.post("/encode", content=png, params={**params, "dtype": "float32"})
        expected = tokenizer.encode(
            original,
            latent=params.get("latent", "enriched"),  # type: ignore[arg-type]
            normalize=params.get("normalize") == "true",
        )
        torch.testing.assert_close(tensor_of(response, "latents"), expected, rtol=1e-4, atol=1e-4)


def test_encode_several_images(
    client: httpx.Client, tokenizer: Tokenizer, png: bytes, photo: Image.Image, to_file: Callable[..., bytes]
) -> None:
    flipped = to_file(photo.transpose(Image.Transpose.ROTATE_180), "PNG")
    expected = tokenizer.encode(torch.stack([read_image(file, RULES) for file in (png, flipped)]))
    multipart = client.post(
        "/encode",
        files=[("images", ("a.png", png)), ("images", ("b", flipped, "text/plain"))],
        params={"dtype": "float32"},
    )
    encoded = [base64.b64encode(file).decode() for file in (png, flipped)]
    as_json = client.post("/encode", json={"images": encoded}, params={"dtype": "float32"})
    for response in (multipart, as_json):
        torch.testing.assert_close(tensor_of(response, "latents"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "content_type",
    [
        *(
            None,
            "image/png",
            "image/jpeg",
            "image/*",
            "image/pjpeg",
            "image/x-png",
            "image/jpg",
            "Image/PNG; a=b",
        ),
        *(
            "Image/PNG; a=b",
            "application/octet-stream",
            "binary/octet-stream",
            "application/x-www-form-urlencoded",
        ),
    ],
)
def test_image_bodies_are_sniffed(client: httpx.Client, png: bytes, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/encode", content=png, headers=headers).status_code == 200


def test_the_types_of_multipart_parts_are_not_asked(client: httpx.Client, png: bytes) -> None:
    for part_type in ("image/*", "image/pjpeg", "binary/octet-stream", "application/octet-stream", "", "x"):
        response = client.post("/encode", files=[("images", ("a", png, part_type))])
        assert response.status_code == 200


def test_bodies_with_a_byte_order_mark_or_a_preamble(
    client: httpx.Client, png: bytes, latents: Tensor
) -> None:
    images = json.dumps({"images": [base64.b64encode(png).decode()]})
    numbers = json.dumps({"latents": latents.tolist()})
    for headers in ({}, {"Content-Type": "application/json"}):
        for route, text in (("/encode", images), ("/reconstruct", images), ("/decode", numbers)):
            body = text.encode("utf-8-sig")
            assert client.post(route, content=body, headers=headers).status_code == 200
    part = b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n' + png
    response = client.post(
        "/encode",
        content=b"Made by a mail program.\r\n" + part + b"\r\n--x--\r\nThe end.",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert response.status_code == 200


@pytest.mark.parametrize("content_type", ["application/octet-stream", "binary/octet-stream"])
def test_latent_bodies_are_sniffed(client: httpx.Client, latents: Tensor, content_type: str) -> None:
    for body in (
        safetensors.torch.save({"latents": latents}),
        write_npy(latents),
        json.dumps({"latents": latents.tolist()}).encode(),
    ):
        response = client.post("/decode", content=body, headers={"Content-Type": content_type})
        assert response.status_code == 200


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fit(client: httpx.Client, tokenizer: Tokenizer, png: bytes, fit: str) -> None:
    response = client.post("/encode", content=png, params={"fit": fit, "dtype": "float32"})
    image = read_image(png, ImageRules(SIDE, 10**6, 20, fit, exact=False))[None]  # type: ignore[arg-type]
    torch.testing.assert_close(tensor_of(response, "latents"), tokenizer.encode(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "value_range"),
    [("uint8", None), ("float32", None), ("float32", "unit"), ("float16", "signed"), ("bfloat16", "unit")],
)
def test_raw_image_tensors(
    client: httpx.Client, tokenizer: Tokenizer, original: Tensor, dtype: str, value_range: str | None
) -> None:
    exact = to_bytes(original).float() / 255
    if dtype == "uint8":
        sent = to_bytes(original)
    else:
        sent = (exact if value_range == "unit" else exact * 2 - 1).to(DTYPES[dtype])
    params = {"shape": list(sent.shape), "dtype": dtype, "output_dtype": "float32"}
    if value_range:
        params["range"] = value_range
    response = client.post(
        "/encode",
        content=sent.view(torch.uint8).numpy().tobytes(),
        params=params,
        headers={"Content-Type": "tensor/binary"},
    )
    tolerance = {"bfloat16": 0.3, "float16": 0.03}.get(dtype, 1e-3)
    torch.testing.assert_close(
        tensor_of(response, "latents"), tokenizer.encode(exact), rtol=tolerance, atol=tolerance
    )


def test_raw_image_answers_follow_a_floating_point_body(client: httpx.Client) -> None:
    image = torch.zeros(3, 10, 20)
    for dtype, answered in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("uint8", torch.float16),
    ):
        content = image.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
        response = client.post("/encode", content=content, params={"shape": [3, 10, 20], "dtype": dtype})
        assert tensor_of(response, "latents").dtype == answered


@pytest.mark.parametrize("body_format", LATENT_FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_decode_reads_every_format(
    client: httpx.Client, tokenizer: Tokenizer, latents: Tensor, body_format: str, dtype: str
) -> None:
    if (body_format, dtype) == ("npy", "bfloat16"):
        pytest.skip(".npy has no bfloat16")
    sent = latents[:1].to(DTYPES[dtype])
    response = client.post("/decode", **body_of(sent, body_format))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    expected = to_bytes(tokenizer.decode(sent.float()))[0]
    assert (opened(response.content).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("body_format", LATENT_FORMATS)
def test_decode_sniffs_untyped_bodies(client: httpx.Client, latents: Tensor, body_format: str) -> None:
    request = body_of(latents[:1], body_format)
    request["headers"] = {}
    assert client.post("/decode", **request).status_code == 200


@pytest.mark.parametrize(
    ("accept", "kind"),
    [("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP"), ("image/*", "PNG")],
)
def test_decode_image_formats(client: httpx.Client, latents: Tensor, accept: str, kind: str) -> None:
    request = body_of(latents[:1], "raw")
    request["headers"]["Accept"] = accept
    response = client.post("/decode", **request)
    assert Image.open(io.BytesIO(response.content)).format == kind
    assert response.headers["content-type"] == f"image/{kind.lower()}"


@pytest.mark.parametrize(
    ("name", "extension"), [("png", "png"), ("jpg", "jpg"), ("webp", "webp"), ("zip", "png")]
)
def test_several_pictures_come_as_a_zip(
    client: httpx.Client, tokenizer: Tokenizer, latents: Tensor, name: str, extension: str
) -> None:
    request = body_of(latents, "safetensors")
    response = client.post("/decode", **request, params={"format": name})
    assert response.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(response.content))
    assert archive.namelist() == [f"{index:04d}.{extension}" for index in range(3)]
    if extension == "png":
        expected = to_bytes(tokenizer.decode(latents))
        for index, entry in enumerate(archive.namelist()):
            assert (opened(archive.read(entry)).int() - expected[index].int()).abs().max() <= 1
    assert response.content == client.post("/decode", **request, params={"format": name}).content


@pytest.mark.parametrize("answer_format", ["safetensors", "npy", "raw"])
@pytest.mark.parametrize("num_items", [1, 3])
def test_decode_to_tensors(
    client: httpx.Client, tokenizer: Tokenizer, latents: Tensor, answer_format: str, num_items: int
) -> None:
    sent = latents[:num_items]
    request = body_of(sent, "npy")
    pictures = tensor_of(client.post("/decode", **request, params={"format": answer_format}), "images")
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (num_items, 3, SIDE, SIDE)
    expected = tokenizer.decode(sent)
    assert (pictures.int() - to_bytes(expected).int()).abs().max() <= 1
    for value_range, wanted in (("signed", expected * 2 - 1), ("unit", expected)):
        params = {"format": answer_format, "dtype": "float32", "range": value_range}
        pictures = tensor_of(client.post("/decode", **request, params=params), "images")
        torch.testing.assert_close(pictures, wanted, atol=1e-4, rtol=1e-4)


def test_decode_to_json(client: httpx.Client, latents: Tensor) -> None:
    document = client.post("/decode", **body_of(latents, "npy"), params={"format": "json"}).json()
    assert document["image_format"] == "png"
    assert len(document["images"]) == 3
    assert opened(base64.b64decode(document["images"][0])).shape == (3, SIDE, SIDE)
    assert "psnr" not in document


def test_a_single_latent_needs_no_batch_axis(client: httpx.Client, latents: Tensor) -> None:
    for body_format in LATENT_FORMATS:
        assert client.post("/decode", **body_of(latents[0], body_format)).status_code == 200


def test_fortran_order_and_big_endian_npy(
    client: httpx.Client, tokenizer: Tokenizer, latents: Tensor
) -> None:
    expected = to_bytes(tokenizer.decode(latents))
    for array in (np.asfortranarray(latents.numpy()), latents.numpy().astype(">f4")):
        buffer = io.BytesIO()
        np.save(buffer, array)
        response = client.post("/decode", content=buffer.getvalue(), params={"format": "npy"})
        assert (tensor_of(response, "images").int() - expected.int()).abs().max() <= 1


def test_normalized_latents_round_trip(client: httpx.Client, png: bytes) -> None:
    """What /encode normalised, /decode denormalises because the metadata says so."""
    plain = client.post("/decode", content=client.post("/encode", content=png).content)
    for answer_format in ("safetensors", "json"):
        encoded = client.post(
            "/encode", content=png, params={"normalize": "true", "dtype": "float32", "format": answer_format}
        )
        decoded = client.post("/decode", content=encoded.content)
        assert decoded.status_code == 200, decoded.text
        difference = (opened(decoded.content).int() - opened(plain.content).int()).abs().max()
        assert difference <= 2


def test_contradicting_normalization_is_refused(
    client: httpx.Client, png: bytes, latents: Tensor, check_problem: Callable[..., Any]
) -> None:
    encoded = client.post("/encode", content=png, params={"normalize": "true"})
    response = client.post("/decode", content=encoded.content, params={"normalize": "false"})
    check_problem(response, 422, "invalid-option", "contradicts")
    assert client.post("/decode", content=encoded.content, params={"normalize": "true"}).status_code == 200
    raw = body_of(latents, "raw")
    raw["params"]["normalize"] = "true"
    assert client.post("/decode", **raw).status_code == 200


@pytest.mark.parametrize(("accept", "kind"), [("*/*", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")])
def test_reconstruct_one_photo(
    client: httpx.Client, tokenizer: Tokenizer, png: bytes, original: Tensor, accept: str, kind: str
) -> None:
    response = client.post("/reconstruct", content=png, headers={"Accept": accept})
    assert response.status_code == 200, response.text
    picture = Image.open(io.BytesIO(response.content))
    assert picture.format == kind
    if kind == "PNG":
        expected = to_bytes(tokenizer.reconstruct(original))[0]
        assert (opened(response.content).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("answer_format", ["safetensors", "npy", "raw"])
@pytest.mark.parametrize("latent", ["enriched", "base"])
def test_reconstruct_to_tensors(
    client: httpx.Client, tokenizer: Tokenizer, png: bytes, original: Tensor, answer_format: str, latent: str
) -> None:
    response = client.post("/reconstruct", content=png, params={"format": answer_format, "latent": latent})
    expected = to_bytes(tokenizer.reconstruct(original, latent=latent))  # type: ignore[arg-type]
    assert (tensor_of(response, "images").int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("asked", ["query", "setting"])
def test_exact_pixels_are_those_of_training(
    serve: Any, client: httpx.Client, checkpoint: Path, tokenizer: Tokenizer, to_file: Any, asked: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    photo = to_file(Image.fromarray(noise), "JPEG")
    image = read_image(photo, ImageRules(SIDE, 10**6, 20, exact=True))
    expected = tokenizer.encode(image[None]).half().numpy()
    options = {"format": "npy"}
    quick = np.load(io.BytesIO(client.post("/encode", content=photo, params=options).content))
    assert not np.array_equal(quick, expected)
    if asked == "query":
        response = client.post("/encode", content=photo, params={**options, "exact": "true"})
    else:
        with serve(create_app(Settings(checkpoint=str(checkpoint), exact_images=True))) as running:
            response = running.client.post("/encode", content=photo, params=options)
    np.testing.assert_allclose(np.load(io.BytesIO(response.content)), expected, atol=1e-2)
    assert abs(quick.astype(float) - expected).max() > 1e-2


def test_png_answers_are_small_or_fast(
    serve: Any, checkpoint: Path, client: httpx.Client, png: bytes
) -> None:
    fast = client.post("/reconstruct", content=png).content
    with serve(create_app(Settings(checkpoint=str(checkpoint), png_compression="small"))) as running:
        small = running.client.post("/reconstruct", content=png).content
    assert small != fast
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(small))), np.asarray(Image.open(io.BytesIO(fast))))


def test_reconstruct_to_json_says_how_close(
    client: httpx.Client, tokenizer: Tokenizer, png: bytes, original: Tensor
) -> None:
    response = client.post(
        "/reconstruct", files=[("images", png)] * 2, headers={"Accept": "application/json"}
    )
    document = response.json()
    pictures = tokenizer.reconstruct(original)
    assert document["psnr"] == pytest.approx(psnr(pictures, original).tolist() * 2, abs=1e-2)
    assert document["ssim"] == pytest.approx(ssim(pictures, original).tolist() * 2, abs=1e-3)
    assert len(document["images"]) == 2


def test_reconstruct_several_photos(client: httpx.Client, png: bytes) -> None:
    response = client.post("/reconstruct", files=[("images", png)] * 3)
    assert zipfile.ZipFile(io.BytesIO(response.content)).namelist() == ["0000.png", "0001.png", "0002.png"]


def test_info(client: httpx.Client, tokenizer: Tokenizer) -> None:
    info = client.get("/info").json()
    assert tokenizer.checkpoint is not None
    assert info["model"] == "tiny"
    assert info["checkpoint_sha256"] == tokenizer.checkpoint.sha256
    assert info["latent"] == {"shape": [32, 8, 8], "normalization": True, "kinds": ["enriched", "base"]}
    assert info["layers"] == [2, 3, 4]
    assert info["beta"] == 0.2
    assert (info["device"], info["dtype"], info["kernel_path"]) == ("cpu", "float32", tokenizer.fusion_path)
    assert info["limits"]["max_items_per_request"] == 8
    assert info["limits"]["batch_size"] == 8
    assert info["reasons"].keys() == {"dtype", "batch_size"}


@pytest.mark.parametrize(
    ("fusion", "kernel_path"), [("auto", "folded"), ("folded", "folded"), ("reference", "reference")]
)
def test_info_and_metrics_name_the_fusions_path(
    serve: Any, checkpoint: Path, fusion: Any, kernel_path: str
) -> None:
    settings = Settings(checkpoint=str(checkpoint), device="cpu", fusion=fusion)
    with serve(create_app(settings)) as running:
        assert running.client.get("/info").json()["kernel_path"] == kernel_path
        series = running.client.get("/metrics").text.splitlines()
        (model_info,) = [line for line in series if line.startswith("drorae_model_info{")]
        assert f'kernel_path="{kernel_path}"' in model_info


@pytest.mark.parametrize("path", ["/info", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_plain_routes(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["x-request-id"]
    assert response.headers["server-timing"].startswith("total;dur=")


@pytest.mark.parametrize("path", ["/info", "/livez", "/readyz", "/metrics"])
def test_head(client: httpx.Client, path: str) -> None:
    response = client.head(path)
    assert response.status_code == 200
    assert response.content == b""


def test_metrics_count_requests_items_and_batches(client: httpx.Client, png: bytes) -> None:
    client.post("/encode", content=png)
    client.post("/encode", content=b"x", headers={"Content-Type": "image/png"})
    client.get("/somewhere/else")
    text = client.get("/metrics").text
    for line in (
        'drorae_requests_total{outcome="ok",route="/encode"}',
        'drorae_requests_total{outcome="malformed",route="/encode"}',
        'drorae_requests_total{outcome="not-found",route="other"}',
        'drorae_request_seconds_count{route="/encode"}',
        'drorae_items_total{operation="encode",outcome="ok"}',
        'drorae_batch_items_count{operation="encode"}',
        "drorae_queue_items 0.0",
        "drorae_ready 1.0",
        'model="tiny"',
    ):
        assert line in text


def test_request_ids(client: httpx.Client, png: bytes) -> None:
    mine = client.post("/encode", content=png, headers={"X-Request-ID": "trace-42.a"})
    assert mine.headers["x-request-id"] == "trace-42.a"
    for bad in ("has space", "x" * 129, "<script>"):
        fresh = client.get("/livez", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert len(fresh) == 32
        assert fresh != bad


def test_server_timing_names_the_stages(client: httpx.Client, png: bytes) -> None:
    timing = client.post("/encode", content=png).headers["server-timing"]
    assert [entry.split(";")[0] for entry in timing.split(", ")] == [
        "read",
        "decode",
        "queue",
        "batch",
        "device",
        "encode",
        "total",
    ]
