"""The figures of an analysis, as PNG.

Shape legend: N tokens, C latent width, L fused layers, h w latent grid, S image side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from training.evaluation.histograms import Histogram, principal_components
from training.output.figures import save_figure
from training.studies.measurements import Analysis
from training.studies.spectra import band_centres

TILE_INCHES = 0.95
DIVERGING = "RdBu_r"
BINS_PER_BAR = 10
LABELS = {
    "base": "base latents",
    "base_checkpoint": "base, by its own decoder",
    "enriched": "enriched latents",
}


def draw_figures(analysis: Analysis, output: Path) -> list[str]:
    """Write every figure that applies under ``output``; gives the files' names."""
    drawings: dict[str, Callable[[Analysis], Figure]] = {"spectra.png": draw_spectra}
    if analysis.router is not None:
        drawings |= {"router_maps.png": draw_router_maps, "router_layers.png": draw_router_layers}
    drawings["components.png"] = draw_components
    drawings["tokens.png"] = draw_tokens
    for name, draw in drawings.items():
        # A map of noise does not compress: fewer pixels keep it fit for a repository.
        save_figure(draw(analysis), output / name, dpi=80 if name == "spectra.png" else 100)
    return list(drawings)


def draw_spectra(analysis: Analysis) -> Figure:
    """Difference maps on one scale, and their radial profiles."""
    parts = analysis.spectra
    limit = max(float(torch.quantile(part.map.abs().flatten()[::7], 0.995)) for part in parts.values())
    figure, axes = plt.subplots(
        1, len(parts) + 1, figsize=(2.7 * len(parts) + 3.6, 3.2), layout="constrained", squeeze=False
    )
    maps = list(axes[0, :-1])
    for place, (name, part) in zip(maps, parts.items(), strict=True):
        shown = place.imshow(
            part.map.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, extent=(-0.5, 0.5, 0.5, -0.5)
        )
        place.set_title(f"{LABELS[name]}\nmean |deviation| {part.deviation:.3f}", fontsize=9)
        place.set(xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5])
        place.tick_params(labelsize=7)
    figure.colorbar(shown, ax=maps, shrink=0.8, label="log |FFT| less the original's")
    profile = axes[0, -1]
    for name, part in parts.items():
        profile.plot(band_centres().numpy(), part.profile().numpy(), label=LABELS[name], marker=".")
    profile.axhline(0, color="black", linewidth=0.8)
    profile.set(xlabel="cycles per pixel", ylabel="mean difference")
    profile.legend(fontsize=7)
    profile.grid(alpha=0.3)
    return figure


def draw_router_maps(analysis: Analysis) -> Figure:
    """Router weights ``w / |w|`` of each fused layer over a few photos; one colour scale for all."""
    layers = analysis.tokenizer.config.fused_layers
    maps = [
        _grid(analysis, F.normalize(p.router_weights, dim=-1))
        for p in analysis.shown
        if p.router_weights is not None
    ]
    limit = float(np.quantile(np.abs(np.stack(maps)), 0.995))
    figure, axes = _tiles(len(maps), len(layers) + 1)
    for row, (pictures, weights_hwL) in enumerate(zip(analysis.shown, maps, strict=True)):
        axes[row, 0].imshow(_photo(pictures.image))
        for index, layer in enumerate(layers):
            shown = axes[row, index + 1].imshow(
                weights_hwL[..., index], cmap=DIVERGING, vmin=-limit, vmax=limit
            )
            if row == 0:
                axes[row, index + 1].set_title(f"L{layer}", fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.01, label="router weight, w / |w|")
    return figure


def draw_router_layers(analysis: Analysis) -> Figure:
    """Mean, spread and sign of each layer's router weights over all tokens."""
    router, unit = analysis.router, analysis.router_unit
    assert router is not None
    assert unit is not None
    names = [f"L{layer}" for layer in analysis.tokenizer.config.fused_layers]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.0), layout="constrained")
    mean = unit.mean.numpy()
    colours = ["tab:red" if value >= 0 else "tab:blue" for value in mean]
    left.bar(names, mean, yerr=unit.std.numpy(), color=colours, ecolor="gray", capsize=2)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(ylabel="w / |w|, mean and deviation")
    right.bar(names, router.negative_share.numpy(), color="tab:blue")
    right.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    right.set(ylabel="share of negative weights", ylim=(0, 1))
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    return figure


def draw_components(analysis: Analysis) -> Figure:
    """First three principal components as red, green and blue; each latent's basis is that of all photos."""
    figure, axes = _tiles(len(analysis.components) + 1, len(analysis.shown), label_inches=1.1)
    axes[0, 0].set_ylabel("photo", fontsize=8)
    for column, pictures in enumerate(analysis.shown):
        axes[0, column].imshow(_photo(pictures.image))
    for row, (name, moments) in enumerate(analysis.components.items(), start=1):
        components = principal_components(moments)
        projected = [
            _grid(analysis, components.project(pictures.tokens[name], 3)) for pictures in analysis.shown
        ]
        low, high = np.quantile(np.stack(projected), (0.01, 0.99), axis=(0, 1, 2))
        for column, colours in enumerate(projected):
            scaled = (colours - low) / np.maximum(high - low, 1e-12)
            axes[row, column].imshow(scaled.clip(0, 1))
        shares = ", ".join(f"{share:.0%}" for share in components.explained_ratio[:3].tolist())
        axes[row, 0].set_ylabel(f"{name}\n{shares}", fontsize=8)
    return figure


def draw_tokens(analysis: Analysis) -> Figure:
    """Histograms per token: cosines with z_base, and norms."""
    panels = [p for p in (analysis.angles, analysis.norms) if p]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for place, histograms in zip(axes[0], panels, strict=True):
        for name, histogram in histograms.items():
            _draw_histogram(place, name, histogram)
        place.set_yscale("log")
        place.set(xlabel="cosine" if histograms is analysis.angles else "norm / sqrt(C)", ylabel="tokens")
        place.legend(fontsize=7)
        place.grid(alpha=0.3)
    return figure


def _draw_histogram(axes: Axes, name: str, histogram: Histogram) -> None:
    label = f"{name}, mean {float(histogram.moments.mean):.3f}"
    counts = histogram.counts.unflatten(0, (-1, BINS_PER_BAR)).sum(dim=1).numpy()
    axes.stairs(counts, histogram.edges[::BINS_PER_BAR].numpy(), label=label, fill=True, alpha=0.5)


def _tiles(num_rows: int, num_columns: int, label_inches: float = 0.4) -> tuple[Figure, npt.NDArray[Any]]:
    """A grid of square pictures without ticks."""
    size = (num_columns * TILE_INCHES + label_inches + 0.5, num_rows * TILE_INCHES + 0.3)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for place in axes.flat:
        place.set(xticks=[], yticks=[])
    return figure, axes


def _grid(analysis: Analysis, tokens: Tensor) -> npt.NDArray[Any]:
    """Values per token [N, K] on the latent grid, [h, w, K]."""
    rows, columns = analysis.tokenizer.config.latent_shape[1:]
    grid: npt.NDArray[Any] = tokens.unflatten(0, (rows, columns)).numpy()
    return grid


def _photo(image: Tensor) -> npt.NDArray[Any]:
    pixels: npt.NDArray[Any] = image.permute(1, 2, 0).clamp(0, 1).numpy()
    return pixels
