"""Matplotlib figures as PNG files, the same bytes on every run."""

import io
from pathlib import Path

import matplotlib as mpl

from training.output.files import write_atomically

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def save_figure(figure: Figure, file: Path, dpi: int = 100) -> None:
    """Write a PNG atomically and close the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    write_atomically(file, buffer.getvalue())
