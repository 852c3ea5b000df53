"""The numbers of an analysis, as ``analysis.json`` holds them."""

from typing import Any

from torch import Tensor

from model.tokenizer import Tokenizer
from training.evaluation.histograms import Histogram, principal_components
from training.studies.measurements import Analysis
from training.studies.spectra import band_centres

NUM_COMPONENTS = 10
NO_FUSION = "the checkpoint has no fusion"
NO_ROUTER = "the cross_attention mixer has no router"
DEFINITIONS = {
    "spectra": (
        "log(1 + |FFT|) of pixels in 0 ... 255 of the reconstruction less that of the original, mean of RGB; "
        "mean_absolute_deviation: of the map averaged over images; radial_profile: mean of that map by band"
    ),
    "spectra.base": "z_base through the analyzed checkpoint's decoder",
    "spectra.base_checkpoint": "z_base through the base checkpoint's decoder, which was trained on it",
    "spectra.enriched": "z_final through the analyzed checkpoint's decoder",
    "router": (
        "weights w over all tokens; unit: w / |w|, on which alone the latent depends; "
        "negative_share: of tokens; energy_share: mean of w_k^2 / |w|^2"
    ),
    "components": "principal components over all tokens, one basis a latent; shares of its variance",
    "norms": "per token, in units of sqrt(C); the latents themselves leave LN_bb with 1, whatever was fused",
}


def summarize(analysis: Analysis) -> dict[str, Any]:
    """Figures, definitions, and why a part that does not apply is null."""
    fusion = analysis.tokenizer.config.fusion
    absent = {}
    if fusion is None:
        absent = dict.fromkeys(("spectra.enriched", "router", "z_fuse", "z_final", "cosines"), NO_FUSION)
    elif analysis.router is None:
        absent = {"router": NO_ROUTER}
    return {
        "checkpoint": _identity(analysis.tokenizer),
        "base_checkpoint": _identity(analysis.base) if analysis.base else None,
        "num_images": analysis.num_images,
        "num_broken_images": analysis.num_broken,
        "definitions": DEFINITIONS,
        "not_applicable": absent,
        "spectra": _spectra(analysis),
        "router": _router(analysis),
        "components": _components(analysis),
        "cosines": {name: _distribution(values) for name, values in analysis.angles.items()} or None,
        "norms": {name: _distribution(values) for name, values in analysis.norms.items()},
    }


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that the command prints."""
    spectra, router = summary["spectra"]["reconstructions"], summary["router"]
    return {
        "num_images": summary["num_images"],
        "spectrum_deviation": {name: part["mean_absolute_deviation"] for name, part in spectra.items()},
        "psnr_db": {name: part["psnr_db"] for name, part in spectra.items()},
        "router_unit_mean": router and {row["layer"]: row["unit_mean"] for row in router},
        "cosines": summary["cosines"] and {name: part["mean"] for name, part in summary["cosines"].items()},
        "not_applicable": summary["not_applicable"],
    }


def _identity(tokenizer: Tokenizer) -> dict[str, Any]:
    fusion = tokenizer.config.fusion
    return {
        "name": tokenizer.config.name,
        "sha256": tokenizer.checkpoint.sha256 if tokenizer.checkpoint else None,
        "beta": fusion.beta if fusion else None,
        "fused_layers": list(tokenizer.config.fused_layers),
    }


def _spectra(analysis: Analysis) -> dict[str, Any]:
    return {
        "band_centres_cycles_per_pixel": _rounded(band_centres()),
        "reconstructions": {
            name: {
                "mean_absolute_deviation": _round(difference.deviation),
                "mean_absolute_deviation_per_image": _round(difference.deviation_per_image),
                "mean_deviation": _round(float(difference.map.mean())),
                "psnr_db": _round(difference.psnr_db),
                "radial_profile": _rounded(difference.profile()),
            }
            for name, difference in analysis.spectra.items()
        },
    }


def _router(analysis: Analysis) -> list[dict[str, Any]] | None:
    router, unit = analysis.router, analysis.router_unit
    if router is None or unit is None:
        return None
    columns = {
        "mean": router.mean,
        "std": router.std,
        "minimum": router.minimum,
        "maximum": router.maximum,
        "negative_share": router.negative_share,
        "unit_mean": unit.mean,
        "unit_std": unit.std,
        "energy_share": unit.mean.square() + unit.std.square(),
    }
    return [
        {"layer": layer, **{name: _round(float(values[index])) for name, values in columns.items()}}
        for index, layer in enumerate(analysis.tokenizer.config.fused_layers)
    ]


def _components(analysis: Analysis) -> dict[str, Any]:
    parts = {}
    for name, moments in analysis.components.items():
        components = principal_components(moments)
        parts[name] = {
            "explained_variance_ratio": _rounded(components.explained_ratio[:NUM_COMPONENTS]),
            "explained_by_first_three": _round(float(components.explained_ratio[:3].sum())),
            "participation_ratio": _round(components.participation_ratio),
        }
    return parts


def _distribution(histogram: Histogram) -> dict[str, Any]:
    moments = histogram.moments
    return {
        "mean": _round(float(moments.mean)),
        "std": _round(float(moments.std)),
        "minimum": _round(float(moments.minimum)),
        "p5": _round(histogram.quantile(0.05)),
        "median": _round(histogram.quantile(0.5)),
        "p95": _round(histogram.quantile(0.95)),
        "maximum": _round(float(moments.maximum)),
    }


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _rounded(values: Tensor) -> list[float]:
    return [_round(value) for value in values.tolist()]
