"""Evaluation, the linear probe and pictures, on a tiny tokenizer."""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model.images.files import fit_picture
from model.images.similarity import detail, edge_ratio, psnr, ssim
from model.images.tensors import to_bytes, to_tensor
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION, encode_png, launch, make_image, write_shard
from training.data.batches import decode_image
from training.data.sources import list_samples
from training.errors import DataError, WeightsError
from training.evaluation.evaluate import EvaluationOptions, evaluate_command, evaluate_tokenizer
from training.evaluation.feature_networks import EfficientNetFeatures
from training.evaluation.frechet import frechet_distance
from training.evaluation.moments import FeatureMoments
from training.evaluation.quality import WeightFiles
from training.evaluation.readout import fit_readouts
from training.losses.perceptual import VGG_STAGES, Lpips
from training.output.grids import reconstruction_grid, to_image
from training.studies.linear_probe import linear_probe


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(3)
    return Tokenizer(TINY.model_copy(update={"fusion": TINY_FUSION})).eval()


def fitted(photos: Path) -> torch.Tensor:
    files = sorted(photos.glob("*.png"))
    return torch.stack([to_tensor(fit_picture(decode_image(f.read_bytes()), 32)) for f in files])


def test_evaluation_is_the_mean_over_images(tokenizer: Tokenizer, photos: Path) -> None:
    report = evaluate_tokenizer(tokenizer, list_samples([photos]), batch_size=5, num_pictures=3)
    images = fitted(photos)
    decoded = tokenizer.reconstruct(images)
    assert report.psnr_db == pytest.approx(psnr(decoded, images).mean().item(), abs=1e-4)
    assert report.ssim == pytest.approx(ssim(decoded, images).mean().item(), abs=1e-5)
    assert [row[0] for row in report.per_image] == [f"{index:02d}" for index in range(12)]
    assert report.originals.shape == report.reconstructions.shape == (3, 3, 32, 32)


def test_broken_images_are_counted_and_left_out(tokenizer: Tokenizer, photos: Path) -> None:
    (photos / "02.png").write_bytes(b"text")
    report = evaluate_tokenizer(tokenizer, list_samples([photos]), batch_size=5)
    assert report.num_broken == 1
    assert len(report.per_image) == 11


def test_only_broken_images_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match="none of the 1 images"):
        evaluate_tokenizer(tokenizer, list_samples([tmp_path]))


@pytest.fixture
def checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return tokenizer.save(tmp_path / "checkpoint").path


def evaluate(checkpoint: Path, photos: Path, output: Path | None = None, **options: Any) -> int:
    return evaluate_command(EvaluationOptions(str(checkpoint), [photos], output, device="cpu", **options))


def test_command_writes_json_a_table_rows_and_a_grid(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report"
    assert evaluate(checkpoint, photos, report, latents=("base", "enriched"), batch_size=5) == 0
    summary = json.loads((report / "evaluation.json").read_text())
    assert summary == json.loads(capsys.readouterr().out)
    assert summary["checkpoint_sha256"] == Tokenizer.load(checkpoint).checkpoint.sha256
    with (report / "images.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert summary["num_images"] == 12
    for latent in ("base", "enriched"):
        own = [row for row in rows if row["latent"] == latent]
        means = summary["results"][latent]
        assert len(own) == 12
        assert means["psnr_db"] == pytest.approx(sum(float(row["psnr_db"]) for row in own) / 12, abs=2e-3)
        assert means["ssim"] == pytest.approx(sum(float(row["ssim"]) for row in own) / 12, abs=2e-5)
        assert means["frechet_efficientnet_lite0"] > 0
    table = (report / "evaluation.md").read_text()
    assert "| latent | PSNR, dB | SSIM | edge ratio | detail | Frechet, EfficientNet-Lite0 |" in table
    assert f"| base | {summary['results']['base']['psnr_db']}" in table
    assert "12 images, fewer than its 1280 features, the distance is biased upwards" in table
    assert "FID" not in "".join(summary["results"]["base"])
    assert sorted(file.name for file in report.iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "grid.png",
        "images.csv",
    ]


def test_means_and_distance_equal_those_of_all_images_at_once(
    tokenizer: Tokenizer, checkpoint: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(checkpoint, photos, batch_size=5)
    found = json.loads(capsys.readouterr().out)["results"]["enriched"]
    images = fitted(photos)
    decoded = tokenizer.reconstruct(images)
    assert found["psnr_db"] == pytest.approx(psnr(decoded, images).mean().item(), abs=1e-3)
    assert found["ssim"] == pytest.approx(ssim(decoded, images).mean().item(), abs=1e-5)
    network = EfficientNetFeatures(torch.device("cpu"))
    sides = []
    for batch in (images, decoded):
        sides.append(FeatureMoments(network.width))
        sides[-1].update(network.features(to_bytes(batch)))
    assert found["frechet_efficientnet_lite0"] == pytest.approx(frechet_distance(*sides), rel=1e-3)


def test_grid_shows_the_worst_and_the_best(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """Pictures of the grid, found again by their pixels."""
    report = tmp_path / "report"
    evaluate(checkpoint, photos, report, metrics=("psnr",))
    with (report / "images.csv").open() as stream:
        ranked = sorted(csv.DictReader(stream), key=lambda row: float(row["psnr_db"]))
    with Image.open(report / "grid.png") as grid:
        cells = {name: grid.crop((4, top, 36, top + 32)) for name, top in (("worst", 22), ("best", 166))}
    for name, row in (("worst", ranked[0]), ("best", ranked[-1])):
        expected = fit_picture(decode_image((photos / f"{row['image']}.png").read_bytes()), 32)
        assert cells[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_what_one_rank_gives(
    checkpoint: Path, photos: Path, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "02.png").write_bytes(b"text")
    evaluate(checkpoint, photos, tmp_path / "one", batch_size=4)
    expected = json.loads(capsys.readouterr().out)
    result = launch(
        "evaluate", size, checkpoint=checkpoint, data=[photos], output=tmp_path / "many", batch_size=2
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for name, value in expected.pop("results")["enriched"].items():
        assert found["results"]["enriched"][name] == pytest.approx(value, rel=1e-4)
    del found["results"]
    assert found == expected
    assert found["num_broken_images"] == 1
    tables = [(tmp_path / name / "images.csv").read_text().splitlines() for name in ("one", "many")]
    assert [row.split(",")[0] for row in tables[0]] == [row.split(",")[0] for row in tables[1]]


def test_a_killed_run_goes_on_where_it_was(
    checkpoint: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"checkpoint": checkpoint, "data": [photos], "output": tmp_path / "report", "batch_size": 2}
    result = launch("evaluate", 1, kill_at=4, save_every_s=0.0, **options)
    assert result.returncode == signal.SIGKILL, result.stderr
    evaluate(checkpoint, photos, tmp_path / "whole", batch_size=2)
    expected = json.loads(capsys.readouterr().out)
    sizes: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, images: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes.append(len(images))
        return encode(self, images, *args)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    evaluate(checkpoint, photos, tmp_path / "report", batch_size=2)
    assert sizes[:-2] == [2, 2, 2], "six images were done; the grid's two passes follow"
    found = json.loads(capsys.readouterr().out)
    for name, value in expected["results"]["enriched"].items():
        assert found["results"]["enriched"][name] == pytest.approx(value, rel=1e-6)
    assert not (tmp_path / "report" / ".unfinished").exists()


def test_what_cannot_be_measured_is_said(
    checkpoint: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    evaluate(checkpoint, photos, limit=3)
    skipped = json.loads(capsys.readouterr().out)["not_measured"]
    assert "VGG16" in skipped["lpips"]
    assert "rfid needs" in skipped["rfid"]
    for name in ("lpips", "rfid"):
        with pytest.raises(WeightsError, match=f"{name} needs"):
            evaluate(checkpoint, photos, metrics=("psnr", name))


def test_lpips_of_given_weights(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    vgg, heads, index = {}, {}, 0
    width = 3
    for number, widths in enumerate(VGG_STAGES):
        index += number > 0
        for next_width in widths:
            vgg[f"features.{index}.weight"] = torch.randn(next_width, width, 3, 3) / (9 * width) ** 0.5
            vgg[f"features.{index}.bias"] = torch.zeros(next_width)
            width, index = next_width, index + 2
        heads[f"lin{number}.model.1.weight"] = torch.rand(1, width, 1, 1)
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    files = WeightFiles(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    evaluate(checkpoint, photos, metrics=("lpips",), weights=files, limit=3)
    summary = json.loads(capsys.readouterr().out)
    images = fitted(photos)[[0, 4, 8]]
    decoded = Tokenizer.load(checkpoint).reconstruct(images)
    expected = Lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")(decoded, images).mean().item()
    assert summary["results"]["enriched"] == {"lpips_vgg": pytest.approx(expected, abs=1e-4)}


def test_readouts_edges_and_detail_are_columns(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ("edge_ratio", "detail", "readout")
    options = {"latents": ("base", "enriched"), "metrics": metrics, "readout_photos": [photos]}
    evaluate(checkpoint, photos, tmp_path / "report", **options)
    found = json.loads(capsys.readouterr().out)["results"]
    tokenizer, images = Tokenizer.load(checkpoint), fitted(photos)
    for latent, figures in found.items():
        assert list(figures) == ["edge_ratio", "detail", "readout_db", "readout_3x3_db"]
        decoded = tokenizer.reconstruct(images, latent)
        assert figures["edge_ratio"] == pytest.approx(edge_ratio(decoded, 8).mean().item(), rel=1e-3)
        assert figures["detail"] == pytest.approx(detail(decoded, images, 8).mean().item(), rel=1e-3)
        one, nine = fit_readouts(tokenizer, [photos], (latent,))[latent].images(
            tokenizer.tokens(images, latent)
        )
        assert figures["readout_db"] == pytest.approx(psnr(one, images).mean().item(), abs=1e-2)
        assert figures["readout_3x3_db"] == pytest.approx(psnr(nine, images).mean().item(), abs=1e-2)
    assert (
        "| latent | edge ratio | detail | readout, dB | readout 3x3, dB |"
        in (tmp_path / "report" / "evaluation.md").read_text()
    )


def test_readouts_need_photos(checkpoint: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(checkpoint, photos, limit=3)
    assert "--readout-photos" in json.loads(capsys.readouterr().out)["not_measured"]["readout"]
    with pytest.raises(WeightsError, match="readout needs photos"):
        evaluate(checkpoint, photos, metrics=("readout",))


def test_a_tokenizer_without_fusion_has_base_latents_alone(
    encoder_checkpoint: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(encoder_checkpoint, photos, metrics=("psnr",))
    assert list(json.loads(capsys.readouterr().out)["results"]) == ["base"]
    with pytest.raises(DataError, match="has no fusion"):
        evaluate(encoder_checkpoint, photos, latents=("base", "enriched"))


def test_probe_separates_what_is_separable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for index in range(40):
        label = index % 2
        image = make_image(index).point(lambda value, light=label: value // 3 + 160 * light)
        members |= {f"{index}.png": encode_png(image), f"{index}.cls": str(label).encode()}
    # five classes at least: the probe reports top-5
    for label in range(2, 5):
        members |= {f"x{label}.png": encode_png(make_image(label)), f"x{label}.cls": str(label).encode()}
    shard = write_shard(tmp_path / "a.tar", members)
    result = linear_probe(tokenizer, [shard], [shard], image_size=28)
    assert result.num_classes == 5
    assert result.top1 > 0.8
    assert result.top5 == 1.0


def test_probe_needs_labels(tokenizer: Tokenizer, photos: Path) -> None:
    with pytest.raises(DataError, match="needs a class"):
        linear_probe(tokenizer, [photos], [photos], image_size=28)


def test_grid_places_every_picture() -> None:
    rows = [torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)]
    grid = reconstruction_grid(rows, ["dark", "light"])
    assert grid.width == 2 * (8 + 4) + 4
    pixels = [to_image(row[0]).getpixel((0, 0)) for row in rows]
    assert pixels == [(0, 0, 0), (255, 255, 255)]
