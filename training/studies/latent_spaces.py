"""The paper's test of a latent space (its Table 3): loss curves of one generator on several spaces.

``python -m training.studies.latent_spaces base=RUN enriched=RUN replaced=RUN --output curves.png``

The runs are ``drorae train generator`` with one recipe, but for ``latent`` and ``correction``. Every space is
normalised to unit variance per position, so that losses compare.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib import pyplot as plt

from training.errors import DataError
from training.output.figures import save_figure
from training.output.tables import read_table

SMOOTHING = 0.9  # of the training loss, per logged row


def read_losses(run: Path, table: str) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's table.

    Raises:
        DataError: there are none.
    """
    rows = [row for row in read_table(run / table).rows if row.get("loss")]
    if not rows:
        raise DataError(f"{run / table}: holds no losses of a generator")
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]


def smoothed(values: list[float], decay: float = SMOOTHING) -> list[float]:
    """Exponential moving average, without its bias towards zero at the start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        result.append(mean / weight)
    return result


def plot_losses(runs: Mapping[str, Path], file: Path) -> dict[str, dict[str, float]]:
    """Write the figure; gives the last losses by space."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    last: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        steps, losses = read_losses(run, "train.csv")
        left.plot(steps, smoothed(losses), label=name)
        validated, figures = read_losses(run, "validation.csv")
        right.plot(validated, figures, marker=".", label=name)
        last[name] = {"training": smoothed(losses)[-1], "validation": figures[-1], "best": min(figures)}
    for axis, title in ((left, "training, smoothed"), (right, "validation, averaged weights")):
        axis.set(title=title, xlabel="step", ylabel="diffusion loss")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    save_figure(figure, file)
    return last


def main() -> None:
    """Command line; prints JSON."""
    parser = argparse.ArgumentParser(description="Loss curves of generators on several latent spaces.")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name and a run directory")
    parser.add_argument("--output", type=Path, required=True, help="the figure, PNG")
    arguments = parser.parse_args()
    runs = {name: Path(run) for name, _, run in (item.partition("=") for item in arguments.runs)}
    print(json.dumps(plot_losses(runs, arguments.output), indent=2))  # noqa: T201 - its own output


if __name__ == "__main__":
    main()
