"""``drorae encode`` and ``drorae decode``: files that interchange with the service's answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.tokenizer import Tokenizer
from service.codecs.images import read_image
from service.photos.decode import ImageRules


@pytest.fixture
def encode(run, checkpoint):
    return lambda *argv: run("encode", "--checkpoint", checkpoint, *argv)


@pytest.fixture
def latents_file(encode, photo, tmp_path):
    """Latents of one photo."""
    encode(photo, "-o", tmp_path / "latents.safetensors")
    return tmp_path / "latents.safetensors"


@pytest.fixture
def decode_refused(refused, checkpoint, tmp_path):
    """The sentence that ``decode`` of a file must give."""

    def call(path, *argv):
        message = refused("decode", path, tmp_path / "out.png", "--checkpoint", checkpoint, *argv)
        assert not (tmp_path / "out.png").exists()
        return message

    return call


def model_latents(checkpoint, *photos, latent="enriched", normalize=False):
    images = [read_image(photo.read_bytes(), ImageRules(64, 10**8, 20)) for photo in photos]
    return Tokenizer.load(checkpoint).encode(torch.stack(images), latent, normalize)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_safetensors_hold_the_latents_and_their_origin(encode, checkpoint, photo, tmp_path, dtype):
    output = tmp_path / "out.safetensors"
    outcome = encode(photo, "-o", output, "--dtype", dtype)
    assert outcome.status == 0
    assert outcome.out == f"{output}: enriched latents [1, 32, 4, 4], {dtype}\n"
    tensors = load_file(output)
    assert list(tensors) == ["latents"]
    assert torch.equal(tensors["latents"], model_latents(checkpoint, photo).to(getattr(torch, dtype)))
    assert metadata(output) == {
        "model": "tiny",
        "checkpoint_sha256": Tokenizer.load(checkpoint).checkpoint.sha256,
        "normalized": "false",
        "latent": "enriched",
    }


def test_npy_holds_the_bare_numbers(encode, checkpoint, photo, tmp_path):
    encode(photo, "-o", tmp_path / "out.npy", "--dtype", "float32")
    assert np.array_equal(np.load(tmp_path / "out.npy"), model_latents(checkpoint, photo).numpy())


def test_options_of_the_latent(encode, checkpoint, photo, tmp_path):
    base, normalized = tmp_path / "base.safetensors", tmp_path / "normalized.safetensors"
    encode(photo, "-o", base, "--latent", "base", "--dtype", "float32")
    encode(photo, "-o", normalized, "--normalize", "--dtype", "float32")
    assert torch.equal(load_file(base)["latents"], model_latents(checkpoint, photo, latent="base"))
    assert metadata(base)["latent"] == "base"
    assert torch.equal(load_file(normalized)["latents"], model_latents(checkpoint, photo, normalize=True))
    assert metadata(normalized)["normalized"] == "true"


def test_photos_and_folders_keep_their_order(encode, checkpoint, photo, photos, tmp_path):
    output = tmp_path / "out.safetensors"
    encode(photo, photos, "-o", output, "--dtype", "float32", "--batch-size", "3")
    order = [photo, photos / "a.png", photos / "b.jpg", photos / "more" / "c.webp"]
    torch.testing.assert_close(load_file(output)["latents"], model_latents(checkpoint, *order))


def test_several_photos_keep_their_names(encode, photo, photos, tmp_path):
    output = tmp_path / "out.safetensors"
    encode(photo, photos, "-o", output)
    assert json.loads(metadata(output)["keys"]) == ["photo", "a", "b", "more/c"]
    (photos / "a.png").write_bytes(b"broken")
    assert encode(photos, "-o", output).status == 3
    assert json.loads(metadata(output)["keys"]) == ["b", "more/c"]


def test_encoding_refuses_what_it_cannot_do(
    refused, checkpoint, other_checkpoint, photo, broken_image, tmp_path
):
    output, use = tmp_path / "out.safetensors", ("--checkpoint", checkpoint)
    assert f"{broken_image}: " in refused("encode", broken_image, "-o", output, *use)
    assert "no-photo.jpg: No such file" in refused("encode", "no-photo.jpg", "-o", output, *use)
    assert "must end in one of .safetensors, .npy" in refused("encode", photo, "-o", tmp_path / "o.pt", *use)
    assert "no bfloat16" in refused("encode", photo, "-o", tmp_path / "o.npy", "--dtype", "bfloat16", *use)
    argv = ("encode", photo, "-o", output, "--normalize", "--checkpoint", other_checkpoint)
    assert "no latent statistics" in refused(*argv)
    assert not output.exists()


def test_decode_gives_the_reconstruction(run, encode, checkpoint, photo, tmp_path):
    output = tmp_path / "latents.safetensors"
    encode(photo, "-o", output, "--dtype", "float32")
    outcome = run("decode", output, tmp_path / "decoded.png", "--checkpoint", checkpoint)
    assert outcome.out == f"{tmp_path / 'decoded.png'}: 1 picture of 64 pixels\n"
    run("reconstruct", photo, tmp_path / "reconstructed.png", "--checkpoint", checkpoint)
    assert (tmp_path / "decoded.png").read_bytes() == (tmp_path / "reconstructed.png").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_several_latents_become_numbered_pictures(run, encode, checkpoint, photos, tmp_path, suffix):
    latents = tmp_path / f"latents{suffix}"
    encode(photos, "-o", latents)
    outcome = run("decode", latents, tmp_path / "out", "--checkpoint", checkpoint, "--batch-size", 2)
    assert outcome.status == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png"]
    with Image.open(tmp_path / "out" / "0002.png") as picture:
        assert picture.size == (64, 64)


def test_the_file_says_whether_it_is_normalised(run, encode, checkpoint, photo, tmp_path):
    plain, normalized = tmp_path / "plain.safetensors", tmp_path / "normalized.safetensors"
    encode(photo, "-o", plain, "--dtype", "float32")
    encode(photo, "-o", normalized, "--normalize", "--dtype", "float32")
    for latents in (plain, normalized):
        assert run("decode", latents, latents.with_suffix(".png"), "--checkpoint", checkpoint).status == 0
    one, other = (np.array(Image.open(p.with_suffix(".png"))).astype(int) for p in (plain, normalized))
    assert np.abs(one - other).max() <= 1
    contradiction = run(
        "decode", normalized, tmp_path / "x.png", "--no-normalize", "--checkpoint", checkpoint
    )
    assert contradiction.status == 2
    assert "contradicts" in contradiction.err


def test_bare_numbers_are_normalised_only_if_said(run, encode, checkpoint, photo, tmp_path):
    latents = tmp_path / "latents.npy"
    encode(photo, "-o", latents, "--normalize")
    run("decode", latents, tmp_path / "plain.png", "--checkpoint", checkpoint)
    run("decode", latents, tmp_path / "normalized.png", "--normalize", "--checkpoint", checkpoint)
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "normalized.png").read_bytes()


def test_the_services_json_answer_decodes_too(run, checkpoint, photo, tmp_path):
    latents = tmp_path / "latents.json"
    latents.write_text(json.dumps({"latents": model_latents(checkpoint, photo).tolist()}))
    assert run("decode", latents, tmp_path / "out.png", "--checkpoint", checkpoint).status == 0


def test_a_file_of_another_name_is_known_by_its_bytes(run, checkpoint, latents_file, tmp_path):
    renamed = latents_file.rename(tmp_path / "download")
    assert run("decode", renamed, tmp_path / "out.png", "--checkpoint", checkpoint).status == 0


def test_latents_of_another_checkpoint(refused, other_checkpoint, latents_file, tmp_path):
    message = refused("decode", latents_file, tmp_path / "out.png", "--checkpoint", other_checkpoint)
    assert f"{latents_file}: The latents are of checkpoint" in message


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (torch.zeros(1, 768, 16, 16), "shape [1, 768, 16, 16]"),
        (torch.zeros(32, 4), "shape [32, 4]"),
        (torch.full((1, 32, 4, 4), float("nan")), "Latent 0 holds a NaN"),
        (torch.full((1, 32, 4, 4), float("inf")), "Latent 0 holds a NaN or infinite"),
        (torch.zeros(1, 32, 4, 4, dtype=torch.int32), "I32"),
    ],
)
def test_latents_that_are_none(decode_refused, tmp_path, latents, words):
    save_file({"latents": latents}, tmp_path / "bad.safetensors")
    assert words in decode_refused(tmp_path / "bad.safetensors")


def test_tensor_of_another_name(decode_refused, tmp_path):
    save_file({"z": torch.zeros(1, 32, 4, 4)}, tmp_path / "bad.safetensors")
    assert "it must hold just one, 'latents'" in decode_refused(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.npy", "bad.json", "bad.bin"])
@pytest.mark.parametrize("data", [b"", b"hello", b"\x93NUMPY\x01\x00", b"\x10\0\0\0\0\0\0\0{}"])
def test_files_that_are_no_latents(decode_refused, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert f"{tmp_path / name}: " in decode_refused(tmp_path / name)


def test_truncated_latents(decode_refused, latents_file):
    latents_file.write_bytes(latents_file.read_bytes()[:-10])
    assert "not a complete safetensors file" in decode_refused(latents_file)


def test_pickled_numpy_is_not_opened(decode_refused, tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "dtype object" in decode_refused(tmp_path / "bad.npy")


def test_decoding_usage(refused, encode, photos, latents_file, checkpoint, tmp_path):
    use = ("--checkpoint", checkpoint)
    several = tmp_path / "several.npy"
    encode(photos, "-o", several)
    assert "3 latents" in refused("decode", several, tmp_path / "out.png", *use)
    assert "nowhere.npy: No such file" in refused(
        "decode", tmp_path / "nowhere.npy", tmp_path / "out.png", *use
    )
    assert "manifest.json" in refused("decode", tmp_path, tmp_path / "out.png", *use)
    assert "a picture ends in one of" in refused("decode", latents_file, tmp_path / "out.gif", *use)
