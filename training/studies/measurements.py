"""Measurements of a checkpoint over photos: spectra, router weights, latent moments, norms and cosines.

Every photo is encoded once; the parts that the tokenizer itself runs give the hidden states, z_base,
z_fuse, z_final and the router weights, by the fusion's definition.

Shape legend: B batch, N tokens, C latent width, L fused layers, S image side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernels.reference import correct, token_norm
from model.errors import CheckpointError
from model.tokenizer import Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import list_samples, spread_samples
from training.errors import DataError
from training.evaluation.histograms import ColumnMoments, Histogram
from training.evaluation.moments import FeatureMoments
from training.studies.spectra import SpectrumDifference, log_spectrum

NUM_SHOWN = 6
BATCH_SIZE = 16
NUM_BINS = 2000  # of 0.001: what the quantiles are exact to
# The same encoder stored in half precision differs from itself by 2^-11 of a value.
ENCODER_TOLERANCE = 2e-3
COSINES = ("cos(z_fuse, z_base)", "cos(z_final, z_base)")
NORMS = ("|z_base|", "|z_fuse|", "|z_final|", "|z_fuse - z_base|", "|z_final - z_base|")


@dataclass(frozen=True)
class Latents:
    """Latents of one batch of images.

    Attributes:
        tokens: by name, z_base and with a fusion also z_fuse and z_final, each [B, N, C].
        router_weights: w, [B, N, L]; None without a router.
    """

    tokens: dict[str, Tensor]
    router_weights: Tensor | None


@dataclass(frozen=True)
class Pictures:
    """One photo with its latents, for the figures.

    Attributes:
        image: [3, S, S] in [0, 1].
        tokens: by name, [N, C] each.
        router_weights: [N, L], or None.
    """

    image: Tensor
    tokens: dict[str, Tensor]
    router_weights: Tensor | None


class Analysis:
    """Everything that is gathered over the photos; `summarize` and `draw_figures` read it.

    Attributes:
        tokenizer, base: the checkpoint, and the one whose decoder also decodes z_base.
        spectra: by reconstruction: ``base``, ``base_checkpoint``, ``enriched``; those that apply.
        router: moments of each fused layer's weights w; None without a router.
        router_unit: the same of ``w / |w|``, as the energy normalisation leaves them.
        components: mean and covariance of each latent.
        angles: histograms of the cosines between latents, by name.
        norms: histograms of norms per token, in units of sqrt(C).
        shown: what the figures show of a few photos.
        num_broken: photos that could not be decoded.
    """

    def __init__(self, tokenizer: Tokenizer, base: Tokenizer | None) -> None:
        config = tokenizer.config
        self.tokenizer, self.base = tokenizer, base
        names = ["base", *(["base_checkpoint"] if base else []), *(["enriched"] if config.fusion else [])]
        self.spectra = {name: SpectrumDifference(config.image_size) for name in names}
        has_router = config.fusion is not None and config.fusion.mixer == "experts"
        num_layers = len(config.fused_layers)
        self.router = ColumnMoments(num_layers) if has_router else None
        self.router_unit = ColumnMoments(num_layers) if has_router else None
        latents = ("z_base", "z_fuse", "z_final") if config.fusion else ("z_base",)
        self.components = {name: FeatureMoments(config.encoder.width) for name in latents}
        self.angles = {name: Histogram(-1, 1, NUM_BINS) for name in COSINES if config.fusion}
        self.norms = {name: Histogram(0, 2, NUM_BINS) for name in (NORMS if config.fusion else NORMS[:1])}
        self.shown: list[Pictures] = []
        self.num_broken = 0

    @property
    def num_images(self) -> int:
        """Photos that were looked at."""
        return self.spectra["base"].num_images

    @torch.no_grad()
    def update(self, images: Tensor, shown: Sequence[int]) -> None:
        """Add images [B, 3, S, S] in [0, 1]; ``shown`` are those that the figures show."""
        latents = encode_all(self.tokenizer, images)
        self._update_spectra(images, latents.tokens)
        self._update_tokens(latents.tokens)
        weights = latents.router_weights
        if weights is not None and self.router is not None and self.router_unit is not None:
            self.router.update(weights.flatten(0, 1))
            self.router_unit.update(F.normalize(weights.double(), dim=-1).flatten(0, 1))
        for index in shown:
            tokens = {name: t[index].float().cpu() for name, t in latents.tokens.items()}
            router_weights = None if weights is None else weights[index].float().cpu()
            self.shown.append(Pictures(images[index].float().cpu(), tokens, router_weights))

    def _update_spectra(self, images: Tensor, tokens: dict[str, Tensor]) -> None:
        spectra = log_spectrum(images)
        for name, difference in self.spectra.items():
            decoder = (self.base or self.tokenizer) if name == "base_checkpoint" else self.tokenizer
            latent = tokens["z_final" if name == "enriched" else "z_base"]
            difference.update(decoder.decoder(latent).clamp(0, 1), images, spectra)

    def _update_tokens(self, tokens: dict[str, Tensor]) -> None:
        base = tokens["z_base"]
        scale = base.shape[-1] ** -0.5
        for name, moments in self.components.items():
            moments.update(tokens[name].flatten(0, -2))
            self.norms[f"|{name}|"].update(tokens[name].norm(dim=-1) * scale)
            if name != "z_base":
                self.angles[f"cos({name}, z_base)"].update(F.cosine_similarity(tokens[name], base, dim=-1))
                self.norms[f"|{name} - z_base|"].update((tokens[name] - base).norm(dim=-1) * scale)


def encode_all(tokenizer: Tokenizer, images: Tensor) -> Latents:
    """Every latent of images [B, 3, S, S] in [0, 1], by the fusion's definition."""
    hidden_states = tokenizer.encoder(tokenizer.preprocess(images))
    fusion = tokenizer.fusion
    if fusion is None:
        base = token_norm(hidden_states[-1], tokenizer.config.encoder.layer_norm_eps)
        return Latents({"z_base": base}, None)
    base, fused = fusion.base_and_fused(hidden_states)
    tokens = {"z_base": base, "z_fuse": fused, "z_final": correct(base, fused, fusion.spec)}
    has_router = fusion.config.mixer == "experts"
    return Latents(tokens, fusion.router_weights(hidden_states) if has_router else None)


def analyze(
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    base: Tokenizer | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Analysis:
    """Gather the analyses of a tokenizer over photos, centre-cropped to its size.

    Args:
        tokenizer: with a fusion or without.
        paths: folders or tar shards.
        base: a tokenizer of the same encoder whose decoder also decodes z_base, such as phase 1's.
        limit: how many photos to use, spread evenly over all; None for every one.
        batch_size: photos at once.
        progress: show a bar.

    Raises:
        CheckpointError: ``base`` has another encoder or image size.
        DataError: no photo could be decoded.
    """
    if base is not None:
        _check_same_encoder(tokenizer, base)
    samples = spread_samples(list_samples(paths), limit)
    shown = {id(sample) for sample in spread_samples(samples, NUM_SHOWN)}
    analysis = Analysis(tokenizer, base)
    with tqdm(total=len(samples), unit="image", desc="analyze", disable=not progress) as bar:
        for kept, batch in evaluation_batches(samples, tokenizer.config.image_size, batch_size):
            indices = [index for index, sample in enumerate(kept) if id(sample) in shown]
            analysis.update(batch.pixels(tokenizer.device), indices)
            analysis.num_broken += batch.num_broken
            bar.update(len(kept) + batch.num_broken)
    if analysis.num_images == 0:
        raise DataError(f"none of the {len(samples)} images could be decoded")
    return analysis


def _check_same_encoder(tokenizer: Tokenizer, base: Tokenizer) -> None:
    """Another encoder's latents mean nothing to the base checkpoint's decoder."""
    path = base.checkpoint.path if base.checkpoint else base.config.name
    for field in ("image_size", "encoder"):
        found, wanted = getattr(base.config, field), getattr(tokenizer.config, field)
        if found != wanted:
            raise CheckpointError(f"{path}: field {field!r} differs from the analyzed checkpoint's")
    expected = tokenizer.encoder.state_dict()
    for name, tensor in base.encoder.state_dict().items():
        difference = float((tensor - expected[name]).abs().amax())
        if difference > ENCODER_TOLERANCE * float(expected[name].abs().amax()):
            raise CheckpointError(
                f"{path}: encoder tensor {name!r} differs from the analyzed checkpoint's: its decoder "
                "was trained on other latents"
            )
