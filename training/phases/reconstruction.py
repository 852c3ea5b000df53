"""Phases 1 to 3 and joint training: which parts of the tokenizer are trained, on which loss.

Phase 1 trains the decoder on z_base, phase 2 the fusion alone, phase 3 the decoder on z_final. What a
phase does not train is frozen, and a digest taken at the start is compared before anything is exported.

Shape legend: B batch, N tokens, C latent width, S image side.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.tokenizer import Tokenizer
from training.data.batches import Batch, random_crop, share_of_step, training_batches
from training.data.crops.cache import KINDS, StateCache, cache_spec
from training.data.crops.frozen_states import open_or_build_cache, tokens_from_states
from training.data.randomness import Purpose, StepRandomness
from training.data.sources import Listing, Sample, list_samples
from training.distributed.device import autocast, resolve_device
from training.distributed.modules import (
    Replicas,
    checkpoint_activations,
    compile_forward,
    is_sharded,
    load_whole_optimizer_state,
    load_whole_state,
    module_sha256,
    shard_decoder,
    state_everywhere,
    whole_optimizer_state,
    whole_state,
)
from training.distributed.ranks import current, is_launched
from training.errors import TrainingError
from training.evaluation.evaluate import evaluate_tokenizer
from training.evaluation.latent_statistics import latent_statistics
from training.losses.adversarial import (
    NUM_DRAWS,
    Discriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    make_backbone,
)
from training.losses.perceptual import make_perceptual
from training.losses.pixels import pixel_losses
from training.output.grids import reconstruction_grid, save_image
from training.phases.optimizer import Ema, clip_gradients, learning_rate_at, make_optimizer, set_learning_rate
from training.phases.starting_point import check_recipe, initialize_parts, make_tokenizer, with_networks
from training.phases.trainer import Task
from training.recipes.recipe import PhaseRecipe

logger = logging.getLogger(__name__)

TRAINED_PARTS = {
    "phase1": frozenset({"decoder"}),
    "phase2": frozenset({"fusion"}),
    "phase3": frozenset({"decoder"}),
    "joint": frozenset({"fusion", "decoder"}),
}
GRID_IMAGES = 8


class Reconstructor(nn.Module):
    """The tokenizer as it is trained: images to reconstructions, through latents with noise."""

    def __init__(self, tokenizer: Tokenizer, phase: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.cached_kind = KINDS[phase]

    def forward(self, images: Tensor, noise: Tensor | None, states: Tensor | None = None) -> Tensor:
        """Unclamped reconstructions of images [B, 3, S, S] in [0, 1]; noise [B, N, C] is added to latents.

        Cached ``states`` [B, L, N, C] of the images stand in for the frozen parts.
        """
        if states is None:
            tokens = self.tokenizer.tokens(images)
        else:
            tokens = tokens_from_states(self.tokenizer, self.cached_kind, states)
        if noise is not None:
            tokens = tokens + noise.to(tokens)
        return self.tokenizer.decoder(tokens).float()


class ReconstructionTask(Task[Batch]):
    """Trains parts of a tokenizer to reconstruct: L1, perceptual and adversarial loss.

    Args:
        phase: which one.
        recipe: all that it needs.
        samples: the listing of the recipe's ``data.train``.
        is_resumed: a state will be loaded, so that no start is fitted.
    """

    def __init__(
        self,
        phase: str,
        recipe: PhaseRecipe,
        samples: Sequence[Sample],
        is_resumed: bool = False,
    ) -> None:
        self.phase = phase
        self.ranks = current()
        self.recipe: PhaseRecipe = recipe
        self.device = resolve_device(recipe.device)
        check_recipe(phase, recipe, self.ranks.size)
        self.samples = samples
        torch.manual_seed(recipe.seed)
        self.tokenizer = make_tokenizer(phase, recipe).to(self.device)
        if not is_resumed:
            initialize_parts(phase, recipe, self.tokenizer, samples)
        self.trained_parts = TRAINED_PARTS[phase] | ({"encoder"} if recipe.train_encoder else set())
        self._freeze()
        self.perceptual = make_perceptual(recipe.loss).to(self.device)
        self.discriminator = self._make_discriminator()
        self.frozen_digests = self._digests()
        self._prepare_modules()
        self.model = Replicas(
            Reconstructor(self.tokenizer, phase).train(), self.ranks, may_leave_unused=recipe.train_encoder
        )
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
        self.recipe = with_networks(recipe, self.networks)
        logger.info("%s trains %s; networks: %s", phase, ", ".join(sorted(self.trained_parts)), self.networks)

    @cached_property
    def validation(self) -> Listing:
        """The recipe's validation images, listed when they are first needed; collective."""
        return list_samples(self.recipe.data.validation, self.ranks)

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        recipe = self.recipe
        transform = random_crop(recipe.data, self.tokenizer.config.image_size)
        per_step = recipe.accumulation_steps
        stream = training_batches(
            self.samples,
            recipe.data,
            transform,
            recipe.batch_size // per_step,
            recipe.seed,
            start_step * per_step,
            self.ranks,
            self._open_cache(),
        )
        while True:
            yield [next(stream) for _ in range(per_step)]

    def _open_cache(self) -> StateCache | None:
        """Open the recipe's cache of frozen states; all ranks fill the missing shards."""
        recipe = self.recipe
        if recipe.cache is None:
            return None
        spec = cache_spec(self.phase, recipe, self.tokenizer.config)
        return open_or_build_cache(
            self.tokenizer,
            self.frozen_digests,
            spec,
            self.samples,
            recipe.data,
            recipe.seed,
            recipe.precision,
            self.ranks,
        )

    def train_step(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        recipe = self.recipe
        randomness = StepRandomness(recipe.seed, step)
        learning_rate = learning_rate_at(step, recipe.num_steps, recipe.optimizer)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, float] = {}
        pairs = []
        if self._is_adversarial(step):
            self.discriminator.iterate_norms()
        for number, batch in enumerate(micro_batches):
            images, samples = batch.pixels(self.device), self._samples(number)
            with self.model.micro_batch(is_last=number == len(micro_batches) - 1):
                terms = (step, images, batch.states, samples, randomness)
                reconstructions, losses = self._generator_losses(*terms)
                (losses.pop("total") / len(micro_batches)).backward()
            pairs.append((images, reconstructions.detach()))
            for name, value in losses.items():
                figures[name] = figures.get(name, 0.0) + value.item() / len(micro_batches)
        figures["gradient_norm"] = float(clip_gradients(self.tokenizer, recipe.optimizer.clip_norm))
        self.optimizer.step()
        self.ema.update(step)
        figures["discriminator"] = self._train_discriminator(step, pairs, randomness)
        figures["learning_rate"] = learning_rate
        return self.ranks.mean_figures(figures)

    @torch.no_grad()
    def evaluate(self, step: int, directory: Path) -> dict[str, float]:
        """Validation PSNR and SSIM with averaged weights, and a grid of pictures."""
        with self._averaged() as tokenizer:
            report = evaluate_tokenizer(tokenizer, self.validation, num_pictures=GRID_IMAGES, progress=False)
        if self.ranks.is_main:
            grid = reconstruction_grid([report.originals, report.reconstructions], ["original", self.phase])
            save_image(grid, directory / "grids" / f"{step:06d}.png")
        return {"psnr_db": report.psnr_db, "ssim": report.ssim}

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the checkpoint; its latent statistics are computed anew where the latents are new."""
        recipe = self.recipe
        with self._averaged() as tokenizer:
            if tokenizer.fusion is not None:
                mean, var = latent_statistics(tokenizer, self.samples, recipe.statistics_images)
                tokenizer.set_statistics(mean, var)
            provenance = {**provenance, "phase": self.phase, "frozen_sha256": self.frozen_digests}
            if self.ranks.is_main:
                tokenizer.save(path, getattr(torch, recipe.storage_dtype), provenance)

    def check_invariants(self) -> None:
        """Raises if a frozen part is no longer what it was, bit for bit."""
        for part, digest in self._digests().items():
            if digest != self.frozen_digests[part]:
                raise TrainingError(f"{self.phase} changed the frozen {part}: nothing was exported")

    def state_dict(self) -> dict[str, Any]:
        return {
            "parts": {name: whole_state(self._part(name)) for name in sorted(self.trained_parts)},
            "optimizer": whole_optimizer_state(self.optimizer, self.tokenizer),
            "ema": self.ema.state_dict(),
            "heads": self.discriminator.heads.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "frozen_sha256": self.frozen_digests,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["frozen_sha256"] != self.frozen_digests:
            raise ValueError("the frozen parts are not those that the run began with")
        for name in self.trained_parts:
            load_whole_state(self._part(name), state["parts"][name])
        load_whole_optimizer_state(self.optimizer, self.tokenizer, state["optimizer"])
        self.ema.load(state["ema"])
        self.discriminator.heads.load_state_dict(state["heads"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _generator_losses(
        self,
        step: int,
        images: Tensor,
        states: Tensor | None,
        samples: range,
        randomness: StepRandomness,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.recipe.loss
        with autocast(self.device, self.recipe.precision):
            reconstructions = self.model(images, self._noise(samples, randomness), states)
        losses = pixel_losses(reconstructions, images, weights, self.tokenizer.decoder.patch_size)
        total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
        if weights.perceptual:
            crop = randomness.shared(Purpose.PERCEPTUAL_CROP)
            losses["perceptual"] = self.perceptual(reconstructions, images, crop)
            total = total + weights.perceptual * losses["perceptual"]
        if self._is_adversarial(step):
            draws = randomness.uniform(Purpose.AUGMENT_FOR_GENERATOR, samples, NUM_DRAWS)
            adversarial = generator_loss(self.discriminator(reconstructions, draws))
            alpha = adaptive_weight(total, adversarial, balance_at(self.tokenizer), self.ranks)
            total = total + weights.adversarial * alpha * adversarial
        else:
            adversarial = alpha = torch.zeros(())
        losses |= {"adversarial": adversarial, "adversarial_weight": alpha, "total": total}
        return reconstructions, losses

    def _train_discriminator(
        self, step: int, pairs: list[tuple[Tensor, Tensor]], randomness: StepRandomness
    ) -> float:
        if not self.recipe.loss.adversarial or step < self.recipe.discriminator.start_step:
            return 0.0
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        self.discriminator.iterate_norms()
        total = 0.0
        for number, (real, fake) in enumerate(pairs):
            draws = [
                randomness.uniform(purpose, self._samples(number), NUM_DRAWS)
                for purpose in (Purpose.AUGMENT_REAL, Purpose.AUGMENT_FAKE)
            ]
            logits = self.discriminator(torch.cat([real, fake]), torch.cat(draws))
            loss = discriminator_loss(*logits.chunk(2)) / len(pairs)
            loss.backward()
            total += loss.item()
        self.ranks.average_gradients(list(self.discriminator.heads.parameters()))
        self.discriminator_optimizer.step()
        return total

    def _is_adversarial(self, step: int) -> bool:
        recipe = self.recipe
        return recipe.loss.adversarial > 0 and step >= recipe.discriminator.adversarial_start_step

    def _samples(self, micro_batch: int) -> range:
        """Which samples of the step's global batch this rank's share of a micro-batch holds."""
        recipe = self.recipe
        return share_of_step(recipe.batch_size, recipe.accumulation_steps, micro_batch, self.ranks)

    def _noise(self, samples: range, randomness: StepRandomness) -> Tensor | None:
        """``sigma n`` with ``sigma ~ U(0, tau)`` per sample (RAE), [B, N, C]."""
        if self.recipe.noise_tau == 0:
            return None
        width, *grid = self.tokenizer.config.latent_shape
        sigma = self.recipe.noise_tau * randomness.uniform(Purpose.NOISE, samples, 1)
        noise = randomness.normal(Purpose.NOISE, samples, (math.prod(grid), width), self.device)
        return sigma[:, :, None].to(self.device) * noise

    def _prepare_modules(self) -> None:
        """Recomputation, compilation and sharding, as the recipe has it; parameters keep their names."""
        tokenizer, recipe = self.tokenizer, self.recipe
        passed = blocks_passed(tokenizer)
        if recipe.compile:
            for module in {*passed, *tokenizer.encoder.blocks, *self.discriminator.backbone.encoder.blocks}:
                compile_forward(module)
        if recipe.activation_checkpointing:
            for module in passed:
                checkpoint_activations(module)
        if recipe.distributed.strategy == "fsdp" and is_launched():
            shard_decoder(tokenizer.decoder)

    @contextmanager
    def _averaged(self) -> Iterator[Tokenizer]:
        """The tokenizer with averaged weights, whole on every rank."""
        with self.ema.applied():
            if not any(is_sharded(p) for p in self.tokenizer.parameters()):
                yield self.tokenizer
                return
            copied = Tokenizer(self.tokenizer.config).to(self.device)
            if self.tokenizer.latent_mean is not None and self.tokenizer.latent_var is not None:
                copied.set_statistics(self.tokenizer.latent_mean, self.tokenizer.latent_var)
            copied.load_state_dict(state_everywhere(self.tokenizer))
        for part in (copied.encoder, copied.fusion, copied.decoder):
            if part is not None:
                part.freeze()
        yield copied

    def _make_discriminator(self) -> Discriminator:
        recipe = self.recipe
        encoder = self.tokenizer.encoder
        if recipe.train_encoder:
            encoder = copy.deepcopy(encoder)
        backbone = make_backbone(recipe.discriminator, encoder, self.tokenizer.config)
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


def blocks_passed(tokenizer: Tokenizer) -> list[nn.Module]:
    """The blocks that gradients pass, those of a frozen decoder included."""
    passed: list[nn.Module] = [*tokenizer.decoder.blocks]
    if not tokenizer.encoder.frozen:
        passed += tokenizer.encoder.blocks
    if tokenizer.fusion is not None and not tokenizer.fusion.frozen:
        passed.append(tokenizer.fusion.mixer)
    return passed


def balance_at(tokenizer: Tokenizer) -> Tensor:
    """Where the adversarial term's gradient is measured: the last layer that is trained."""
    if not tokenizer.decoder.frozen or tokenizer.fusion is None:
        return tokenizer.decoder.last_layer
    return tokenizer.fusion.last_layer
