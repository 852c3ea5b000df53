"""Turn the finished runs of phases 0 to 3 into the bundled checkpoint and the pages that show it.

``python -m training.bundle runs/mini --validation SHARD``
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

from model.checkpoints import BUNDLED_DIRECTORY
from model.tokenizer import Tokenizer
from training.evaluate import Evaluation, evaluate_tokenizer
from training.pictures import reconstruction_grid, save_image

mpl.use("Agg")
from matplotlib import pyplot as plt

logger = logging.getLogger(__name__)

PHASES = ("phase1", "phase2", "phase3")
PICTURES = 6
# Every 45th validation image, so that the pictures come from both of the pack's sources.
PICTURE_STRIDE = 45


def bundle(runs: Path, validation: Sequence[Path], pages: Path, name: str = "mini") -> dict[str, Any]:
    """Evaluate the phases, write ``model/bundled/<name>`` in half precision and the report.

    Args:
        runs: folder with the run directories phase0 ... phase3.
        validation: folders or shards.
        pages: folder for ``results.json``, ``curve.png`` and ``grid.png``.
        name: of the bundled checkpoint.

    Returns:
        The report.
    """
    final = Tokenizer.load(runs / "phase3" / "checkpoint")
    histories = {
        p: json.loads((runs / p / "run.json").read_text(encoding="utf-8")) for p in ("phase0", *PHASES)
    }
    final.config = final.config.model_copy(update={"name": name})
    provenance = {
        "phases": {
            phase: {
                key: history[key] for key in ("recipe", "networks", "training_seconds", "device", "torch")
            }
            for phase, history in histories.items()
        }
    }
    info = final.save(BUNDLED_DIRECTORY / name, torch.float16, provenance)
    checkpoints = {phase: runs / phase / "checkpoint" for phase in PHASES}
    checkpoints["bundled (float16)"] = info.path
    reports = {phase: _evaluate(path, validation) for phase, path in checkpoints.items()}
    summary = {
        "validation_images": len(reports["phase3"].per_image),
        "phases": {p: {"psnr_db": round(r.psnr_db, 3), "ssim": round(r.ssim, 4)} for p, r in reports.items()},
        "training_seconds": {phase: history["training_seconds"] for phase, history in histories.items()},
        "device": histories["phase3"]["device"],
        "checkpoint_bytes": sum(file.stat().st_size for file in info.path.iterdir()),
    }
    pages.mkdir(parents=True, exist_ok=True)
    (pages / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    save_image(_grid(reports), pages / "grid.png")
    _plot_curves(runs, pages / "curve.png")
    return summary


def _evaluate(path: Path, validation: Sequence[Path]) -> Evaluation:
    return evaluate_tokenizer(Tokenizer.load(path), validation, num_pictures=PICTURES * PICTURE_STRIDE)


def _grid(reports: dict[str, Evaluation]) -> Image.Image:
    def spread(images: Tensor) -> Tensor:
        return images[::PICTURE_STRIDE][:PICTURES]

    rows = [spread(reports["phase1"].originals)] + [spread(reports[p].reconstructions) for p in PHASES]
    labels = ["original"] + [
        f"{p}: {reports[p].psnr_db:.2f} dB, SSIM {reports[p].ssim:.3f} (mean of {len(reports[p].per_image)})"
        for p in PHASES
    ]
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
    parser.add_argument("runs", type=Path, help="folder with phase0 ... phase3")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="folders or shards")
    parser.add_argument("--pages", type=Path, default=Path("docs/mini"), help="report folder (docs/mini)")
    parser.add_argument("--name", default="mini", help="name of the bundled checkpoint (mini)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(bundle(arguments.runs, arguments.validation, arguments.pages, arguments.name), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
