"""The pictures of a generator's card: its loss over the training, and samples of every class.

``python -m training.studies.generator_card RUN --samples FOLDER --output docs/mini/generator --index FILE``

The samples are a folder of ``drorae generate``, CLASS/NUMBER.png.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

from model.generator import Generator
from model.images.tensors import to_tensor
from training.errors import DataError
from training.output.figures import save_figure
from training.output.grids import reconstruction_grid, save_image
from training.studies.latent_spaces import read_losses, smoothed

COLUMNS = 8
SIDE = 128  # pixels of a sample in the grid


def class_row(folder: Path, count: int) -> Tensor:
    """The first samples of a class, [count, 3, S, S] in [0, 1].

    Raises:
        DataError: there are fewer.
    """
    files = sorted(folder.glob("*.png"))[:count]
    if len(files) < count:
        raise DataError(f"{folder}: holds {len(files)} samples, and {count} are shown")
    return torch.stack([_read(file) for file in files])


def draw_samples(samples: Path, names: Sequence[str], file: Path, columns: int = COLUMNS) -> None:
    """One row per class, in the order of the labels."""
    rows = [class_row(samples / name.replace("/", "_"), columns) for name in names]
    save_image(reconstruction_grid(rows, names), file)


def plot_training(run: Path, file: Path) -> None:
    """Loss of the training, smoothed, and of the averaged weights on validation images, by steps."""
    figure, axes = plt.subplots(figsize=(7, 4))
    steps, losses = read_losses(run, "train.csv")
    axes.plot(steps, smoothed(losses), label="training, smoothed")
    axes.plot(*read_losses(run, "validation.csv"), marker=".", label="validation, averaged weights")
    axes.set(xlabel="step", ylabel="diffusion loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, file)


def write_index(generator: Generator, file: Path) -> None:
    """What the page's second tab offers: the classes, and the tokenizer whose latents they are."""
    trained_on = generator.trained_on
    index = {"checkpoint_sha256": trained_on.tokenizer_sha256, "classes": list(trained_on.class_names)}
    file.write_text(json.dumps(index, indent=2) + "\n")


def _read(file: Path) -> Tensor:
    with Image.open(file) as picture:
        small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return to_tensor(small)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of a generator's card.")
    parser.add_argument("run", type=Path, help="run directory of drorae train generator, finished")
    parser.add_argument("--samples", type=Path, required=True, help="folder of drorae generate")
    parser.add_argument("--output", type=Path, required=True, help="folder of curve.png and samples.jpg")
    parser.add_argument("--index", type=Path, help="write what the page's second tab offers, index.json")
    arguments = parser.parse_args()
    generator = Generator.load(arguments.run / "checkpoint")
    draw_samples(arguments.samples, generator.trained_on.class_names, arguments.output / "samples.jpg")
    plot_training(arguments.run, arguments.output / "curve.png")
    if arguments.index is not None:
        write_index(generator, arguments.index)


if __name__ == "__main__":
    main()
