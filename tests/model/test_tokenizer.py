"""The tokenizer's public methods: shapes, options, statistics and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model.networks.fusion
from kernels.reference import token_norm
from model.config import PRESETS
from model.errors import FusionError, ImageError, LatentError, ModelError
from model.images.files import fit_picture, to_srgb, upright
from model.images.tensors import to_tensor
from model.tokenizer import Tokenizer

SAMPLES = Path(__file__).parents[2] / "samples"


def with_statistics(tokenizer: Tokenizer) -> Tokenizer:
    generator = torch.Generator().manual_seed(4)
    shape = tokenizer.config.latent_shape
    tokenizer.set_statistics(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator))
    return tokenizer


def test_encode_lays_tokens_out_channels_first(tokenizer, images):
    latents = tokenizer.encode(images)
    assert latents.shape == (2, *tokenizer.config.latent_shape)
    assert latents.is_contiguous()
    tokens = tokenizer.tokens(images)
    assert torch.equal(latents[1, :, 2, 3], tokens[1, 2 * 4 + 3])


def test_enriched_and_base_latents_differ_and_base_is_the_last_layer(tokenizer, images):
    base = tokenizer.encode(images, latent="base")
    last = tokenizer.encoder(tokenizer.preprocess(images))[-1]
    expected = token_norm(last, tokenizer.config.encoder.layer_norm_eps)
    assert torch.equal(base.flatten(2).transpose(1, 2), expected)
    assert not torch.allclose(base, tokenizer.encode(images), atol=1e-2)


def test_zero_beta_tokenizer_returns_the_base_latent_bit_for_bit(tiny_config, randomize, images):
    tokenizer = Tokenizer(tiny_config(beta=0.0)).eval()
    randomize(tokenizer)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images, latent="base"))


def test_without_fusion_the_latent_is_the_base(tiny_config, randomize, images):
    config = tiny_config().model_copy(update={"fusion": None})
    tokenizer = Tokenizer(config).eval()
    randomize(tokenizer)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images, latent="base"))
    assert tokenizer.fusion_path == "none"
    assert set(tokenizer.parts()) == {"encoder", "decoder"}


def test_reconstruct_is_decode_of_encode_and_stays_in_range(tokenizer, images):
    pictures = tokenizer.reconstruct(images)
    assert torch.equal(pictures, tokenizer.decode(tokenizer.encode(images)))
    assert pictures.shape == images.shape
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_an_image_does_not_depend_on_its_neighbours(tokenizer, images):
    alone = torch.cat([tokenizer.encode(images[:1]), tokenizer.encode(images[1:])])
    torch.testing.assert_close(alone, tokenizer.encode(images), atol=1e-5, rtol=0)


def test_normalisation_is_per_position_and_inverts(tokenizer, images):
    plain = tokenizer.encode(images)
    tokenizer = with_statistics(tokenizer)
    normalised = tokenizer.encode(images, normalize=True)
    expected = (plain - tokenizer.latent_mean) / torch.sqrt(tokenizer.latent_var + 1e-5)
    assert torch.equal(normalised, expected)
    torch.testing.assert_close(
        tokenizer.decode(normalised, normalize=True), tokenizer.decode(plain), atol=1e-4, rtol=0
    )


def test_normalize_needs_statistics_of_that_latent(tokenizer, images):
    with pytest.raises(LatentError, match="no latent statistics"):
        tokenizer.encode(images, normalize=True)
    with pytest.raises(LatentError, match="no latent statistics"):
        tokenizer.decode(tokenizer.encode(images), normalize=True)
    with pytest.raises(LatentError, match="normalize is not offered for base"):
        with_statistics(tokenizer).encode(images, latent="base", normalize=True)


def test_statistics_are_checked(tokenizer):
    shape = tokenizer.config.latent_shape
    zeros, ones = torch.zeros(shape), torch.ones(shape)
    with pytest.raises(LatentError, match=r"statistics var has shape \[1\]"):
        tokenizer.set_statistics(zeros, torch.ones(1))
    with pytest.raises(LatentError, match="statistics mean has a non-finite value"):
        tokenizer.set_statistics(zeros.fill_(float("inf")), ones)
    with pytest.raises(LatentError, match="statistics var has a negative value"):
        tokenizer.set_statistics(ones, -ones)
    assert not tokenizer.has_statistics


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 64, 64), r"shape \[3, 64, 64\], expected \[B, 3, 64, 64\]"),
        (torch.rand(1, 1, 64, 64), r"shape \[1, 1, 64, 64\]"),
        (torch.rand(1, 3, 64, 63), r"shape \[1, 3, 64, 63\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "dtype torch.int32"),
        (torch.rand(3, 64, 64), r"images\[None\]"),
        (torch.rand(1, 64, 64, 3), r"permute\(0, 3, 1, 2\)"),
        (np.zeros((2, 64, 64, 3), np.uint8), "channels come first"),
        (np.zeros((1, 3, 64, 64), object), "NumPy array of object"),
        (np.zeros((1, 3, 64, 64), np.int64), "dtype torch.int64"),
        ([[0.0]], "images are a list"),
        (Image.new("RGB", (64, 64)), "images are a Image, expected a tensor or NumPy array"),
        (torch.full((1, 3, 64, 64), 255.0), "from 255 to 255, outside .* divide by 255"),
        (torch.rand(1, 3, 64, 64) * 2 - 1, r"undo it: images \* std \+ mean"),
        (torch.full((1, 3, 64, 64), 1.1), "clamp"),
        (torch.full((1, 3, 64, 64), -0.1, dtype=torch.bfloat16), "clamp"),
        (torch.full((2, 3, 64, 64), float("nan")), "NaN or infinite"),
        (torch.full((1, 3, 64, 64), float("inf"), dtype=torch.float16), "NaN or infinite"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
        (torch.zeros(1, 3, 64, 64).to_sparse(), "no dense tensor"),
        (torch.zeros(1, 3, 64, 64).to_mkldnn(), "no dense tensor"),
        (torch.zeros(1, 3, 64, 64, device="meta"), "no dense tensor"),
    ],
)
def test_wrong_images_are_refused(tokenizer, images, message):
    for operation in (tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(ImageError, match=message):
            operation(images)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
def test_numpy_arrays_are_taken(tokenizer, images, dtype):
    array = images.numpy() * (255 if dtype == np.uint8 else 1)
    array = np.ascontiguousarray(array.astype(dtype)[..., ::-1])[..., ::-1]  # of negative strides
    tensor = torch.from_numpy(array.copy())
    assert torch.equal(tokenizer.encode(array), tokenizer.encode(tensor))


def test_foreign_byte_orders_are_taken(tokenizer, images):
    foreign = images.double().numpy().astype(">f8")
    assert torch.equal(tokenizer.encode(foreign), tokenizer.encode(images))


def test_a_misspelt_latent_is_refused(tokenizer, images):
    with pytest.raises(LatentError, match="no latent 'Base'"):
        tokenizer.encode(images, "Base")


def test_what_rounding_adds_is_clamped(tokenizer):
    images = torch.tensor([-0.002, 1.004]).repeat(96 * 64).view(1, 3, 64, 64)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images.clamp(0, 1)))


def test_no_images_give_no_latents_or_a_sentence(tokenizer):
    assert tokenizer.encode(torch.empty(0, 3, 64, 64)).shape == (0, *tokenizer.config.latent_shape)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.rand(32, 4, 4), r"shape \[32, 4, 4\], expected \[B, 32, 4, 4\]"),
        (torch.rand(1, 768, 16, 16), r"shape \[1, 768, 16, 16\], expected \[B, 32, 4, 4\]"),
        (torch.zeros(1, 32, 4, 4, dtype=torch.int64), "dtype torch.int64"),
        (np.zeros((1, 32, 4, 4), np.float32), "latents are a ndarray, expected a tensor"),
        (torch.full((1, 32, 4, 4), float("nan")), "latent 0 holds a NaN"),
        (torch.cat([torch.zeros(2, 32, 4, 4), torch.full((1, 32, 4, 4), float("-inf"))]), "latent 2 holds"),
        (torch.full((1, 32, 4, 4), 1e300, dtype=torch.float64), "latent 0 holds"),
        (torch.zeros(1, 32, 4, 4, dtype=torch.float8_e5m2), "dtype torch.float8_e5m2"),
        (torch.zeros(1, 32, 4, 4).to_sparse(), "no dense tensor"),
        (torch.zeros(1, 32, 4, 4, device="meta"), "no dense tensor"),
    ],
)
def test_wrong_latents_are_refused(tokenizer, latents, message):
    with pytest.raises(LatentError, match=message):
        tokenizer.decode(latents)


def test_empty_batches_pass_through(tokenizer):
    latents = tokenizer.encode(torch.zeros(0, 3, 64, 64))
    assert latents.shape == (0, 32, 4, 4)
    assert tokenizer.decode(latents).shape == (0, 3, 64, 64)


def test_bytes_are_images_too(tokenizer, images):
    as_bytes = images.mul(255).round().to(torch.uint8)
    for layout in (as_bytes, as_bytes.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(tokenizer.encode(layout), tokenizer.encode(as_bytes.float() / 255))
    assert torch.equal(tokenizer.reconstruct(as_bytes), tokenizer.reconstruct(as_bytes.float() / 255))


def test_other_dtypes_are_moved_to_the_tokenizers(tokenizer, images):
    latents = tokenizer.encode(images.double())
    assert latents.dtype == tokenizer.dtype == torch.float32
    half = tokenizer.decode(latents.half())
    torch.testing.assert_close(half, tokenizer.decode(latents), atol=2e-2, rtol=0)


def test_bfloat16_stays_close(tokenizer, tmp_path, images):
    tokenizer.save(tmp_path / "c")
    small = Tokenizer.load(tmp_path / "c", dtype=torch.bfloat16)
    latents = small.encode(images)
    assert latents.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(latents.float(), tokenizer.encode(images), dim=1)
    assert cosine.min() > 0.99


def test_errors_share_a_root():
    assert issubclass(ImageError, ModelError)
    assert issubclass(LatentError, ModelError)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_mini_fits_its_budget(name):
    with torch.device("meta"):
        tokenizer = Tokenizer(PRESETS[name])
    stored_bytes = 2 * sum(parameter.numel() for parameter in tokenizer.parameters())
    if name == "mini":
        assert stored_bytes <= 48 * 2**20


@pytest.mark.parametrize(
    ("setting", "path"), [("auto", "folded"), ("folded", "folded"), ("reference", "reference")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_with_the_fusion_that_is_asked_for(tokenizer, tmp_path, images, setting, path, dtype, caplog):
    tokenizer.save(tmp_path / "c")
    loaded = Tokenizer.load(tmp_path / "c", dtype=dtype, fusion=setting)
    assert loaded.fusion_path == path
    assert not caplog.records  # nothing is slower than it must be, and no path was lost on the way
    latents = loaded.encode(images)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(latents.float(), tokenizer.encode(images), atol=tolerance, rtol=0)


def test_a_fusion_that_cannot_run_is_refused(tokenizer, tiny_config, tmp_path):
    tokenizer.save(tmp_path / "experts")
    with pytest.raises(FusionError, match="fusion=triton cannot run"):
        Tokenizer.load(tmp_path / "experts", fusion="triton")
    Tokenizer(tiny_config(mixer="cross_attention")).save(tmp_path / "attention")
    with pytest.raises(FusionError, match="fusion=folded cannot run: the cross_attention mixer has no exp"):
        Tokenizer.load(tmp_path / "attention", fusion="folded")
    assert Tokenizer.load(tmp_path / "attention").fusion_path == "reference"


def test_without_fusion_every_setting_is_none(tiny_config, tmp_path):
    Tokenizer(tiny_config().model_copy(update={"fusion": None})).save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c", fusion="folded").fusion_path == "none"


def test_training_a_loaded_tokenizer_uses_the_definition(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "c")
    loaded = Tokenizer.load(tmp_path / "c")
    loaded.fusion.unfreeze()
    assert loaded.fusion_path == "reference"


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """[3, 3, 256, 256] in [0, 1]."""
    pictures = [Image.open(file) for file in sorted(SAMPLES.glob("*.jpg"))]
    return torch.stack([to_tensor(fit_picture(to_srgb(upright(picture)), 256)) for picture in pictures])


@pytest.mark.parametrize(
    ("path", "num_photos"),
    [
        ("folded", 3),
        pytest.param(
            "triton",
            1,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU are interpreted"),
            ],
        ),
    ],
)
def test_paths_agree_on_real_photos(photos, path, num_photos):
    by_definition, tokenizer = (Tokenizer.load("mini", fusion=setting) for setting in ("reference", path))
    assert tokenizer.fusion_path == path
    expected, found = (each.encode(photos[:num_photos]) for each in (by_definition, tokenizer))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.decode(found), by_definition.decode(expected), atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paths_agree_on_a_gpu(photos, dtype):
    by_definition = Tokenizer.load("mini", device="cuda", fusion="reference")
    tokenizer = Tokenizer.load("mini", device="cuda", dtype=dtype)
    assert tokenizer.fusion_path == "triton"
    difference = tokenizer.encode(photos).float() - by_definition.encode(photos)
    assert (
        difference.norm() <= (1e-4 if dtype == torch.float32 else 0.05) * by_definition.encode(photos).norm()
    )


def test_folds_from_weights_in_full_precision(monkeypatch):
    folded = []

    def fold(weights, spec):
        folded.append(weights.up[0].dtype)
        return fold_experts(weights, spec)

    fold_experts = model.networks.fusion.fold_experts
    monkeypatch.setattr(model.networks.fusion, "fold_experts", fold)
    tokenizer = Tokenizer.load("mini", dtype=torch.bfloat16)
    assert (tokenizer.fusion_path, tokenizer.dtype) == ("folded", torch.bfloat16)
    assert folded == [torch.float32]
