"""Turn the finished runs of phases 0 to 3 into the bundled checkpoint and the pages that show it.

``python -m training.studies.bundle runs/mini --validation SHARD --readout-photos FOLDER``
"""

import argparse
import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from PIL import Image
from torch import Tensor

from model.checkpoints.tokenizers import BUNDLED_DIRECTORY
from model.tokenizer import LatentKind, Tokenizer
from training.data.batches import evaluation_batches
from training.data.passes import PassConfig
from training.data.shards import ShardStore
from training.data.sources import Sample, list_samples
from training.distributed.ranks import Ranks
from training.evaluation.quality import Metrics, WeightFiles, measure_quality
from training.evaluation.readout import fit_readouts
from training.output.grids import reconstruction_grid, save_image

mpl.use("Agg")
from matplotlib import pyplot as plt

logger = logging.getLogger(__name__)

PHASES = ("phase1", "phase2", "phase3", "phase3-seams")
SHOWN_PHASES = ("phase1", "phase2", PHASES[-1])
PICTURES = 6
# Every 45th validation image, so that the pictures come from both of the pack's sources.
PICTURE_STRIDE = 45
BATCH_SIZE = 25
LATENTS: tuple[LatentKind, ...] = ("base", "enriched")
METRICS = ("psnr", "ssim", "edge_ratio", "detail", "readout")


def bundle(
    runs: Path, validation: Sequence[Path], readout_photos: Sequence[Path], pages: Path, name: str = "mini"
) -> dict[str, Any]:
    """Evaluate the phases, write ``model/bundled/<name>`` in half precision and the report.

    Args:
        runs: folder with the run directories, phase0 to phase3-seams.
        validation: folders or shards.
        readout_photos: folders or shards on which the linear readouts are fitted.
        pages: folder for ``results.json``, ``curve.png`` and ``grid.png``.
        name: of the bundled checkpoint.

    Returns:
        The report.
    """
    final = Tokenizer.load(runs / PHASES[-1] / "checkpoint")
    stages = sorted(folder.name for folder in runs.iterdir() if (folder / "run.json").exists())
    histories = {
        stage: json.loads((runs / stage / "run.json").read_text(encoding="utf-8")) for stage in stages
    }
    final.config = final.config.model_copy(update={"name": name})
    provenance = {
        "phases": {
            stage: {
                key: history[key] for key in ("recipe", "networks", "training_seconds", "device", "torch")
            }
            for stage, history in histories.items()
        }
    }
    info = final.save(BUNDLED_DIRECTORY / name, torch.float16, provenance)
    samples = list_samples(validation)
    validated = {phase: histories[phase]["validation"] for phase in PHASES}
    summary = {
        "validation_images": len(samples),
        "phases": validated,
        "bundled (float16)": _measure(info.path, samples, readout_photos),
        "training_seconds": {stage: history["training_seconds"] for stage, history in histories.items()},
        "devices": {stage: history["device"] for stage, history in histories.items()},
        "checkpoint_bytes": sum(file.stat().st_size for file in info.path.iterdir()),
    }
    pages.mkdir(parents=True, exist_ok=True)
    (pages / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    save_image(_grid(runs, samples, validated), pages / "grid.png")
    _plot_curves(runs, pages / "curve.png")
    return summary


def _measure(
    path: Path, samples: Sequence[Sample], readout_photos: Sequence[Path]
) -> dict[LatentKind, dict[str, float | None]]:
    """PSNR, SSIM, edge ratio, detail and readouts of a checkpoint, by latent."""
    tokenizer = Tokenizer.load(path)
    readouts = fit_readouts(tokenizer, readout_photos, LATENTS)
    metrics = Metrics(METRICS, WeightFiles(), tokenizer, readouts)
    config = PassConfig(tokenizer.config.image_size, BATCH_SIZE, "evaluate")
    return measure_quality(tokenizer, samples, LATENTS, metrics, config, ShardStore(None, {}), Ranks()).means


def _grid(runs: Path, samples: Sequence[Sample], figures: dict[str, dict[str, float]]) -> Image.Image:
    """Originals, and what the phases make of them."""
    side = Tokenizer.load(runs / "phase1" / "checkpoint").config.image_size
    chosen = samples[::PICTURE_STRIDE][:PICTURES]
    originals = torch.cat(
        [batch.pixels(torch.device("cpu")) for _, batch in evaluation_batches(chosen, side, PICTURES)]
    )
    rows: list[Tensor] = [originals]
    labels = ["original"]
    for phase in SHOWN_PHASES:
        rows.append(Tokenizer.load(runs / phase / "checkpoint").reconstruct(originals))
        psnr_db, ssim = figures[phase]["psnr_db"], figures[phase]["ssim"]
        labels.append(f"{phase}: {psnr_db:.2f} dB, SSIM {ssim:.3f} (mean of {len(samples)})")
    return reconstruction_grid(rows, labels)


def _read(file: Path) -> list[dict[str, float]]:
    with file.open(encoding="utf-8") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def _plot_curves(runs: Path, file: Path) -> None:
    """Training L1 and validation PSNR over the three phases, one after another."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    offset = 0.0
    for phase in PHASES:
        train, validation = (_read(runs / phase / f"{kind}.csv") for kind in ("train", "validation"))
        left.plot(
            [offset + row["step"] for row in train], [row["l1"] for row in train], label=phase, linewidth=1
        )
        steps = [offset + row["step"] for row in validation]
        right.plot(steps, [row["psnr_db"] for row in validation], marker="o", label=phase)
        offset += train[-1]["step"]
    left.set(xlabel="step", ylabel="L1 (training)", yscale="log")
    right.set(xlabel="step", ylabel="PSNR, dB (validation)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Command line of the bundler; prints the report."""
    parser = argparse.ArgumentParser(description="Bundle finished runs as a checkpoint, with its report.")
    parser.add_argument("runs", type=Path, help="folder with phase0 ... phase3-seams")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="folders or shards")
    parser.add_argument(
        "--readout-photos", type=Path, nargs="+", required=True, help="to fit the linear readouts on"
    )
    parser.add_argument("--pages", type=Path, default=Path("docs/mini"), help="report folder (docs/mini)")
    parser.add_argument("--name", default="mini", help="name of the bundled checkpoint (mini)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    report = bundle(
        arguments.runs, arguments.validation, arguments.readout_photos, arguments.pages, arguments.name
    )
    print(json.dumps(report, indent=2))  # noqa: T201 - the command's own output


if __name__ == "__main__":
    main()
