"""The OpenAPI document tells the truth."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.codecs import schemas

POSTS = {
    "/encode": schemas.EncodeOptions,
    "/decode": schemas.DecodeOptions,
    "/reconstruct": schemas.ReconstructOptions,
}
PROBLEM_STATUSES = {"400", "406", "408", "413", "415", "422", "429", "500", "503", "504"}


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def test_every_route_is_there(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {*POSTS, "/info", "/livez", "/readyz", "/metrics"}


def test_every_reference_resolves(document: dict[str, Any]) -> None:
    names = set(document["components"]["schemas"])
    assert set(re.findall(r"#/components/schemas/(\w+)", str(document))) <= names
    assert "HTTPValidationError" not in names


@pytest.mark.parametrize("path", POSTS)
def test_posts_document_options_bodies_and_answers(document: dict[str, Any], path: str) -> None:
    operation = document["paths"][path]["post"]
    parameters = {parameter["name"]: parameter for parameter in operation["parameters"]}
    timeout = parameters.pop("X-Request-Timeout")
    assert timeout["in"] == "header"
    assert re.fullmatch(timeout["schema"]["pattern"], "2.5")
    assert set(parameters) == set(POSTS[path].model_fields)
    assert all(parameter["in"] == "query" and parameter["description"] for parameter in parameters.values())
    assert operation["requestBody"]["required"]
    assert set(operation["responses"]) == {"200", *PROBLEM_STATUSES}
    for status, response in operation["responses"].items():
        if status != "200":
            assert set(response["content"]) == {"application/problem+json"}
            schema = response["content"]["application/problem+json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Problem"}


def test_options_with_one_possible_value_say_so(document: dict[str, Any]) -> None:
    parameters = document["paths"]["/decode"]["post"]["parameters"]
    schemas_by_name = {parameter["name"]: parameter["schema"] for parameter in parameters}
    for name, only in (("do_scaling", False), ("scaling_factor", 1.0), ("shift_factor", 0.0)):
        assert schemas_by_name[name]["enum"] == [only]


@pytest.mark.parametrize("path", POSTS)
def test_documented_bodies_are_read(client: httpx.Client, document: dict[str, Any], path: str) -> None:
    """No documented media type is refused as one."""
    for media_type in document["paths"][path]["post"]["requestBody"]["content"]:
        response = client.post(path, content=b"\x89PNG\r\n\x1a\n{", headers={"Content-Type": media_type})
        if media_type != "application/octet-stream":
            assert response.status_code in (400, 422), (media_type, response.text)


@pytest.mark.parametrize("path", ["/encode", "/reconstruct"])
def test_documented_answers_are_given(
    client: httpx.Client, document: dict[str, Any], path: str, png: bytes
) -> None:
    for media_type in document["paths"][path]["post"]["responses"]["200"]["content"]:
        response = client.post(path, content=png, headers={"Accept": media_type})
        assert response.status_code == 200
        assert response.headers["content-type"] == media_type


@pytest.mark.parametrize(
    ("path", "model"), [("/info", schemas.Info), ("/livez", schemas.Health), ("/readyz", schemas.Health)]
)
def test_json_answers_match_their_schemas(client: httpx.Client, path: str, model: Any) -> None:
    model.model_validate_json(client.get(path).content)


def test_latents_and_reconstructions_match_their_schemas(client: httpx.Client, png: bytes) -> None:
    encoded = client.post("/encode", content=png, params={"format": "json"})
    schemas.LatentsOut.model_validate_json(encoded.content)
    schemas.LatentsIn.model_validate_json(encoded.content)
    decoded = client.post("/decode", content=encoded.content, params={"format": "json"})
    schemas.PicturesOut.model_validate_json(decoded.content)
    reconstructed = client.post("/reconstruct", content=png, params={"format": "json"})
    schemas.ReconstructionsOut.model_validate_json(reconstructed.content)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_examples_run(client: httpx.Client, document: dict[str, Any], png: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(png)
    operations = [next(iter(methods.values())) for methods in document["paths"].values()]
    examples = re.findall(
        r"```sh\n(.+)\n```", "\n".join(operation["description"] for operation in operations)
    )
    assert len(examples) == 4
    for example in examples:
        command = example.replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/"))
        command = command.replace("curl -s", "curl -sS --fail-with-body")
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True, timeout=60)


def test_examples_in_schemas_are_read(client: httpx.Client, document: dict[str, Any]) -> None:
    for name, path in (("ImagesIn", "/encode"),):
        fields = document["components"]["schemas"][name]["properties"]
        body = {field: schema["examples"][0] for field, schema in fields.items() if "examples" in schema}
        assert client.post(path, json=body).status_code == 200
