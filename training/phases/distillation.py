"""Phase 0: pre-train a small encoder where no published weights fit it.

The student learns a classifier's semantics: its class and mean patch token predict the teacher's soft
labels (Hinton et al. 2015) and, where images have classes, those; its patch tokens at a third, two thirds
and the whole of its depth the teacher's feature maps at strides 8, 16 and 32 (hints, Romero et al. 2015),
so that depth means the same in both. Its first block also predicts the pixels of each patch linearly, so
that the fusion finds there what the deeper ones give up. Most steps run at small inputs, the last ones at
the size that is served, as DINOv2 does.

Shape legend: B batch, N tokens, C student width, S side in pixels.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.reference import token_norm
from model.config import PRESETS, TokenizerConfig
from model.tokenizer import Tokenizer
from training.data.batches import (
    Batch,
    evaluation_batches,
    random_resized_crop,
    training_batches,
)
from training.data.sources import Sample, list_samples
from training.distributed.device import autocast, resolve_device
from training.distributed.modules import (
    Replicas,
    checkpoint_activations,
    compile_forward,
    load_whole_optimizer_state,
    whole_optimizer_state,
)
from training.distributed.ranks import Ranks, current
from training.errors import RecipeError
from training.losses.efficientnet import FEATURE_WIDTH, NAME, NUM_CLASSES, STAGE_WIDTHS, EfficientNetLite0
from training.phases.optimizer import Ema, clip_gradients, learning_rate_at, make_optimizer, set_learning_rate
from training.phases.trainer import Task
from training.recipes.recipe import DistillationRecipe

VALIDATION_LIMIT = 256
HINT_WIDTHS = (STAGE_WIDTHS[2], STAGE_WIDTHS[3], FEATURE_WIDTH)


class Predictions(NamedTuple):
    """Outputs of the student's heads.

    Attributes:
        logits: [B, 1000], to match the teacher's.
        labels: [B, classes], to match the images' own; None where the recipe names none.
        maps: three feature maps [B, C_hint, S / patch, S / patch].
        pixels: [B, 3, S, S], normalised.
        reserved: [B, N, R], the last values of the last block's normalised patch tokens.
    """

    logits: Tensor
    labels: Tensor | None
    maps: list[Tensor]
    pixels: Tensor
    reserved: Tensor


class Student(nn.Module):
    """The encoder with the heads that exist only for distillation."""

    def __init__(self, tokenizer: Tokenizer, recipe: DistillationRecipe) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.eps = tokenizer.config.encoder.layer_norm_eps
        config = tokenizer.config.encoder
        self.hint_blocks = (config.depth // 3 - 1, 2 * config.depth // 3 - 1, config.depth - 1)
        self.free_width = config.width - recipe.reserved_width
        self.classifier = nn.Linear(2 * self.free_width, NUM_CLASSES)
        self.labeller = nn.Linear(2 * self.free_width, recipe.num_classes) if recipe.num_classes else None
        widths = (config.width, config.width, self.free_width)
        self.projectors = nn.ModuleList(map(nn.Linear, widths, HINT_WIDTHS))
        self.painter = nn.Linear(config.width, 3 * config.patch_size**2)

    def forward(self, pixels: Tensor) -> "Predictions":
        """Run encoder and heads on normalised pixels [B, 3, S, S]."""
        config = self.encoder.config
        grid = pixels.shape[-1] // config.patch_size
        states = [token_norm(state, self.eps) for state in self.encoder.hidden_states(pixels)]
        prefix = config.num_prefix_tokens
        reserved = states[-1][:, prefix:, self.free_width :]
        states[-1] = states[-1][..., : self.free_width]
        maps = [
            projector(states[block][:, prefix:]).transpose(1, 2).unflatten(2, (grid, grid))
            for projector, block in zip(self.projectors, self.hint_blocks, strict=True)
        ]
        summary = torch.cat([states[-1][:, 0], states[-1][:, prefix:].mean(dim=1)], dim=1)
        painted = self.painter(states[0][:, prefix:]).transpose(1, 2)
        side = grid * config.patch_size
        return Predictions(
            logits=self.classifier(summary),
            labels=None if self.labeller is None else self.labeller(summary),
            maps=maps,
            pixels=F.fold(painted, (side, side), config.patch_size, stride=config.patch_size),
            reserved=reserved,
        )


class DistillationTask(Task[Batch]):
    """Trains the encoder of a preset against EfficientNet-Lite0.

    Args:
        recipe: settings of the phase.
        samples: the listing of the recipe's ``data.train``.
    """

    def __init__(self, recipe: DistillationRecipe, samples: Sequence[Sample]) -> None:
        self.ranks = current()
        _check_recipe(recipe, self.ranks.size)
        self.recipe: DistillationRecipe = recipe
        self.device = resolve_device(recipe.device)
        self.samples = samples
        torch.manual_seed(recipe.seed)
        self.tokenizer = Tokenizer(_encoder_only(recipe)).to(self.device)
        if recipe.init is not None:
            _take_encoder(self.tokenizer, recipe.init)
        self.tokenizer.decoder.freeze()
        self.student = Student(self.tokenizer, recipe).to(self.device)
        self.teacher = EfficientNetLite0().to(self.device)
        for block in self.student.encoder.blocks:
            if recipe.compile:
                compile_forward(block)
            if recipe.activation_checkpointing:
                checkpoint_activations(block)
        self.model = Replicas(self.student, self.ranks)
        self.optimizer = make_optimizer(self.student, recipe.optimizer)
        self.ema = Ema(self.student, recipe.ema_decay)
        self.networks = {"teacher": NAME}

    @cached_property
    def validation(self) -> list[Sample]:
        """The first of the recipe's validation images, listed when they are first needed; collective."""
        return list_samples(self.recipe.data.validation, self.ranks)[:VALIDATION_LIMIT]

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        recipe = self.recipe
        first_final = recipe.num_steps - recipe.final_steps
        transform = random_resized_crop(recipe.data, recipe.teacher_image_size)
        if start_step < first_final:
            stream = training_batches(
                self.samples,
                recipe.data,
                transform,
                recipe.batch_size,
                recipe.seed,
                start_step,
                self.ranks,
            )
            yield from ([batch] for batch in islice(stream, first_final - start_step))
        transform = random_resized_crop(recipe.data, max(recipe.final_image_size, recipe.teacher_image_size))
        start = max(0, start_step - first_final)
        stream = training_batches(
            self.samples,
            recipe.data,
            transform,
            recipe.final_batch_size,
            recipe.seed + 1,
            start,
            self.ranks,
        )
        yield from ([batch] for batch in stream)

    def train_step(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        recipe = self.recipe
        learning_rate = learning_rate_at(step, recipe.num_steps, recipe.optimizer)
        set_learning_rate(self.optimizer, learning_rate)
        (batch,) = micro_batches
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(batch, _image_size_at(step, recipe), self.model, self.ranks)
        total = (
            recipe.logits * losses["logits"]
            + recipe.dense * losses["dense"]
            + recipe.pixels * losses["pixels"]
            + recipe.labels * losses["labels"]
            + losses["reserved"]
        )
        total.backward()
        norm = float(clip_gradients(self.student, recipe.optimizer.clip_norm))
        self.optimizer.step()
        self.ema.update(step)
        figures = {name: loss.item() for name, loss in losses.items()}
        figures |= {"gradient_norm": norm, "learning_rate": learning_rate}
        return self.ranks.mean_figures(figures)

    @torch.no_grad()
    def evaluate(self, step: int, directory: Path) -> dict[str, float]:
        """Agreement with the teacher on validation images."""
        recipe = self.recipe
        sums: dict[str, float] = {}
        num_images = 0
        with self.ema.applied():
            for _, batch in evaluation_batches(self.validation, recipe.teacher_image_size, 32):
                figures = self._losses(batch, recipe.image_size, self.student, Ranks())
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * len(batch.images)
                num_images += len(batch.images)
        return {name: total / num_images for name, total in sums.items()}

    def check_invariants(self) -> None:
        """Nothing is frozen but the teacher, which is not exported."""

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        if not self.ranks.is_main:
            return
        with self.ema.applied():
            self.tokenizer.save(path, getattr(torch, self.recipe.storage_dtype), provenance)

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimizer": whole_optimizer_state(self.optimizer, self.student),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        load_whole_optimizer_state(self.optimizer, self.student, state["optimizer"])
        self.ema.load(state["ema"])

    def _losses(
        self, batch: Batch, student_size: int, student: Student | Replicas, ranks: Ranks
    ) -> dict[str, Tensor]:
        """The terms of the loss on images that ``ranks`` share."""
        recipe = self.recipe
        images = batch.pixels(self.device)
        with torch.no_grad(), autocast(self.device, recipe.precision):
            stages = self.teacher.stages(_resize(images, recipe.teacher_image_size))
            target_logits, head_map = self.teacher.classify(stages)
        decoder = self.tokenizer.decoder
        pixels = (_resize(images, student_size) - decoder.pixel_mean) / decoder.pixel_std
        with autocast(self.device, recipe.precision):
            found = student(pixels)
        targets = [stages[2].float(), stages[3].float(), head_map.float()]
        pairs = zip(found.maps, targets, strict=True)
        hints = [_hint_distance(features.float(), target, ranks) for features, target in pairs]
        return {
            "logits": F.cross_entropy(found.logits.float(), target_logits.float().softmax(dim=-1)),
            "dense": torch.stack(hints).mean(),
            "pixels": F.mse_loss(found.pixels.float(), pixels),
            "labels": _label_loss(found.labels, batch.labels.to(self.device)),
            "reserved": _excess_variance(found.reserved.float(), recipe.reserved_variance, ranks),
        }


def _hint_distance(features: Tensor, target: Tensor, ranks: Ranks) -> Tensor:
    """Cosine distance to the target less its global batch's mean, at the coarser of the two resolutions."""
    target = target - ranks.all_reduce_mean(target.mean(dim=(0, 2, 3), keepdim=True))
    grid = min(features.shape[-1], target.shape[-1])
    features, target = (F.adaptive_avg_pool2d(m, grid) for m in (features, target))
    return 1 - F.cosine_similarity(features, target, dim=1).mean()


def _label_loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    """Mean over the images that have a class."""
    is_labelled = labels >= 0
    if logits is None or not is_labelled.any():
        return torch.zeros(())
    return F.cross_entropy(logits[is_labelled].float(), labels[is_labelled])


def _excess_variance(values: Tensor, limit: float, ranks: Ranks) -> Tensor:
    """Mean excess of the values' mean squares over the limit, where the global batch exceeds it."""
    if not values.shape[-1]:
        return values.new_zeros(())
    squares = values.square().mean(dim=(0, 1))
    exceeds = ranks.all_reduce_mean(squares.detach().clone()) > limit
    return ((squares - limit) * exceeds).mean()


def _image_size_at(step: int, recipe: DistillationRecipe) -> int:
    is_final = step >= recipe.num_steps - recipe.final_steps
    return recipe.final_image_size if is_final else recipe.image_size


def _check_recipe(recipe: DistillationRecipe, num_ranks: int) -> None:
    if recipe.distributed.strategy == "fsdp":
        raise RecipeError("field 'distributed.strategy': fsdp shards decoders; phase 0 trains none, use ddp")
    for field in ("batch_size", "final_batch_size"):
        if getattr(recipe, field) % num_ranks:
            raise RecipeError(
                f"field {field!r}: {getattr(recipe, field)} does not divide among {num_ranks} ranks"
            )


def _encoder_only(recipe: DistillationRecipe) -> TokenizerConfig:
    if recipe.preset is None:
        raise RecipeError(f"field 'preset': name the architecture, one of {', '.join(PRESETS)}")
    width = PRESETS[recipe.preset].encoder.width
    if recipe.reserved_width >= width:
        raise RecipeError(f"field 'reserved_width': the tokens are {width} wide")
    if not PRESETS[recipe.preset].encoder.class_token:
        raise RecipeError(f"field 'preset': the encoder of {recipe.preset!r} has no class token")
    return PRESETS[recipe.preset].model_copy(update={"fusion": None, "name": f"{recipe.preset}-phase0"})


def _take_encoder(tokenizer: Tokenizer, checkpoint: str) -> None:
    """Start from an encoder that was distilled before, instead of from random weights."""
    source = Tokenizer.load(checkpoint, fusion="reference")
    if source.config.encoder != tokenizer.config.encoder:
        raise RecipeError(f"field 'init': the encoder of {checkpoint!r} is not the preset's")
    tokenizer.encoder.load_state_dict(source.encoder.state_dict())


def _resize(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
