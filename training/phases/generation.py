"""Stage 2: a DiT^DH learns the velocity of normalised latents (rectified flow, arXiv 2510.11690).

``x_t = (1 - t) x + t e``, and the loss is the mean square of ``v(x_t, t, y) - (e - x)``. The tokenizer is
frozen. Its latents come from images in the step, or from a folder (`drorae tokenize`), or stay on the device;
then nothing in the loop waits for the device but the rows of the log.

Shape legend: B batch, C latent channels, h w latent grid.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.generator import Generator, TimeLaw
from model.sampling import sample_noise, sample_ode, shift_times
from training.data.batches import (
    Batch,
    center_crop,
    share_of_step,
    training_batches,
)
from training.data.classes import Classes, find_classes
from training.data.held_latents import HeldLatents, hold_latents, shuffled
from training.data.randomness import Purpose, StepRandomness
from training.data.sources import Sample, list_samples, spread_samples
from training.distributed.device import autocast, products_dtype, resolve_device
from training.distributed.modules import (
    Replicas,
    checkpoint_activations,
    compile_forward,
    load_whole_optimizer_state,
    load_whole_state,
    shard_blocks,
    state_everywhere,
    whole_optimizer_state,
    whole_state,
)
from training.distributed.ranks import current, is_launched
from training.evaluation.latent_statistics import latent_statistics
from training.latents.reading.folder import LatentFolder, LatentRows
from training.output.grids import reconstruction_grid, save_image
from training.phases.new_generator import check_recipe, load_tokenizer, make_generator
from training.phases.optimizer import (
    Ema,
    clip_gradients,
    learning_rate_at,
    make_generator_optimizers,
    set_learning_rate,
)
from training.phases.stored_latents import (
    check_labels,
    hold_stored,
    open_latents,
    stored_batches,
    stored_classes,
)
from training.phases.trainer import Task, is_reported
from training.recipes.generator import GeneratorRecipe

logger = logging.getLogger(__name__)

MAX_TIME = 0.999  # of the law of times before the shift, as RAE's
SAMPLING_BATCH_SIZE = 64
GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class LatentBatch:
    """Normalised latents [B, C, h, w] with their labels [B], on the device."""

    latents: Tensor
    labels: Tensor
    num_broken: int = 0


def draw_times(uniform: Tensor, law: TimeLaw, shift: float) -> Tensor:
    """Times of training from uniform numbers in [0, 1), both [B]: the law on [0, 0.999], then the shift."""
    if law == "uniform":
        base = MAX_TIME * uniform
    else:  # logit-normal(0, 1), truncated
        limit = torch.special.ndtr(torch.logit(torch.tensor(MAX_TIME, dtype=torch.float64)))
        base = torch.sigmoid(torch.special.ndtri(uniform * float(limit)))
    return shift_times(base, shift)


class GenerationTask(Task[Batch | LatentBatch]):
    """Trains a generator on the latents of a frozen tokenizer.

    Args:
        recipe: settings of the phase.
        samples: the listing of the recipe's ``data.train``; none where it names stored latents.
    """

    def __init__(self, recipe: GeneratorRecipe, samples: Sequence[Sample]) -> None:
        self.ranks = current()
        self.recipe: GeneratorRecipe = recipe
        self.device = resolve_device(recipe.device)
        check_recipe(recipe, self.ranks.size)
        self.tokenizer = load_tokenizer(recipe, self.device)
        self.folder = self._open("latents")
        self.classes = self._find_classes(samples)
        self.samples = self.classes.label(samples)
        torch.manual_seed(recipe.seed)
        self.generator = make_generator(recipe, self.tokenizer, self.classes).to(self.device)
        self.network = self.generator.network.train()
        assert self.generator.trained_on.shift is not None
        self.shift = self.generator.trained_on.shift
        self.held = self._hold(recipe.data.flip) if recipe.hold_latents else None
        self.generator.set_statistics(*self._statistics())
        self.validation = self._hold_validation()
        self._prepare_modules()
        self.model = Replicas(self.network, self.ranks)
        self.optimizers = make_generator_optimizers(self.network, self.network.blocks, recipe.optimizer)
        self.ema = Ema(self.network, recipe.ema_decay)
        self.networks = {"tokenizer": self.tokenizer.config.name}
        num_parameters = sum(p.numel() for p in self.network.parameters())
        logger.info("%s: %.1f M parameters", self.generator.config.name, num_parameters / 1e6)

    def batches(self, start_step: int) -> Iterator[list[Batch | LatentBatch]]:
        recipe = self.recipe
        count = recipe.accumulation_steps
        if self.held is not None:
            yield from self._held_batches(self.held, start_step)
        if self.folder is not None:
            yield from self._stored_batches(self.folder, start_step)
        stream = training_batches(
            self.samples,
            recipe.data,
            center_crop(recipe.data, self.tokenizer.config.image_size),
            recipe.batch_size // count,
            recipe.seed,
            start_step * count,
            self.ranks,
        )
        while True:
            yield [next(stream) for _ in range(count)]

    def train_step(self, step: int, micro_batches: list[Batch | LatentBatch]) -> dict[str, float]:
        recipe = self.recipe
        learning_rate = learning_rate_at(step, recipe.num_steps, recipe.optimizer)
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, learning_rate)
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches):
            with self.model.micro_batch(is_last=number == len(micro_batches) - 1):
                loss = self._loss(step, number, self._encoded(batch)) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        norm = clip_gradients(self.network, recipe.optimizer.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update(step)
        if not is_reported(step, recipe):  # a figure waits for the device
            return {}
        figures = {"loss": float(total), "gradient_norm": float(norm), "learning_rate": learning_rate}
        return self.ranks.mean_figures(figures)

    @torch.no_grad()
    def evaluate(self, step: int, directory: Path) -> dict[str, float]:
        """Validation loss of the averaged weights at fixed times and noise, and a grid of samples."""
        recipe = self.recipe
        generator = self._averaged()
        if self.ranks.is_main:
            if recipe.samples_per_class:
                names = self.classes.names or [str(label) for label in range(self.classes.count)]
                rows = self._sample_rows(generator, len(names[: recipe.sampled_classes]))
                save_image(reconstruction_grid(rows, names[: len(rows)]), _grid_file(directory, step))
            if recipe.keep_snapshots:
                dtype = getattr(torch, recipe.storage_dtype)
                generator.save(directory / "snapshots" / f"{step:06d}", dtype, {"step": step})
        return {"loss": self._validation_loss(generator)}

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the averaged weights as a generator's checkpoint."""
        generator = self._averaged()
        if self.ranks.is_main:
            generator.save(path, getattr(torch, self.recipe.storage_dtype), provenance)

    def listing(self) -> dict[str, Any]:
        if self.folder is None:
            return super().listing()
        return {"num_images": len(self.folder), "sha256": self.folder.digest}

    def check_invariants(self) -> None:
        """The tokenizer has no gradients, and is not exported."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": whole_state(self.network),
            "optimizer": whole_optimizer_state(self.optimizers, self.network),
            "ema": self.ema.state_dict(),
            "statistics": [self.generator.latent_mean, self.generator.latent_var],
            "tokenizer_sha256": self.generator.trained_on.tokenizer_sha256,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["tokenizer_sha256"] != self.generator.trained_on.tokenizer_sha256:
            raise ValueError("the tokenizer is not the one that the run began with")
        load_whole_state(self.network, state["network"])
        for optimizer in self.optimizers:
            load_whole_optimizer_state(optimizer, self.network, state["optimizer"])
        self.ema.load(state["ema"])
        self.generator.set_statistics(*state["statistics"])

    def _loss(self, step: int, number: int, batch: LatentBatch) -> Tensor:
        """Mean square error of the velocity on this rank's share of a micro-batch."""
        recipe = self.recipe
        samples = self._samples(number)
        randomness = StepRandomness(recipe.seed, step)
        choices = randomness.uniform_block(Purpose.GENERATION_CHOICES, samples, 3, self.device)
        time, dropped = draw_times(choices[:, 0], recipe.time_law, self.shift), choices[:, 1]
        shape = self.generator.config.latent_shape
        noise = randomness.normal_block(Purpose.GENERATION_NOISE, samples, shape, self.device)
        null = self.generator.config.null_class
        labels = torch.where(dropped < recipe.class_dropout, null, batch.labels)
        with autocast(self.device, recipe.precision):
            velocity = self.model(_mix(batch.latents, noise, time), time, labels)
        return (velocity - (noise - batch.latents)).square().mean()

    def _encoded(self, batch: Batch | LatentBatch) -> LatentBatch:
        if isinstance(batch, LatentBatch):
            return batch
        latents = self.tokenizer.latents(batch.pixels(self.device), self.recipe.latent)
        return LatentBatch(self.generator.normalize_latents(latents), batch.labels.to(self.device))

    def _held_batches(self, held: HeldLatents, start_step: int) -> Iterator[list[Batch | LatentBatch]]:
        recipe, count = self.recipe, self.recipe.accumulation_steps
        rows = held.balanced_rows() if recipe.balance_classes else range(len(held.labels))
        numbers = shuffled(rows, recipe.batch_size // count, recipe.seed, start_step * count, self.ranks)
        step = start_step
        while True:
            yield [self._held_batch(held, next(numbers), step, number) for number in range(count)]
            step += 1

    def _held_batch(self, held: HeldLatents, numbers: list[int], step: int, number: int) -> LatentBatch:
        chosen = torch.tensor(numbers).to(self.device, non_blocking=True)
        randomness = StepRandomness(self.recipe.seed, step)
        draws = randomness.uniform_block(Purpose.GENERATION_CHOICES, self._samples(number), 3, self.device)
        flipped = (draws[:, 2] * held.latents.shape[1]).long()
        latents = self.generator.normalize_latents(held.latents[chosen, flipped].float())
        return LatentBatch(latents, held.labels[chosen])

    def _stored_batches(self, folder: LatentFolder, start_step: int) -> Iterator[list[Batch | LatentBatch]]:
        recipe, count = self.recipe, self.recipe.accumulation_steps
        flip = recipe.data.flip and folder.identity.flip
        rows = stored_batches(recipe, folder.directory, flip, start_step * count, self.ranks)
        while True:
            yield [self._stored_batch(next(rows)) for _ in range(count)]

    def _stored_batch(self, rows: LatentRows) -> LatentBatch:
        latents = rows.latents.to(self.device, non_blocking=True).float()
        return LatentBatch(self.generator.normalize_latents(latents), rows.labels.to(self.device))

    def _samples(self, micro_batch: int) -> range:
        recipe = self.recipe
        return share_of_step(recipe.batch_size, recipe.accumulation_steps, micro_batch, self.ranks)

    def _validation_loss(self, generator: Generator) -> float:
        """Times are spread evenly over the law; ranks share the images out."""
        held, recipe = self.validation, self.recipe
        size = max(1, recipe.batch_size // (recipe.accumulation_steps * self.ranks.size))
        randomness = StepRandomness(recipe.seed, 0)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in self.ranks.shard(range(0, len(held.labels), size)):
            samples = range(start, min(start + size, len(held.labels)))
            uniform = (torch.arange(samples.start, samples.stop).double() + 0.5) * GOLDEN_RATIO % 1
            time = draw_times(uniform.float().to(self.device), recipe.time_law, self.shift)
            shape = generator.config.latent_shape
            noise = randomness.normal_block(Purpose.VALIDATION_NOISE, samples, shape, self.device)
            part = slice(samples.start, samples.stop)
            latents = generator.normalize_latents(held.latents[part, 0].float())
            velocity = generator.velocity(_mix(latents, noise, time), time, held.labels[part])
            error = (velocity - (noise - latents)).square().mean(dim=(1, 2, 3)).double().sum()
            sums += torch.stack([error.cpu(), torch.tensor(len(samples)).double()])
        error, count = self.ranks.all_reduce_sum(sums).tolist()
        return error / count

    def _sample_rows(self, generator: Generator, num_classes: int) -> list[Tensor]:
        """One row of pictures [samples, 3, S, S] per class, from noise that is the same every time."""
        recipe, columns = self.recipe, self.recipe.samples_per_class
        shape = generator.config.latent_shape
        pictures = []
        for indices in torch.arange(num_classes * columns).split(SAMPLING_BATCH_SIZE):
            noise = sample_noise(recipe.seed, indices.tolist(), shape).to(self.device)
            labels = (indices // columns).to(self.device)
            latents = sample_ode(generator, noise, labels, recipe.sample_points, self.shift, final_step=True)
            pictures.append(self.tokenizer.decode(generator.denormalize_latents(latents)))
        return list(torch.cat(pictures).split(columns))

    def _averaged(self) -> Generator:
        """A generator with the averaged weights, whole on every rank."""
        with self.ema.applied():
            state = {name: tensor.detach().clone() for name, tensor in state_everywhere(self.network).items()}
        own = self.generator
        averaged = Generator.from_network(own.config, state, Path(), own.trained_on)
        assert own.latent_mean is not None
        assert own.latent_var is not None
        averaged.set_statistics(own.latent_mean, own.latent_var)
        averaged.dtype = products_dtype(self.device, self.recipe.precision)
        return averaged

    def _open(self, field: str) -> LatentFolder | None:
        """The folder that a field of ``data`` names, if it does."""
        if getattr(self.recipe.data, field) is None:
            return None
        return open_latents(self.recipe, field, self.tokenizer)

    def _find_classes(self, samples: Sequence[Sample]) -> Classes:
        recipe = self.recipe
        if self.folder is not None:
            return stored_classes(self.folder, recipe.class_names)
        return find_classes(samples, recipe.data.train, recipe.class_names)

    def _hold(self, flip: bool) -> HeldLatents:
        recipe, folder = self.recipe, self.folder
        dtype, progress = getattr(torch, recipe.latents_dtype), self.ranks.is_main
        if folder is not None:
            flip = flip and folder.identity.flip
            return hold_stored(folder, flip, dtype, self.device, progress=progress)
        return hold_latents(self.tokenizer, self.samples, recipe.latent, flip, dtype, progress)

    def _hold_validation(self) -> HeldLatents:
        recipe, limit = self.recipe, self.recipe.validation_images
        dtype = getattr(torch, recipe.latents_dtype)
        if (folder := self._open("validation_latents")) is not None:
            held = hold_stored(folder, False, dtype, self.device, limit, progress=False)
            check_labels(held, self.classes)
            return held
        listed = spread_samples(list_samples(recipe.data.validation, self.ranks), limit)
        samples = self.classes.label(listed)
        return hold_latents(self.tokenizer, samples, recipe.latent, False, dtype, progress=False)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if self.recipe.statistics == "data":
            if self.folder is not None:
                return self.folder.statistics()
            if self.held is not None:
                return self.held.statistics()
            return latent_statistics(self.tokenizer, self.samples)
        assert self.tokenizer.latent_mean is not None
        assert self.tokenizer.latent_var is not None
        return self.tokenizer.latent_mean, self.tokenizer.latent_var

    def _prepare_modules(self) -> None:
        """Recomputation, compilation and sharding, as the recipe has it; parameters keep their names."""
        recipe = self.recipe
        if recipe.compile:
            for part in (*self.network.blocks, self.network.final_layer):
                compile_forward(part, dynamic=False)  # trunk and head differ in width, batches never
        for block in self.network.blocks:
            if recipe.activation_checkpointing:
                checkpoint_activations(block)
        if recipe.distributed.strategy == "fsdp" and is_launched():
            shard_blocks(self.network, self.network.blocks)


def _mix(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """``(1 - t) x + t e``, [B, C, h, w]."""
    t = time[:, None, None, None]
    return (1 - t) * latents + t * noise


def _grid_file(directory: Path, step: int) -> Path:
    return directory / "grids" / f"{step:06d}.png"
