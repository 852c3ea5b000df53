"""Cost of a training step, without running it: memory and operations.

The step's modules run once on tensors that have shapes but no values (`training.planning.meter`). One process
then needs at most

    weights + AdamW's moments + averages                            at all times
    + gradients of earlier micro-batches, and of the discriminator
    + pictures of the step: images and reconstructions
    + kept tensors of one micro-batch; of recomputed blocks the inputs, and all of one block
    + twice the largest kept tensor: gradients of one operation's input and output

or, when the discriminator is trained, the same with all gradients and its own kept tensors. The CUDA
context, workspaces of libraries and fragmentation come on top: 1 to 2 GiB.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.reference import token_norm
from model.config import TokenizerConfig
from model.networks.encoder import Encoder
from model.tokenizer import Tokenizer
from training.distributed.device import autocast, products_dtype, resolve_device
from training.distributed.modules import checkpoint_activations
from training.losses import adversarial as gan
from training.losses.perceptual import LPIPS_NAME, EfficientNetDistance, Lpips, perceptual_name
from training.phases.reconstruction import balance_at, blocks_passed
from training.planning.meter import Meter, Operations, forget_values
from training.recipes.recipe import PhaseRecipe


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part, and the bytes that one process holds for them."""

    name: str
    num_parameters: int
    num_trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int


@dataclass(frozen=True)
class Footprint:
    """Memory of one process, and operations per image.

    Attributes:
        parts: each module once; a discriminator that shares the tokenizer's encoder has only its heads.
        static_bytes: weights, moments, averages and the discriminator's gradients.
        kept_bytes: kept for the backward pass of one micro-batch.
        peak_bytes: the most that a step has allocated at once.
        generator: operations without, and with the adversarial loss.
        discriminator: operations of its training.
    """

    parts: list[PartSize]
    static_bytes: int
    kept_bytes: int
    peak_bytes: int
    generator: tuple[Operations, Operations]
    discriminator: Operations

    def operations_per_image(self, step: int, recipe: PhaseRecipe) -> Operations:
        """Operations of step ``step``; the discriminator and its loss set in at steps of their own."""
        starts, is_used = recipe.discriminator, recipe.loss.adversarial > 0
        generator = self.generator[is_used and step >= starts.adversarial_start_step]
        return generator + (self.discriminator if is_used and step >= starts.start_step else Operations())

    def run_operations(self, recipe: PhaseRecipe) -> Operations:
        """Operations of the whole run, evaluation aside."""
        starts = (0, recipe.discriminator.start_step, recipe.discriminator.adversarial_start_step)
        bounds = [*(min(start, recipe.num_steps) for start in starts), recipe.num_steps]
        total = Operations()
        for begin, end in pairwise(bounds):
            for dtype, count in self.operations_per_image(begin, recipe).items():
                total[dtype] += count * (end - begin) * recipe.batch_size
        return total


def measure_footprint(
    config: TokenizerConfig, recipe: PhaseRecipe, trained: Collection[str], num_processes: int = 1
) -> Footprint:
    """Count a step of a phase; needs no weight file but EfficientNet's.

    Args:
        config: of the tokenizer that is trained.
        recipe: batch, losses, precision, cache, strategy.
        trained: names of the tokenizer's trained parts.
        num_processes: of the run.
    """
    micro_batch = max(1, recipe.batch_size // (recipe.accumulation_steps * num_processes))
    step, block_bytes = _Step(config, recipe, trained, micro_batch), 0
    with FakeTensorMode():
        forget_values(*step.modules())
        plain, _ = step.run(is_adversarial=False)
        kept, judged = step.run(recipe.loss.adversarial > 0)
        if recipe.activation_checkpointing:
            num_blocks, whole_bytes = step.recompute(), kept.num_bytes
            kept, judged = step.run(recipe.loss.adversarial > 0)
            block_bytes = (whole_bytes - kept.num_bytes) // num_blocks
    shards = num_processes if recipe.distributed.strategy == "fsdp" else 1
    parts = [_part_size(name, part, shards if name == "decoder" else 1) for name, part in step.parts.items()]
    *_, heads = gradients = [part.gradient_bytes for part in parts]
    static = sum(part.weight_bytes + part.optimizer_bytes + part.ema_bytes for part in parts)
    static += heads if recipe.loss.adversarial else 0
    own = sum(gradients) - heads
    earlier = own if recipe.accumulation_steps > 1 else 0
    pictures = 2 * 4 * 3 * config.image_size**2 * micro_batch * recipe.accumulation_steps
    generating = earlier + kept.num_bytes + block_bytes + 2 * kept.largest_bytes
    judging = own + judged.num_bytes + 2 * judged.largest_bytes
    peak_bytes = static + pictures + max(generating, judging)
    counts = [Operations({k: v // micro_batch for k, v in m.total.items()}) for m in (plain, kept, judged)]
    return Footprint(
        parts, static, kept.num_bytes + block_bytes, peak_bytes, (counts[0], counts[1]), counts[2]
    )


class _Step:
    """One step of a phase, on networks without values."""

    def __init__(
        self, config: TokenizerConfig, recipe: PhaseRecipe, trained: Collection[str], micro_batch: int
    ) -> None:
        self.recipe, self.micro_batch = recipe, micro_batch
        name, is_lpips = gan.backbone_name(recipe.discriminator), perceptual_name(recipe.loss) == LPIPS_NAME
        is_shared = name != gan.DINO_NAME and not recipe.train_encoder
        with torch.device("meta"):
            self.tokenizer = Tokenizer(config)
            judge = Encoder(gan.DINO_CONFIG if name == gan.DINO_NAME else config.encoder)
            backbone = gan.FeatureBackbone(name, self.tokenizer.encoder if is_shared else judge)
            self.discriminator = gan.Discriminator(backbone, recipe.discriminator.augment_probability)
            lpips = Lpips(None, None) if is_lpips else None
        self.perceptual = lpips or EfficientNetDistance()
        parts: dict[str, Any] = {
            name: getattr(self.tokenizer, name) for name in ("encoder", "fusion", "decoder")
        }
        self.parts: dict[str, nn.Module] = {name: part for name, part in parts.items() if part is not None}
        for name in self.parts:
            parts[name].unfreeze() if name in trained else parts[name].freeze()
        self.parts["perceptual"] = self.perceptual
        self.parts["discriminator"] = self.discriminator.heads if is_shared else self.discriminator

    def recompute(self) -> int:
        """Recompute blocks from now on; gives their number."""
        blocks = blocks_passed(self.tokenizer)
        for block in blocks:
            block.register_forward_pre_hook(lambda _, inputs: self.meter.keep(inputs))
            checkpoint_activations(block)
        return len(blocks)

    def run(self, is_adversarial: bool) -> tuple["Meter", "Meter"]:
        """Meters of the generator's and of the discriminator's forward and backward pass."""
        own = [t for module in self.modules() for t in (*module.parameters(), *module.buffers())]
        self.meter, judged = Meter(own), Meter(own)
        with self.meter.modes():
            pair = self._generate(is_adversarial)
        if is_adversarial:
            with judged.modes():
                gan.discriminator_loss(*self._judge(torch.cat(pair)).chunk(2)).backward()
        for module in self.modules():
            module.zero_grad(set_to_none=True)
        return self.meter, judged

    def modules(self) -> tuple[nn.Module, ...]:
        return self.tokenizer, self.perceptual, self.discriminator

    def _generate(self, is_adversarial: bool) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch: images and reconstructions, [B, 3, S, S]."""
        weights, side = self.recipe.loss, self.tokenizer.config.image_size
        images = torch.empty(self.micro_batch, 3, side, side)
        dtype = products_dtype(resolve_device(self.recipe.device), self.recipe.precision)
        with autocast(images.device, str(dtype).removeprefix("torch.")):
            reconstructions = self.tokenizer.decoder(self._tokens(images)).float()
        total = weights.l1 * (reconstructions - images).abs().mean()
        if weights.perceptual:
            crop = slice(None, weights.perceptual_crop)
            pair = (reconstructions[..., crop, crop], images[..., crop, crop])
            total = total + weights.perceptual * self.perceptual(*pair).mean()
        if is_adversarial:
            adversarial = gan.generator_loss(self._judge(reconstructions))
            alpha = gan.adaptive_weight(total, adversarial, balance_at(self.tokenizer))
            total = total + weights.adversarial * alpha * adversarial
        total.backward()
        return images, reconstructions.detach()

    def _tokens(self, images: Tensor) -> Tensor:
        """Latent tokens [B, N, C]; with a cache the encoder does not run."""
        config, fusion = self.tokenizer.config, self.tokenizer.fusion
        if self.recipe.cache is None:
            states = self.tokenizer.encoder(self.tokenizer.preprocess(images))
        else:
            shape = (len(images), config.encoder.grid**2, config.encoder.width)
            states = [torch.empty(shape) for _ in config.fused_layers]
        return token_norm(states[-1], config.encoder.layer_norm_eps) if fusion is None else fusion(states)

    def _judge(self, images: Tensor) -> Tensor:
        return self.discriminator(images, torch.empty(len(images), gan.NUM_DRAWS))


def _part_size(name: str, module: nn.Module, num_shards: int) -> PartSize:
    sizes = [(p.numel(), p.nbytes, p.requires_grad) for p in module.parameters()]
    trained_bytes = sum(size for _, size, is_trained in sizes if is_trained) // num_shards
    return PartSize(
        name=name,
        num_parameters=sum(count for count, *_ in sizes),
        num_trained=sum(count for count, _, is_trained in sizes if is_trained),
        weight_bytes=sum(t.nbytes for t in (*module.parameters(), *module.buffers())) // num_shards,
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        ema_bytes=0 if name == "discriminator" else trained_bytes,
    )
