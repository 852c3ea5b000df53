"""The paper's ablations in the linear readout: minutes where phase 2 through a decoder takes hours.

``python -m training.studies.ablations --checkpoint DIR --train PATH... --validation PATH... --output DIR``

Every variant is the same short fit of a new fusion on the same tokens under the same frozen linear decoder
(`training.phases.fusion_start`); ``joint`` trains that decoder along, as joint training does. What counts
is the PSNR of the readout, refitted to the variant's latents, on photos that no fit has seen.

Shape legend: L layers, C width, T tokens, P patch values (3 p^2).
"""

import argparse
import copy
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kernels.reference import token_norm
from model.config import FusionConfig
from model.networks.fusion import Fusion
from model.tokenizer import Tokenizer
from training.data.sources import list_samples
from training.evaluation.readout import PENALTY, Ridge
from training.output.figures import save_figure
from training.output.files import write_atomically, write_json
from training.phases.fusion_start import TokenSet, base_decoder, collect_tokens, fit_fusion, fuse_tokens
from training.recipes.recipe import FusionStartConfig
from training.studies.scaling import LineFit, fit_line

logger = logging.getLogger(__name__)

CHUNK = 4096
SEED = 0
FAMILIES = {"per_log10_parameters": "width", "per_layer": "layers"}
AXIS_LABELS = {"width": "log10 of the fusion's parameters", "layers": "layers fused"}


@dataclass(frozen=True)
class Variant:
    """One row: a fusion, and whether the linear decoder is trained along."""

    name: str
    fusion: FusionConfig
    is_joint: bool = False


@dataclass(frozen=True)
class Result:
    """Figures of a variant on the validation photos.

    Attributes:
        readout_db: mean PSNR per photo of the readout refitted to its latents.
        decoder_db: of the linear decoder that it was trained with.
        cosine: mean of cos(z_final, z_base).
        num_layers, num_parameters: of the fusion.
    """

    name: str
    readout_db: float
    decoder_db: float
    cosine: float
    num_layers: int
    num_parameters: int


def variants(centre: FusionConfig) -> Iterator[Variant]:
    """Routing and correction (Table 3), joint training, widths and layers (Tables 8 and 9)."""

    def changed(**fields: Any) -> FusionConfig:
        return centre.model_copy(update=fields)

    for correction in ("incremental", "replace"):
        for routing in ("energy", "softmax"):
            yield Variant(f"{routing}, {correction}", changed(routing=routing, correction=correction))
    yield Variant("cross-attention", changed(mixer="cross_attention"))
    yield Variant("joint with the decoder", centre, is_joint=True)
    for width in (24, 96, 1536):
        yield Variant(f"width {width}", changed(hidden_width=width))
    for count in (1, 3, 6, 9):
        if count < centre.num_layers:
            yield Variant(f"layers {count}", changed(num_layers=count))


def run_variant(
    variant: Variant,
    tokenizer: Tokenizer,
    base_readout: nn.Linear,
    train: TokenSet,
    validation: TokenSet,
    config: FusionStartConfig,
    precision: str,
) -> Result:
    """Fit one variant under a copy of the linear decoder of base latents, and read its latents."""
    torch.manual_seed(SEED)
    fusion = Fusion(variant.fusion, tokenizer.config.encoder)
    eps = tokenizer.config.encoder.layer_norm_eps
    decoder = copy.deepcopy(base_readout).requires_grad_(variant.is_joint)
    generator = torch.Generator().manual_seed(SEED)
    fit_fusion(fusion, train, decoder, config, generator, precision)
    ridge = Ridge(train.states.shape[-1], train.patches.shape[-1])
    for latents, patches in zip(_latents(fusion, train), train.patches.split(CHUNK), strict=True):
        ridge.add(latents, patches)
    refitted = ridge.solve(PENALTY * ridge.num_rows)
    found = torch.cat(list(_latents(fusion, validation)))
    base = token_norm(validation.states[:, -1].float(), eps)
    with torch.no_grad():
        return Result(
            variant.name,
            readout_db=_mean_psnr(tokenizer, refitted(found), validation.patches),
            decoder_db=_mean_psnr(tokenizer, decoder(found), validation.patches),
            cosine=F.cosine_similarity(found, base, dim=-1).mean().item(),
            num_layers=variant.fusion.num_layers,
            num_parameters=sum(p.numel() for p in fusion.parameters()),
        )


@torch.no_grad()
def _latents(fusion: Fusion, tokens: TokenSet) -> Iterator[Tensor]:
    for states in tokens.states.split(CHUNK):
        yield fuse_tokens(fusion, states)


def _mean_psnr(tokenizer: Tokenizer, found: Tensor, wanted: Tensor) -> float:
    """Over photos; patches [T, P] as the decoder's last layer gives them."""
    decoder = tokenizer.decoder
    per_photo = (-1, decoder.grid**2, found.shape[-1])
    total = []
    for a, b in zip(found.view(per_photo).split(16), wanted.view(per_photo).split(16), strict=True):
        pixels, originals = (decoder.to_pixels(part.float()) for part in (a, b))
        error = (pixels.clamp(0, 1) - originals).square().flatten(1).mean(dim=1)
        total.append(-10 * error.log10())
    return torch.cat(total).mean().item()


def base_figures(
    tokenizer: Tokenizer, base_readout: nn.Linear, train: TokenSet, validation: TokenSet
) -> dict[str, float]:
    """The readouts that bound a fusion: of base latents, and of all layers side by side."""
    eps = tokenizer.config.encoder.layer_norm_eps
    latents = token_norm(validation.states[:, -1].float(), eps)
    num_layers, width = train.states.shape[1:]
    ridge = Ridge(num_layers * width, train.patches.shape[-1], torch.float32)
    for states, patches in zip(train.states.split(CHUNK), train.patches.split(CHUNK), strict=True):
        ridge.add(token_norm(states.float(), eps).flatten(1), patches)
    fit = ridge.solve(PENALTY * ridge.num_rows)
    parts = (fit(token_norm(s.float(), eps).flatten(1)) for s in validation.states.split(CHUNK))
    return {
        "base_db": _mean_psnr(tokenizer, base_readout(latents), validation.patches),
        "all_layers_db": _mean_psnr(tokenizer, torch.cat(list(parts)), validation.patches),
    }


def scaling(results: Sequence[Result], centre: Result) -> dict[str, LineFit]:
    """Straight lines of the readout through the widths over log10(parameters), and through the layers."""
    points = {name: _points(results, kind, centre) for name, kind in FAMILIES.items()}
    return {name: fit_line(*zip(*found, strict=True)) for name, found in points.items()}


def _points(results: Sequence[Result], kind: str, centre: Result) -> list[tuple[float, float]]:
    """(x, readout in dB) of the variants that differ from the centre in ``kind`` alone, and of the centre."""
    family = [result for result in results if result.name.startswith(f"{kind} ")] + [centre]
    if kind == "width":
        return [(math.log10(result.num_parameters), result.readout_db) for result in family]
    return [(float(result.num_layers), result.readout_db) for result in family]


def draw_scaling(results: Sequence[Result], centre: Result, base_db: float) -> Figure:
    """Readouts over the fusion's parameters and over its layers, with their lines."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for place, (name, kind) in zip(axes, FAMILIES.items(), strict=True):
        x, y = zip(*sorted(_points(results, kind, centre)), strict=True)
        line = scaling(results, centre)[name]
        place.plot(x, y, "o")
        place.plot(x, [line.slope * value + line.intercept for value in x], linewidth=1)
        place.axhline(base_db, color="grey", linestyle=":", linewidth=1)
        place.set(xlabel=AXIS_LABELS[kind], title=f"{line.slope:+.2f} dB, R² {line.r_squared or 0:.2f}")
        place.grid(alpha=0.3)
    axes[0].set_ylabel("readout, dB (dotted: base)")
    return figure


def markdown(summary: dict[str, Any]) -> str:
    """The table of `main`'s summary."""
    base = summary["base_db"]
    lines = [
        "| variant | parameters | readout, dB | over base | own linear decoder, dB | cos(z_final, z_base) |",
        "|---|---|---|---|---|---|",
        f"| base latents | | {base:.2f} | | | 1 |",
    ]
    for row in summary["variants"]:
        lines.append(
            f"| {row['name']} | {row['num_parameters']:,} | {row['readout_db']:.2f} "
            f"| {row['readout_db'] - base:+.2f} | {row['decoder_db']:.2f} | {row['cosine']:.3f} |"
        )
    lines.append(f"| all layers side by side | | {summary['all_layers_db']:.2f} | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line of the ablations; writes ablations.json, ablations.md and scaling.png."""
    parser = argparse.ArgumentParser(description="Ablations of the fusion in the linear readout.")
    parser.add_argument("--checkpoint", required=True, help="tokenizer checkpoint; its encoder is used")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="folders or shards to fit on")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="folders or shards")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=300, help="of each fit (default 300)")
    parser.add_argument("--images", type=int, default=400, help="to fit on (default 400)")
    parser.add_argument("--precision", default="auto", help="of the fits: auto, float32 or bfloat16")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    tokenizer = Tokenizer.load(arguments.checkpoint, fusion="reference")
    centre = tokenizer.config.fusion or FusionConfig().fitted(tokenizer.config.encoder)
    config = FusionStartConfig(num_images=arguments.images, num_steps=arguments.steps, learning_rate=2e-3)
    train = collect_tokens(tokenizer, list_samples(arguments.train), config.num_images, arguments.precision)
    validation = collect_tokens(tokenizer, list_samples(arguments.validation), None, arguments.precision)
    base_readout = base_decoder(train, tokenizer.config.encoder.layer_norm_eps)
    results = []
    for variant in variants(centre):
        results.append(
            run_variant(variant, tokenizer, base_readout, train, validation, config, arguments.precision)
        )
        logger.info("%s", results[-1])
    bounds = base_figures(tokenizer, base_readout, train, validation)
    summary = {
        **bounds,
        "variants": [asdict(result) for result in results],
        "scaling": {name: asdict(line) for name, line in scaling(results, results[0]).items()},
        "fit": config.model_dump(),
    }
    write_json(arguments.output / "ablations.json", summary)
    write_atomically(arguments.output / "ablations.md", markdown(summary))
    figure = draw_scaling(results, results[0], bounds["base_db"])
    save_figure(figure, arguments.output / "scaling.png")
    print(json.dumps(summary["scaling"], indent=2))  # noqa: T201 - the command's own output


if __name__ == "__main__":
    main()
