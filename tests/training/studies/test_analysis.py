"""Analysis of tiny checkpoints: against numpy and the tokenizer itself, and what is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import FusionConfig
from model.errors import CheckpointError
from model.images.files import fit_picture
from model.images.tensors import to_tensor
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION
from training.data.batches import decode_image
from training.errors import DataError
from training.evaluation.histograms import ColumnMoments, Histogram, principal_components
from training.evaluation.moments import FeatureMoments
from training.studies.analysis import analyze_command
from training.studies.measurements import analyze
from training.studies.spectra import NUM_BANDS, SpectrumDifference, band_centres, log_spectrum
from training.studies.summary import headline, summarize

FIGURES = {"spectra.png", "router_maps.png", "router_layers.png", "components.png", "tokens.png"}


def tiny(fusion: FusionConfig | None = TINY_FUSION, seed: int = 3) -> Tokenizer:
    """Random weights; a router that tells tokens apart, as a trained one does."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TINY.model_copy(update={"fusion": fusion})).eval()
    if fusion is not None and fusion.mixer == "experts":
        torch.nn.init.normal_(tokenizer.get_parameter("fusion.mixer.router.weight"), std=0.2)
    return tokenizer


def fitted(photos: Path) -> torch.Tensor:
    files = sorted(photos.glob("*.png"))
    return torch.stack([to_tensor(fit_picture(decode_image(f.read_bytes()), 32)) for f in files])


def test_moments_of_a_stream_are_those_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(1e4, 1.0, (500, 3)) * [1, -1, 1e-3]
    moments = ColumnMoments(3)
    for part in torch.from_numpy(values).split(77):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, values.std(axis=0), rtol=1e-9)
    np.testing.assert_array_equal(moments.maximum, values.max(axis=0))
    np.testing.assert_array_equal(moments.negative_share, (values < 0).mean(axis=0))


def test_histogram_counts_and_quantiles() -> None:
    values = np.random.default_rng(1).uniform(-1.2, 1.2, 20_000)
    histogram = Histogram(-1, 1, 200)
    for part in torch.from_numpy(values).split(3_000):
        histogram.update(part)
    expected, _ = np.histogram(values.clip(-1, 1), bins=200, range=(-1, 1))
    np.testing.assert_array_equal(histogram.counts, expected)
    for share in (0.3, 0.5, 0.7):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.01)


def test_components_are_those_of_the_whole_covariance() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.normal(size=(400, 5)) * [5, 4, 3, 2, 1] @ np.linalg.qr(rng.normal(size=(5, 5)))[0] + 7
    covariance = FeatureMoments(5)
    for part in torch.from_numpy(tokens).split(90):
        covariance.update(part)
    components = principal_components(covariance)
    centred = tokens - tokens.mean(axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(components.explained_ratio, scales**2 / (scales**2).sum(), rtol=1e-10)
    projected = components.project(torch.from_numpy(tokens), 3).numpy()
    np.testing.assert_allclose(np.abs(projected), np.abs(centred @ directions[:3].T), atol=1e-9)
    largest = components.directions.gather(0, components.directions.abs().argmax(dim=0)[None])
    assert (largest > 0).all()


def test_spectrum_is_numpys() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    transform = np.fft.fft2(images.numpy().astype(np.float64) * 255)
    expected = np.fft.fftshift(np.log1p(np.abs(transform)), axes=(-2, -1)).mean(axis=1)
    np.testing.assert_allclose(log_spectrum(images), expected, atol=1e-4)


def test_blur_and_noise_deviate_where_and_as_they_should() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    same, blurred = SpectrumDifference(32), SpectrumDifference(32)
    same.update(images, images, log_spectrum(images))
    blur = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    blurred.update(blur, images, log_spectrum(images))
    assert same.deviation == same.deviation_per_image == 0
    assert blurred.deviation > 0.5
    assert blurred.deviation_per_image >= blurred.deviation
    profile = blurred.profile()
    assert profile[-4:].mean() < profile[:4].mean() - 0.5
    assert band_centres()[-1] == pytest.approx(0.5 - 0.25 / NUM_BANDS)


def test_gathered_figures_are_the_tokenizers_own(photos: Path) -> None:
    tokenizer = tiny()
    assert tokenizer.fusion is not None
    analysis = analyze(tokenizer, [photos], batch_size=5, progress=False)
    images = fitted(photos)
    with torch.no_grad():
        states = tokenizer.encoder(tokenizer.preprocess(images))
        weights = tokenizer.fusion.router_weights(states).double().flatten(0, 1)
        base, fused = tokenizer.fusion.base_and_fused(states)
    row = summarize(analysis)["router"][1]
    assert row["layer"] == 2
    assert row["mean"] == pytest.approx(weights.mean(dim=0)[1].item(), rel=1e-4)
    assert row["std"] == pytest.approx(weights.std(dim=0, correction=0)[1].item(), rel=1e-4)
    assert row["negative_share"] == pytest.approx((weights < 0).double().mean(dim=0)[1].item(), rel=1e-4)
    energy = weights.square() / weights.square().sum(dim=1, keepdim=True)
    assert row["energy_share"] == pytest.approx(energy.mean(dim=0)[1].item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(fused, base, dim=-1).mean().item()
    found = float(analysis.angles["cos(z_fuse, z_base)"].moments.mean)
    assert found == pytest.approx(cosine, abs=1e-5)
    for name, latent in (("enriched", "enriched"), ("base", "base")):
        expected = SpectrumDifference(32)
        expected.update(tokenizer.reconstruct(images, latent), images, log_spectrum(images))
        assert analysis.spectra[name].deviation == pytest.approx(expected.deviation, rel=1e-4)
        assert analysis.spectra[name].psnr_db == pytest.approx(expected.psnr_db, rel=1e-4)


def test_base_latents_through_the_base_checkpoints_decoder(photos: Path) -> None:
    tokenizer, base = tiny(), tiny(None, seed=4)
    base.encoder.load_state_dict({n: t.half().float() for n, t in tokenizer.encoder.state_dict().items()})
    analysis = analyze(tokenizer, [photos], base, progress=False)
    expected = SpectrumDifference(32)
    images = fitted(photos)
    expected.update(base.reconstruct(images), images, log_spectrum(images))
    found = analysis.spectra["base_checkpoint"]
    assert found.deviation == pytest.approx(expected.deviation, rel=1e-2)
    assert abs(found.deviation - analysis.spectra["base"].deviation) > 1e-3


def test_command_writes_figures_and_json_twice_the_same(photos: Path, tmp_path: Path) -> None:
    checkpoint = tiny().save(tmp_path / "checkpoint")
    outputs = [tmp_path / "a", tmp_path / "b"]
    for output in outputs:
        summary = analyze_command(str(checkpoint.path), [photos], output, limit=5, batch_size=2, device="cpu")
    assert {file.name for file in outputs[0].iterdir()} == FIGURES | {"analysis.json"}
    for file in outputs[0].iterdir():
        assert file.read_bytes() == (outputs[1] / file.name).read_bytes(), file.name
    assert json.loads((outputs[0] / "analysis.json").read_text()) == summary
    assert summary["num_images"] == 5
    assert summary["checkpoint"]["sha256"] == checkpoint.sha256
    assert summary["not_applicable"] == {}
    assert set(headline(summary)["psnr_db"]) == {"base", "enriched"}


@pytest.mark.parametrize(
    ("fusion", "absent"),
    [
        (None, {"spectra.enriched", "router", "z_fuse", "z_final", "cosines"}),
        (TINY_FUSION.model_copy(update={"mixer": "cross_attention"}), {"router"}),
    ],
    ids=["no fusion", "cross_attention"],
)
def test_what_does_not_apply_is_left_out_and_said(
    fusion: FusionConfig | None, absent: set[str], photos: Path, tmp_path: Path
) -> None:
    checkpoint = tiny(fusion).save(tmp_path / "checkpoint")
    summary = analyze_command(str(checkpoint.path), [photos], tmp_path / "out", device="cpu")
    assert set(summary["not_applicable"]) == absent
    assert summary["router"] is None
    assert (summary["cosines"] is None) == (fusion is None)
    assert set(summary["figures"]) == FIGURES - {"router_maps.png", "router_layers.png"}
    assert headline(summary)["router_unit_mean"] is None


def test_foreign_base_checkpoints_are_refused(photos: Path) -> None:
    with pytest.raises(CheckpointError, match=r"encoder tensor 'class_token' differs"):
        analyze(tiny(), [photos], tiny(None, seed=9), progress=False)
    other = TINY.model_copy(update={"encoder": TINY.encoder.model_copy(update={"num_registers": 2})})
    with pytest.raises(CheckpointError, match="'encoder' differs"):
        analyze(tiny(), [photos], Tokenizer(other), progress=False)


def test_broken_photos_are_counted(photos: Path, tmp_path: Path) -> None:
    (photos / "02.png").write_bytes(b"text")
    analysis = analyze(tiny(), [photos], progress=False)
    assert (analysis.num_images, analysis.num_broken) == (11, 1)
    only = tmp_path / "broken"
    only.mkdir()
    (only / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match="none of the 1 images"):
        analyze(tiny(), [only], progress=False)
