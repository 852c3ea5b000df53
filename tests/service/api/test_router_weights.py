"""What JSON tells of a reconstruction beside the picture: router weights, and the fitted originals."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.config import FusionConfig
from model.images.tensors import to_unit
from model.tokenizer import Tokenizer
from service.app import create_app
from service.codecs.images import read_image
from service.photos.decode import ImageRules
from service.settings import Settings

Check = Callable[..., dict[str, Any]]
SIDE = 64
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def original(png: bytes) -> Tensor:
    """The shared photo as the model sees it, [3, S, S] uint8."""
    return read_image(png, ImageRules(SIDE, 10**6, 20, exact=False))


def test_the_weights_are_those_of_the_router(
    client: httpx.Client, tokenizer: Tokenizer, png: bytes, original: Tensor
) -> None:
    answer = client.post("/reconstruct?format=json&router=maps", content=png)
    document = answer.json()
    maps = torch.tensor(document["router_maps"])
    assert maps.shape == (1, NUM_LAYERS, 8, 8)
    assert tokenizer.fusion is not None
    with torch.no_grad():
        states = tokenizer.encoder(tokenizer.preprocess(to_unit(original[None].contiguous())))
        expected = tokenizer.fusion.mixer.route(*tokenizer.fusion._select(states))  # by the definition
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(document["router_mean"]), maps.mean(dim=(2, 3)))
    plain = client.post("/reconstruct?format=json", content=png).json()
    assert document["images"] == plain["images"]
    assert not {"router_mean", "router_maps", "originals"} & set(plain)
    assert answer.headers["server-timing"].count("device;") == 1


def test_mean_weights_of_several_images(client: httpx.Client, png: bytes) -> None:
    sent = [("images", png)] * 3
    document = client.post("/reconstruct?format=json&router=mean", files=sent).json()
    assert np.shape(document["router_mean"]) == (3, NUM_LAYERS)
    assert "router_maps" not in document


def test_originals_are_what_the_model_saw(client: httpx.Client, png: bytes, original: Tensor) -> None:
    sent = [("images", png)] * 2
    document = client.post("/reconstruct?format=json&originals=true", files=sent).json()
    assert len(document["originals"]) == 2
    for text in document["originals"]:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(text))))
        assert np.array_equal(pixels, original.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("router=mean", "format=json"),
        ("originals=true&format=png", "format=json"),
        ("router=mean&format=json&latent=base", "latent=enriched"),
        ("router=all&format=json", "router"),
    ],
)
def test_what_is_impossible(
    client: httpx.Client, png: bytes, check_problem: Check, query: str, word: str
) -> None:
    check_problem(client.post(f"/reconstruct?{query}", content=png), 422, "invalid-option", word)


@pytest.mark.parametrize("mixer", [None, "cross_attention"])
def test_models_without_a_router(
    serve: Any, tokenizer: Tokenizer, png: bytes, check_problem: Check, mixer: Any
) -> None:
    fusion = mixer and FusionConfig(num_layers=3, hidden_width=48, num_heads=2, mixer=mixer)
    config = tokenizer.config.model_copy(update={"fusion": fusion})
    with serve(create_app(Settings(batch_size=1), Tokenizer(config).eval())) as running:
        good = running.client.post("/reconstruct?format=json", content=png)
        assert good.status_code == 200
        refused = running.client.post("/reconstruct?format=json&router=mean", content=png)
        check_problem(refused, 422, "invalid-option", "no router")


def test_the_document_describes_the_weights(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    options = {option["name"]: option for option in document["paths"]["/reconstruct"]["post"]["parameters"]}
    assert {"mean", "maps"} <= set(json.dumps(options["router"]["schema"]).replace('"', " ").split())
    fields = document["components"]["schemas"]["ReconstructionsOut"]["properties"]
    assert {"router_mean", "router_maps", "originals"} <= set(fields)
