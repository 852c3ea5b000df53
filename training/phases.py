"""Phases 1 to 3 and joint training: which parts of the tokenizer are trained, on which loss.

Phase 1 trains the decoder on z_base, phase 2 the fusion alone, phase 3 the decoder on z_final. What a
phase does not train is frozen, and a digest taken at the start is compared before anything is exported.

Shape legend: B batch, N tokens, C latent width, S image side.
"""

import copy
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from model.config import PRESETS, TokenizerConfig
from model.tokenizer import Tokenizer
from training.data import Batch, random_crop, training_batches
from training.discriminator import (
    Discriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    make_backbone,
)
from training.errors import RecipeError, TrainingError
from training.evaluate import evaluate_tokenizer
from training.initialization import initialize_decoder
from training.optimization import (
    Ema,
    autocast,
    clip_gradients,
    learning_rate_at,
    make_optimizer,
    resolve_device,
    set_learning_rate,
    step_generator,
)
from training.perceptual import make_perceptual
from training.pictures import reconstruction_grid, save_image
from training.recipe import PhaseRecipe
from training.statistics import latent_statistics
from training.trainer import Task

logger = logging.getLogger(__name__)

TRAINED_PARTS = {
    "phase1": frozenset({"decoder"}),
    "phase2": frozenset({"fusion"}),
    "phase3": frozenset({"decoder"}),
    "joint": frozenset({"fusion", "decoder"}),
}
GRID_IMAGES = 8


class ReconstructionTask(Task):
    """Trains parts of a tokenizer to reconstruct: L1, perceptual and adversarial loss."""

    def __init__(self, phase: str, recipe: PhaseRecipe) -> None:
        self.phase = phase
        self.recipe: PhaseRecipe = recipe
        self.device = resolve_device(recipe.device)
        _check_recipe(phase, recipe)
        torch.manual_seed(recipe.seed)
        self.tokenizer = _make_tokenizer(phase, recipe).to(self.device)
        if recipe.decoder_init == "ridge":
            generator = step_generator(recipe.seed, -1, torch.device("cpu"))
            initialize_decoder(self.tokenizer, recipe.data.train, recipe.noise_tau, generator)
        self.trained_parts = TRAINED_PARTS[phase] | ({"encoder"} if recipe.train_encoder else set())
        self._freeze()
        self.perceptual = make_perceptual(recipe.loss).to(self.device)
        self.discriminator = self._make_discriminator()
        self.optimizer = make_optimizer(self.tokenizer, recipe.optimizer)
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.heads.parameters(),
            lr=recipe.discriminator.learning_rate,
            betas=recipe.optimizer.betas,
            weight_decay=0.0,
        )
        self.ema = Ema(self.tokenizer, recipe.ema_decay)
        self.networks = {
            "perceptual": self.perceptual.name,
            "discriminator": self.discriminator.backbone.name,
        }
        self.recipe = _with_networks(recipe, self.networks)
        self.frozen_digests = self._digests()
        logger.info("%s trains %s; networks: %s", phase, ", ".join(sorted(self.trained_parts)), self.networks)

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        recipe = self.recipe
        transform = random_crop(recipe.data, self.tokenizer.config.image_size)
        per_step = recipe.accumulation_steps
        stream = training_batches(
            recipe.data, transform, recipe.batch_size // per_step, recipe.seed, start_step * per_step
        )
        while True:
            yield [next(stream) for _ in range(per_step)]

    def train_step(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        recipe = self.recipe
        generator = step_generator(recipe.seed, step, torch.device("cpu"))
        learning_rate = learning_rate_at(step, recipe.num_steps, recipe.optimizer)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, float] = {}
        pairs = []
        for batch in micro_batches:
            images = batch.pixels(self.device)
            reconstructions, losses = self._generator_losses(step, images, generator)
            (losses.pop("total") / len(micro_batches)).backward()
            pairs.append((images, reconstructions.detach()))
            for name, value in losses.items():
                figures[name] = figures.get(name, 0.0) + value.item() / len(micro_batches)
        figures["gradient_norm"] = clip_gradients(self.tokenizer, recipe.optimizer.clip_norm)
        self.optimizer.step()
        self.ema.update(step)
        figures["discriminator"] = self._train_discriminator(step, pairs, generator)
        figures["learning_rate"] = learning_rate
        return figures

    @torch.no_grad()
    def evaluate(self, step: int, directory: Path) -> dict[str, float]:
        """Validation PSNR and SSIM with averaged weights, and a grid of pictures."""
        with self.ema.applied():
            report = evaluate_tokenizer(
                self.tokenizer, self.recipe.data.validation, num_pictures=GRID_IMAGES, progress=False
            )
        rows = [report.originals, report.reconstructions]
        save_image(
            reconstruction_grid(rows, ["original", self.phase]), directory / "grids" / f"{step:06d}.png"
        )
        return {"psnr_db": report.psnr_db, "ssim": report.ssim}

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the checkpoint; tokenizers with fusion carry their latent statistics."""
        recipe = self.recipe
        with self.ema.applied():
            if self.tokenizer.fusion is not None:
                mean, var = latent_statistics(self.tokenizer, recipe.data.train)
                self.tokenizer.set_statistics(mean, var)
            provenance = {**provenance, "phase": self.phase, "frozen_sha256": self.frozen_digests}
            self.tokenizer.save(path, getattr(torch, recipe.storage_dtype), provenance)

    def check_invariants(self) -> None:
        """Raises if a frozen part is no longer what it was, bit for bit."""
        for part, digest in self._digests().items():
            if digest != self.frozen_digests[part]:
                raise TrainingError(f"{self.phase} changed the frozen {part}: nothing was exported")

    def state_dict(self) -> dict[str, Any]:
        return {
            "parts": {name: self._part(name).state_dict() for name in self.trained_parts},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.shadow,
            "heads": self.discriminator.heads.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "frozen_sha256": self.frozen_digests,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["frozen_sha256"] != self.frozen_digests:
            raise ValueError("the frozen parts are not those that the run began with")
        for name in self.trained_parts:
            self._part(name).load_state_dict(state["parts"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load(state["ema"])
        self.discriminator.heads.load_state_dict(state["heads"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _generator_losses(
        self, step: int, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights, recipe = self.recipe.loss, self.recipe
        with autocast(self.device, recipe.precision):
            tokens = self._add_noise(self.tokenizer.tokens(images), generator)
            reconstructions = self.tokenizer.decoder(tokens).float()
        l1 = (reconstructions - images).abs().mean()
        losses = {"l1": l1}
        total = weights.l1 * l1
        if weights.perceptual:
            losses["perceptual"] = self.perceptual(reconstructions, images, generator)
            total = total + weights.perceptual * losses["perceptual"]
        if weights.adversarial and step >= recipe.discriminator.adversarial_start_step:
            adversarial = generator_loss(self.discriminator(reconstructions, generator))
            alpha = adaptive_weight(total, adversarial, self._balance_at())
            total = total + weights.adversarial * alpha * adversarial
        else:
            adversarial = alpha = torch.zeros(())
        losses |= {"adversarial": adversarial, "adversarial_weight": alpha, "total": total}
        return reconstructions, losses

    def _train_discriminator(
        self, step: int, pairs: list[tuple[Tensor, Tensor]], generator: torch.Generator
    ) -> float:
        if not self.recipe.loss.adversarial or step < self.recipe.discriminator.start_step:
            return 0.0
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for real, fake in pairs:
            logits = self.discriminator(torch.cat([real, fake]), generator)
            loss = discriminator_loss(*logits.chunk(2)) / len(pairs)
            loss.backward()
            total += loss.item()
        self.discriminator_optimizer.step()
        return total

    def _add_noise(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """``z + sigma n`` with ``sigma ~ U(0, tau)`` per sample (RAE)."""
        if self.recipe.noise_tau == 0:
            return tokens
        sigma = self.recipe.noise_tau * torch.rand(len(tokens), 1, 1, generator=generator)
        noise = torch.randn(tokens.shape, generator=generator)
        return tokens + (sigma * noise).to(tokens)

    def _balance_at(self) -> Tensor:
        """Where the adversarial term's gradient is measured: the decoder's last layer.

        Phase 2 freezes the decoder, so there it is the last layer of the fusion that is trained.
        """
        if "decoder" in self.trained_parts:
            return self.tokenizer.decoder.last_layer
        assert self.tokenizer.fusion is not None
        return self.tokenizer.fusion.last_layer

    def _make_discriminator(self) -> Discriminator:
        recipe = self.recipe
        encoder = self.tokenizer.encoder
        if recipe.train_encoder:
            encoder = copy.deepcopy(encoder)
        backbone = make_backbone(recipe.discriminator, encoder)
        return Discriminator(backbone, recipe.discriminator.augment_probability).to(self.device)

    def _freeze(self) -> None:
        for name in ("encoder", "fusion", "decoder"):
            part = self._part(name)
            if part is not None:
                part.unfreeze() if name in self.trained_parts else part.freeze()
        self.tokenizer.train()

    def _part(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def _digests(self) -> dict[str, str]:
        """sha256 of each frozen part's tensors."""
        digests = {}
        for name in ("decoder", "encoder", "fusion"):
            part = self._part(name)
            if part is not None and name not in self.trained_parts:
                digests[name] = module_sha256(part)
        return digests


def module_sha256(module: nn.Module) -> str:
    """Digest of a module's names and values, whatever device they are on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_recipe(phase: str, recipe: PhaseRecipe) -> None:
    if recipe.batch_size % recipe.accumulation_steps:
        raise RecipeError(
            f"field 'accumulation_steps': {recipe.accumulation_steps} does not divide "
            f"batch_size={recipe.batch_size}"
        )
    if not recipe.data.validation:
        raise RecipeError(
            "field 'data.validation': phases 1 to 3 report PSNR and SSIM on it, so it is required"
        )
    if recipe.decoder_init == "ridge" and phase != "phase1":
        raise RecipeError("field 'decoder_init': only phase 1 may replace the decoder")
    if recipe.discriminator.start_step > recipe.discriminator.adversarial_start_step:
        raise RecipeError("field 'discriminator.start_step' comes after discriminator.adversarial_start_step")


def _with_networks(recipe: PhaseRecipe, networks: dict[str, str]) -> PhaseRecipe:
    """The recipe with every ``auto`` network replaced by the one in use."""
    loss = recipe.loss.model_copy(update={"perceptual_network": networks["perceptual"]})
    discriminator = recipe.discriminator.model_copy(update={"backbone": networks["discriminator"]})
    return recipe.model_copy(update={"loss": loss, "discriminator": discriminator})


def _make_tokenizer(phase: str, recipe: PhaseRecipe) -> Tokenizer:
    """The checkpoint that the recipe starts from, given the architecture that the phase needs."""
    if recipe.init is None:
        raise RecipeError(f"field 'init': {phase} starts from a checkpoint with a pre-trained encoder")
    source = Tokenizer.load(recipe.init, fusion="reference")
    config = _phase_config(phase, recipe, source.config)
    tokenizer = Tokenizer(config)
    tokenizer.encoder.load_state_dict(source.encoder.state_dict())
    tokenizer.decoder.load_state_dict(source.decoder.state_dict())
    if tokenizer.fusion is not None and source.fusion is not None:
        tokenizer.fusion.load_state_dict(source.fusion.state_dict())
    return tokenizer


def _phase_config(phase: str, recipe: PhaseRecipe, source: TokenizerConfig) -> TokenizerConfig:
    if recipe.preset is not None and recipe.preset not in PRESETS:
        raise RecipeError(f"field 'preset': {recipe.preset!r} is none of {', '.join(PRESETS)}")
    fusion = source.fusion
    if phase == "phase1":
        fusion = None
    elif fusion is None and phase == "phase3":
        raise RecipeError(
            f"field 'init': {recipe.init} has no fusion; phase 3 starts from phase 2's checkpoint"
        )
    elif fusion is None:
        fusion = recipe.fusion or (PRESETS[recipe.preset].fusion if recipe.preset else None)
        if fusion is None:
            raise RecipeError("field 'fusion': name a preset or give the fusion to train")
    try:  # fits the fusion to the encoder, and checks that it does
        return TokenizerConfig(**dict(source) | {"fusion": fusion, "name": recipe.name})
    except ValidationError as exc:
        raise RecipeError(f"field 'fusion': {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from exc
