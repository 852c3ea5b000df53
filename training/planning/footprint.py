"""What a training step costs, counted without doing it: memory by part, and operations.

The step's own modules run on tensors that have shapes but no values (torch's fake tensors), forward and
backward, while every allocation and release is followed. Nothing is estimated by a formula but what
never changes: weights, averages, AdamW's two moments.

Not in it: the CUDA context, workspaces of libraries, and fragmentation, together some 1 to 2 GiB.

Shape legend: B micro-batch, S image side, L fused layers, N tokens, C latent width.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.reference import token_norm
from model.config import TokenizerConfig
from model.networks.encoder import Encoder
from model.tokenizer import Tokenizer
from training.distributed.device import autocast
from training.distributed.modules import checkpoint_activations
from training.losses.adversarial import (
    DINO_CONFIG,
    DINO_NAME,
    NUM_DRAWS,
    Discriminator,
    FeatureBackbone,
    adaptive_weight,
    backbone_name,
    discriminator_loss,
    generator_loss,
)
from training.losses.perceptual import LPIPS_NAME, EfficientNetDistance, Lpips, perceptual_name
from training.planning.operations import Operations, StepTracker
from training.recipes.recipe import PhaseRecipe

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class PartSize:
    """One part's parameters, and the bytes that stay allocated for it through every step."""

    name: str
    num_parameters: int
    num_trained: int
    weight_bytes: int
    """Buffers included."""
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch of a step allocates and computes."""

    activation_bytes: dict[str, int]
    """What each stage's forward pass leaves for the backward pass, by stage."""
    peak_bytes: int
    """Most that is allocated at once besides weights, moments and averages; gradients included."""
    operations: dict[str, Operations]
    """For one image, by stage."""

    @property
    def operations_per_image(self) -> Operations:
        return sum(self.operations.values(), Operations())


@dataclass(frozen=True)
class Footprint:
    """Parts, and the step before and after the adversarial loss sets in."""

    parts: list[PartSize]
    plain: StepCost
    adversarial: StepCost | None
    """With the discriminator trained and its loss used; None where it has no weight."""
    micro_batch: int

    @property
    def static_bytes(self) -> int:
        """Weights, moments and averages."""
        return sum(part.weight_bytes + part.optimizer_bytes + part.ema_bytes for part in self.parts)

    @property
    def peak_bytes(self) -> int:
        """The most that a step has allocated at once."""
        return self.static_bytes + max(
            cost.peak_bytes for cost in (self.plain, self.adversarial) if cost is not None
        )

    def operations_per_image(self, step: int, recipe: PhaseRecipe) -> Operations:
        """Of step ``step``: the discriminator and its loss set in at steps of their own."""
        total = self.plain.operations_per_image
        if self.adversarial is None or step < recipe.discriminator.start_step:
            return total
        if step < recipe.discriminator.adversarial_start_step:
            return total + self.adversarial.operations["discriminator"]
        return self.adversarial.operations_per_image

    def run_operations(self, recipe: PhaseRecipe) -> Operations:
        """Of the whole run, evaluation aside."""
        starts = (0, recipe.discriminator.start_step, recipe.discriminator.adversarial_start_step)
        bounds = [min(start, recipe.num_steps) for start in starts] + [recipe.num_steps]
        spans = zip(starts, bounds, bounds[1:], strict=False)
        total = Operations()
        for step, begin, end in spans:
            total += self.operations_per_image(step, recipe).times(end - begin)
        return total.times(recipe.batch_size)


class Networks:
    """The modules of a phase, as `training.phases.reconstruction` builds them, with or without values."""

    def __init__(
        self, tokenizer: Tokenizer, perceptual: EfficientNetDistance | Lpips, discriminator: Discriminator
    ) -> None:
        self.tokenizer = tokenizer
        self.perceptual = perceptual
        self.discriminator = discriminator

    def parts(self) -> Mapping[str, nn.Module]:
        """Each module once; a discriminator that judges by the tokenizer's encoder adds only its heads."""
        found: dict[str, nn.Module] = {"encoder": self.tokenizer.encoder}
        if self.tokenizer.fusion is not None:
            found["fusion"] = self.tokenizer.fusion
        found |= {"decoder": self.tokenizer.decoder, "perceptual": self.perceptual}
        is_shared = self.discriminator.backbone.encoder is self.tokenizer.encoder
        return found | {"discriminator": self.discriminator.heads if is_shared else self.discriminator}


def build_networks(config: TokenizerConfig, recipe: PhaseRecipe, trained: Collection[str]) -> Networks:
    """The networks of a phase without values; no weight file is needed.

    Args:
        config: of the tokenizer that the phase trains.
        recipe: chooses the perceptual network and the discriminator's backbone.
        trained: names of the tokenizer's parts that get gradients.
    """
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
        name = backbone_name(recipe.discriminator)
        shares_encoder = name != DINO_NAME and not recipe.train_encoder
        encoder = Encoder(DINO_CONFIG if name == DINO_NAME else config.encoder)
        backbone = FeatureBackbone(name, tokenizer.encoder if shares_encoder else encoder)
        discriminator = Discriminator(backbone, recipe.discriminator.augment_probability)
        perceptual = Lpips(None, None) if perceptual_name(recipe.loss) == LPIPS_NAME else None
    for part in ("encoder", "fusion", "decoder"):
        module = getattr(tokenizer, part)
        if module is not None:
            module.unfreeze() if part in trained else module.freeze()
    if recipe.activation_checkpointing:
        for module in modules_passed(tokenizer):
            checkpoint_activations(module)
    return Networks(tokenizer, perceptual or EfficientNetDistance(), discriminator)


def modules_passed(tokenizer: Tokenizer) -> list[nn.Module]:
    """The blocks that gradients pass, the frozen decoder's too, which a run may recompute."""
    passed: list[nn.Module] = [*tokenizer.decoder.blocks]
    if not tokenizer.encoder.frozen:
        passed += tokenizer.encoder.blocks
    if tokenizer.fusion is not None and not tokenizer.fusion.frozen:
        passed.append(tokenizer.fusion.mixer)
    return passed


def measure_footprint(
    networks: Networks,
    recipe: PhaseRecipe,
    micro_batch: int,
    num_micro_batches: int = 1,
    num_processes: int = 1,
) -> Footprint:
    """Count a step of these networks.

    Args:
        networks: of `build_networks`; they lose their values.
        recipe: losses, precision, cache.
        micro_batch: images of one forward pass.
        num_micro_batches: of one process in one step; from two on, gradients are there from the start.
        num_processes: that FSDP2 shards the decoder over, where the recipe has it.
    """
    with FakeTensorMode():
        for module in networks.parts().values():
            _forget_values(module)
        _forget_values(networks.tokenizer)
        _forget_values(networks.discriminator)
        step = StepSimulation(networks, recipe, micro_batch, num_micro_batches)
        plain = step.run(is_adversarial=False)
        adversarial = step.run(is_adversarial=True) if recipe.loss.adversarial else None
    is_sharded = recipe.distributed.strategy == "fsdp"
    parts = _part_sizes(networks, num_processes if is_sharded else 1)
    saved = sum(p.nbytes for p in networks.tokenizer.decoder.parameters() if p.requires_grad) - next(
        part.gradient_bytes for part in parts if part.name == "decoder"
    )
    plain = replace(plain, peak_bytes=plain.peak_bytes - saved)
    if adversarial is not None:
        adversarial = replace(adversarial, peak_bytes=adversarial.peak_bytes - saved)
    return Footprint(parts, plain, adversarial, micro_batch)


class StepSimulation:
    """One optimizer step up to its gradients, stage by stage, as phases 1 to 3 take it."""

    def __init__(
        self, networks: Networks, recipe: PhaseRecipe, micro_batch: int, num_micro_batches: int
    ) -> None:
        self.networks = networks
        self.recipe = recipe
        self.micro_batch = micro_batch
        self.num_micro_batches = num_micro_batches
        self.device = torch.device("cpu")
        self.precision = _precision(recipe)
        self.tracker = StepTracker()
        self.activations: dict[str, int] = {}
        self.operations: dict[str, Operations] = {}

    def run(self, is_adversarial: bool) -> StepCost:
        """Cost of one micro-batch; the peak is that of the whole step."""
        networks = (self.networks.tokenizer, self.networks.perceptual, self.networks.discriminator)
        self.tracker, self.activations, self.operations = StepTracker(), {}, {}
        self.tracker.ignore(t for module in networks for t in (*module.parameters(), *module.buffers()))
        with self.tracker:
            pairs = []
            for _ in range(min(self.num_micro_batches, 2)):
                self.operations.clear()
                pairs.append(self._generate(is_adversarial))
            # Of the others only the images remain, until the discriminator has seen them.
            num_waiting = (self.num_micro_batches - len(pairs)) * self.micro_batch
            waiting = torch.empty(2 * num_waiting, *pairs[0][0].shape[1:])
            if is_adversarial:
                with self._stage("discriminator"):
                    logits = self._judge(torch.cat(pairs[-1]))
                    discriminator_loss(*logits.chunk(2)).backward()
            del waiting
        peak = self.tracker.peak_bytes
        for module in networks:
            module.zero_grad(set_to_none=True)
        operations = {name: count.over(self.micro_batch) for name, count in self.operations.items()}
        return StepCost(dict(self.activations), peak, operations)

    def _generate(self, is_adversarial: bool) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch: images and reconstructions, [B, 3, S, S]."""
        weights, decoder = self.recipe.loss, self.networks.tokenizer.decoder
        side = self.networks.tokenizer.config.image_size
        images = torch.empty(self.micro_batch, 3, side, side)
        with autocast(self.device, self.precision):
            tokens = self._tokens(images)
            with self._stage("decoder"):
                reconstructions = decoder(tokens).float()
        with self._stage("losses"):
            total = weights.l1 * (reconstructions - images).abs().mean()
            if weights.perceptual:
                crop = slice(None, weights.perceptual_crop)
                pair = (reconstructions[..., crop, crop], images[..., crop, crop])
                total = total + weights.perceptual * self.networks.perceptual(*pair).mean()
        if is_adversarial:
            with self._stage("adversarial"):
                adversarial = generator_loss(self._judge(reconstructions))
                alpha = adaptive_weight(total, adversarial, self._balance_at())
                total = total + weights.adversarial * alpha * adversarial
        with self._stage("backward"):
            total.backward()
        return images, reconstructions.detach()

    def _tokens(self, images: Tensor) -> Tensor:
        """Latent tokens [B, N, C], from the cache where the recipe has one."""
        tokenizer, config = self.networks.tokenizer, self.networks.tokenizer.config
        shape = (self.micro_batch, config.encoder.grid**2, config.encoder.width)
        if self.recipe.cache is not None:
            states = [torch.empty(shape) for _ in config.fused_layers]
        else:
            with self._stage("encoder"):
                states = tokenizer.encoder(tokenizer.preprocess(images))
        with self._stage("fusion"):
            if tokenizer.fusion is None:
                return token_norm(states[-1], config.encoder.layer_norm_eps)
            return tokenizer.fusion(states)

    def _judge(self, images: Tensor) -> Tensor:
        return self.networks.discriminator(images, torch.empty(len(images), NUM_DRAWS))

    def _balance_at(self) -> Tensor:
        decoder, fusion = self.networks.tokenizer.decoder, self.networks.tokenizer.fusion
        if not decoder.frozen or fusion is None:
            return decoder.last_layer
        return fusion.last_layer

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        live, operations = self.tracker.live_bytes, self.tracker.operations
        yield
        if name not in ("backward", "discriminator"):
            self.activations[name] = max(0, self.tracker.live_bytes - live)
        self.operations[name] = self.tracker.operations - operations


def _precision(recipe: PhaseRecipe) -> str:
    """Of the device that the recipe names, whether it is here or not."""
    if recipe.precision != "auto":
        return recipe.precision
    on_cuda = recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available())
    return "bfloat16" if on_cuda else "float32"


def _forget_values(module: nn.Module) -> None:
    """Replace every tensor of a module, within a `FakeTensorMode`, by one that has only a shape."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not _is_fake(parameter):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None and not _is_fake(buffer):
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _is_fake(tensor: Tensor) -> bool:
    return hasattr(tensor, "fake_mode")


def _part_sizes(networks: Networks, num_shards: int) -> list[PartSize]:
    """Sizes on one process; of the decoder a share, if it is sharded."""
    sizes = []
    for name, module in networks.parts().items():
        parameters = list(module.parameters())
        share = num_shards if name == "decoder" else 1
        trained_bytes = sum(p.nbytes for p in parameters if p.requires_grad) // share
        sizes.append(
            PartSize(
                name=name,
                num_parameters=sum(p.numel() for p in parameters),
                num_trained=sum(p.numel() for p in parameters if p.requires_grad),
                weight_bytes=sum(t.nbytes for t in (*parameters, *module.buffers())) // share,
                gradient_bytes=trained_bytes,
                optimizer_bytes=ADAM_MOMENTS * trained_bytes,
                ema_bytes=trained_bytes if name != "discriminator" else 0,
            )
        )
    return sizes
