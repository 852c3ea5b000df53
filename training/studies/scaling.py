"""Report of a sweep: a table of its points, straight-line fits, and plots."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from training.evaluation.feature_networks import EfficientNetFeatures
from training.output.figures import save_figure
from training.output.files import write_atomically, write_json
from training.phases.trainer import device_name

METRICS = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "perceptual": "perceptual distance",
    EfficientNetFeatures.column: EfficientNetFeatures.title,
}
Axis = Literal["width", "layers"]
AXES: tuple[Axis, ...] = ("width", "layers")


@dataclass(frozen=True)
class SweepPoint:
    """One trained size.

    Attributes:
        num_layers, hidden_width, seed: what was trained.
        num_parameters: of the fusion.
        figures: validation means by metric.
        training_seconds: wall time.
    """

    num_layers: int
    hidden_width: int
    seed: int
    num_parameters: int
    figures: dict[str, float]
    training_seconds: int


@dataclass(frozen=True)
class LineFit:
    """Least squares ``y = slope x + intercept``.

    Attributes:
        slope, intercept: of the line.
        slope_error: standard error of the slope; None for fewer than three points.
        r_squared: share of the variance of y that the line explains; None where y does not vary.
        num_points: how many points were fitted.
    """

    slope: float
    intercept: float
    slope_error: float | None
    r_squared: float | None
    num_points: int


def fit_line(x: Sequence[float], y: Sequence[float]) -> LineFit:
    """Fit a straight line by least squares.

    Raises:
        ValueError: fewer than two different x.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    spread = float(((xs - xs.mean()) ** 2).sum())
    if spread == 0:
        raise ValueError("a line needs two different x")
    slope = float(((xs - xs.mean()) * (ys - ys.mean())).sum()) / spread
    intercept = float(ys.mean() - slope * xs.mean())
    residual = float(((ys - slope * xs - intercept) ** 2).sum())
    total = float(((ys - ys.mean()) ** 2).sum())
    num_points = len(xs)
    error = float(np.sqrt(residual / (num_points - 2) / spread)) if num_points > 2 else None
    return LineFit(slope, intercept, error, 1 - residual / total if total > 0 else None, num_points)


@dataclass(frozen=True)
class Scaling:
    """The points by axis, with what is fitted to them.

    Attributes:
        widths, layers: points along each axis, in order; trained with the sweep's seed.
        repeats: the point where the axes cross, with every seed.
        fits: by axis and metric: over log10(parameters) for widths, over the layer count for layers.
        deviations: by metric, sample deviation over the repeats; None with fewer than two.
    """

    widths: list[SweepPoint]
    layers: list[SweepPoint]
    repeats: list[SweepPoint]
    fits: dict[Axis, dict[str, LineFit]]
    deviations: dict[str, float] | None


def fit_scaling(points: Sequence[SweepPoint], centre: SweepPoint) -> Scaling:
    """Sort the points to the two axes that cross at ``centre``, and fit a line to every metric along each."""
    own = [point for point in points if point.seed == centre.seed]
    widths = [point for point in own if point.num_layers == centre.num_layers]
    layers = [point for point in own if point.hidden_width == centre.hidden_width]
    widths.sort(key=lambda point: point.hidden_width)
    layers.sort(key=lambda point: point.num_layers)
    repeats = [point for point in points if point.num_layers == centre.num_layers]
    repeats = [point for point in repeats if point.hidden_width == centre.hidden_width]
    fits: dict[Axis, dict[str, LineFit]] = {"width": {}, "layers": {}}
    for metric in centre.figures:
        sizes = [math.log10(point.num_parameters) for point in widths]
        fits["width"][metric] = fit_line(sizes, [point.figures[metric] for point in widths])
        counts = [float(point.num_layers) for point in layers]
        fits["layers"][metric] = fit_line(counts, [point.figures[metric] for point in layers])
    deviations = None
    if len(repeats) > 1:
        deviations = {
            metric: float(np.std([point.figures[metric] for point in repeats], ddof=1))
            for metric in centre.figures
        }
    return Scaling(widths, layers, repeats, fits, deviations)


def write_report(
    output: Path,
    points: Sequence[SweepPoint],
    centre: SweepPoint,
    baseline: dict[str, float],
    recipe: dict[str, Any],
) -> None:
    """Write ``sweep.csv``, ``sweep.json``, ``sweep.md`` and ``sweep.png``.

    Args:
        output: directory of the sweep.
        points: all of them, repeats with other seeds included.
        centre: the point where the axes cross.
        baseline: figures of the tokenizer without fusion.
        recipe: what every point was trained by.
    """
    scaling = fit_scaling(points, centre)
    write_atomically(output / "sweep.csv", _table(points))
    summary = {
        "baseline": baseline,
        "points": [asdict(point) for point in points],
        "fits": {
            axis: {metric: asdict(fit) for metric, fit in fits.items()} for axis, fits in scaling.fits.items()
        },
        "seed_deviations": scaling.deviations,
        "num_seeds": len(scaling.repeats),
        "device": f"{device_name(recipe['device'])}; torch {torch.__version__}",
        "recipe": recipe,
    }
    write_json(output / "sweep.json", summary)
    write_atomically(output / "sweep.md", _markdown(points, scaling, baseline))
    save_figure(_draw(scaling, baseline), output / "sweep.png")


def _table(points: Sequence[SweepPoint]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    metrics = list(points[0].figures)
    writer.writerow(["num_layers", "hidden_width", "seed", "num_parameters", *metrics, "training_seconds"])
    for point in points:
        size = (point.num_layers, point.hidden_width, point.seed, point.num_parameters)
        figures = [f"{point.figures[metric]:.6g}" for metric in metrics]
        writer.writerow([*size, *figures, point.training_seconds])
    return stream.getvalue()


def _markdown(points: Sequence[SweepPoint], scaling: Scaling, baseline: dict[str, float]) -> str:
    metrics = list(baseline)
    titles = " | ".join(METRICS.get(metric, metric) for metric in metrics)
    rule = "|---|---|---|---|" + "---|" * len(metrics)
    lines = [f"| layers | width | seed | parameters | {titles} |", rule]
    lines.append(f"| no fusion | | | 0 | {_cells(baseline, metrics)} |")
    for point in points:
        size = f"{point.num_layers} | {point.hidden_width} | {point.seed} | {point.num_parameters:,}"
        lines.append(f"| {size} | {_cells(point.figures, metrics)} |")
    lines += ["", "| metric | per tenfold parameters (width) | R² | per layer | R² | deviation over seeds |"]
    lines.append("|---|---|---|---|---|---|")
    for metric in metrics:
        cells = [METRICS.get(metric, metric)]
        for axis in AXES:
            fit = scaling.fits[axis][metric]
            error = "" if fit.slope_error is None else f" ± {fit.slope_error:.2g}"
            r_squared = "-" if fit.r_squared is None else f"{fit.r_squared:.2f}"
            cells += [f"{fit.slope:+.3g}{error}", r_squared]
        deviation = "-" if scaling.deviations is None else f"{scaling.deviations[metric]:.2g}"
        lines.append(f"| {' | '.join([*cells, f'{deviation} ({len(scaling.repeats)})'])} |")
    return "\n".join(lines) + "\n"


def _cells(figures: dict[str, float], metrics: Sequence[str]) -> str:
    return " | ".join(f"{figures[metric]:.4f}" for metric in metrics)


def _draw(scaling: Scaling, baseline: dict[str, float]) -> Figure:
    """One row a metric: against parameters (logarithmic) on the left, against layers on the right."""
    figure, axes = plt.subplots(
        len(baseline), 2, figsize=(9, 2.7 * len(baseline)), layout="constrained", squeeze=False
    )
    for row, metric in enumerate(baseline):
        left, right = axes[row]
        sizes = [float(point.num_parameters) for point in scaling.widths]
        left.set_xscale("log")
        _draw_axis(left, sizes, scaling, "width", metric)
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set(
            xlim=(min(sizes) / 1.5, max(sizes) * 1.8),
            xlabel="fusion parameters",
            ylabel=METRICS.get(metric, metric),
        )
        _draw_axis(right, [float(p.num_layers) for p in scaling.layers], scaling, "layers", metric)
        right.set(xlabel="fused layers")
    return figure


def _draw_axis(axes: Axes, x: list[float], scaling: Scaling, axis: Axis, metric: str) -> None:
    points = scaling.widths if axis == "width" else scaling.layers
    fit = scaling.fits[axis][metric]
    deviation = scaling.deviations[metric] if scaling.deviations else None
    errors = None if deviation is None else [deviation] * len(points)
    axes.errorbar(x, [p.figures[metric] for p in points], yerr=errors, fmt="o", capsize=3)
    line = np.linspace(min(x), max(x), 50)
    fitted = np.log10(line) if axis == "width" else line
    r_squared = "" if fit.r_squared is None else f", R² {fit.r_squared:.2f}"
    unit = "log10(parameters)" if axis == "width" else "layers"
    axes.plot(line, fit.slope * fitted + fit.intercept, "--", color="gray")
    axes.set_title(f"{fit.slope:+.3g} {unit}{r_squared}", fontsize=9)
    for point, place in zip(points, x, strict=True):
        name = f"h {point.hidden_width}" if axis == "width" else f"{point.num_layers}"
        axes.annotate(name, (place, point.figures[metric]), (3, 4), textcoords="offset points", fontsize=7)
    axes.grid(alpha=0.3)
