"""Adversarial loss: frozen ViT features with light heads, DiffAug, hinge (StyleGAN-T, RAE).

Shape legend: B batch, C backbone width, N patch tokens.
"""

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from model.config import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig, PixelTriple, TokenizerConfig
from model.networks.encoder import Encoder
from model.networks.vit import Freezable
from training.distributed.ranks import Ranks
from training.errors import WeightsError
from training.losses.perceptual import read_weights
from training.recipes.recipe import DiscriminatorConfig

DINO_NAME = "dino-vits8"
DINO_CONFIG = EncoderConfig(width=384, num_heads=6, patch_size=8, num_registers=0, position_grid=28)
# The embedded input (0) and the blocks 2, 5, 8 and 11 counted from 0, as RAE taps them.
TAPS = (0, 3, 6, 9, 12)
TRANSLATION = 0.125
NUM_DRAWS = 7  # uniform numbers that augmenting one sample takes


class FeatureBackbone(Freezable):
    """A frozen ViT whose tapped hidden states the heads judge.

    Args:
        name: of the network, for logs and checkpoints.
        encoder: the ViT.
        pixel_mean, pixel_std: what it wants its pixels normalised by, per channel.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        pixel_mean: PixelTriple = IMAGENET_MEAN,
        pixel_std: PixelTriple = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.name = name
        self.encoder = encoder
        self.taps = tuple(min(tap, encoder.config.depth) for tap in TAPS)
        self.register_buffer("mean", torch.tensor(pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixel_std).view(1, 3, 1, 1), persistent=False)
        self.freeze()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Tapped patch tokens of images [B, 3, H, W] in [0, 1]: tensors [B, C, N]."""
        side = self.encoder.config.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
        tokens = self.encoder.embed((images - self.mean) / self.std)
        states = [tokens]
        for block in self.encoder.blocks:
            states.append(block(states[-1]))
        prefix = self.encoder.config.num_prefix_tokens
        return [states[tap][:, prefix:].transpose(1, 2) for tap in self.taps]


class Head(nn.Module):
    """Spectral-norm convolutions over the token sequence, one logit a token. [B, C, N] -> [B, N]."""

    def __init__(self, width: int, kernel_size: int = 9) -> None:
        super().__init__()
        self.enter = _convolution(width, width, 1)
        self.mix = _convolution(width, width, kernel_size)
        self.judge = _convolution(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.leaky_relu(F.group_norm(self.enter(features), 8), 0.2)
        mixed = F.leaky_relu(F.group_norm(self.mix(hidden), 8), 0.2)
        return self.judge((hidden + mixed) / 2**0.5).squeeze(1)


class Discriminator(nn.Module):
    """Heads over a frozen backbone. The backbone has no gradients of its own, its input does.

    The heads stay in eval mode, where spectral norm only uses its vectors: they are moved by `iterate_norms`
    alone, so that their number of steps does not depend on how a batch is split.
    """

    def __init__(self, backbone: FeatureBackbone, augment_probability: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.augment_probability = augment_probability
        self.heads = nn.ModuleList(Head(backbone.encoder.config.width) for _ in backbone.taps)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def iterate_norms(self) -> None:
        """One power iteration of every spectral norm; once before the losses of a step that use them."""
        for head in self.heads:
            for convolution in head.children():
                convolution.train()
                assert isinstance(convolution.weight, Tensor)  # reading it in training mode iterates
                convolution.eval()

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """Logits [B, heads * N] of images [B, 3, H, W] in [0, 1], augmented first by draws [B, 7]."""
        features = self.backbone(diff_augment(images, self.augment_probability, draws))
        return torch.cat([head(f) for head, f in zip(self.heads, features, strict=True)], dim=1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: ``mean(relu(1 - D(x))) + mean(relu(1 + D(x')))``, halved."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """``-mean(D(x'))``."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> Tensor:
    """alpha: ratio of the two terms' gradient norms at the decoder's last layer, in [0, 1e4] (VQGAN).

    The norms are of the gradients' means over ranks, those of the whole batch: a mean of norms would not be.

    Args:
        reconstruction, adversarial: scalar losses of one graph.
        last_layer: the weight that both reach.
        ranks: those that the batch is shared among.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    if ranks.size > 1:
        wanted, given = ranks.all_reduce_mean(torch.stack([wanted, given]))
    return (wanted.norm() / (given.norm() + 1e-6)).clamp(0, 1e4).detach()


def diff_augment(images: Tensor, probability: float, draws: Tensor) -> Tensor:
    """DiffAug (Zhao et al. 2020): brightness, saturation, contrast, translation; differentiable.

    Args:
        images: [B, 3, H, W].
        probability: chance of each of colour and translation, a sample.
        draws: [B, 7] uniform numbers in [0, 1), which decide everything.
    """
    if probability == 0:
        return images
    columns = draws.to(images.device)[:, :, None, None, None].unbind(dim=1)  # seven of [B, 1, 1, 1]
    is_colored, is_moved = columns[3] < probability, columns[6] < probability
    brightness, saturation, contrast = columns[0] - 0.5, columns[1] * 2, columns[2] + 0.5
    colored = images + brightness
    grey = colored.mean(dim=1, keepdim=True)
    colored = (colored - grey) * saturation + grey
    mean = colored.mean(dim=(1, 2, 3), keepdim=True)
    colored = (colored - mean) * contrast + mean
    images = torch.where(is_colored, colored, images)
    shifts = torch.cat(columns[4:6], dim=1).flatten(1) * 2 - 1
    moved = _translate(images, shifts * TRANSLATION)
    return torch.where(is_moved, moved, images)


def make_backbone(
    config: DiscriminatorConfig, encoder: Encoder, tokenizer: TokenizerConfig
) -> FeatureBackbone:
    """DINO ViT-S/8 where its weights are given, else the tokenizer's own frozen encoder.

    Raises:
        WeightsError: ``dino-vits8`` is asked for without readable weights.
    """
    if backbone_name(config) == "encoder":
        return FeatureBackbone("encoder", encoder, tokenizer.pixel_mean, tokenizer.pixel_std)
    if config.dino_weights is None:
        raise WeightsError(
            "discriminator.backbone is dino-vits8: set discriminator.dino_weights to its state dict"
        )
    dino = Encoder(DINO_CONFIG)
    state = dino_encoder_state(read_weights(config.dino_weights))
    expected = dino.state_dict()
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            raise WeightsError(f"{config.dino_weights}: no DINO ViT-S/8: {name} is missing or mis-shaped")
    dino.load_state_dict(state)
    return FeatureBackbone(DINO_NAME, dino)


def backbone_name(config: DiscriminatorConfig) -> str:
    """The backbone that a recipe gets: ``auto`` is DINO where its weights are given."""
    if config.backbone == "auto":
        return "encoder" if config.dino_weights is None else DINO_NAME
    return config.backbone


def dino_encoder_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename DINO's ViT state dict to `Encoder`'s; LayerScale, which DINO lacks, becomes ones."""
    names = {
        "norm1": "norm_attention",
        "norm2": "norm_mlp",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.out",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    state = {"register_tokens": torch.zeros(1, 0, DINO_CONFIG.width)}
    for name, tensor in weights.items():
        renamed = {"cls_token": "class_token", "pos_embed": "positions"}.get(name, name)
        renamed = renamed.replace("patch_embed.proj.", "patch_embed.")
        if renamed.startswith("blocks."):
            _, number, rest = renamed.split(".", 2)
            part, _, kind = rest.rpartition(".")
            renamed = f"blocks.{number}.{names.get(part, part)}.{kind}"
            state[f"blocks.{number}.scale_attention.gain"] = torch.ones(DINO_CONFIG.width)
            state[f"blocks.{number}.scale_mlp.gain"] = torch.ones(DINO_CONFIG.width)
        if not renamed.startswith(("norm.", "head.")):
            state[renamed] = tensor
    return state


def _convolution(width_in: int, width_out: int, kernel_size: int) -> nn.Module:
    convolution = nn.Conv1d(
        width_in, width_out, kernel_size, padding=kernel_size // 2, padding_mode="circular"
    )
    return spectral_norm(convolution)


def _translate(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift each image by shares of its side, [B, 2] as (x, y), to whole pixels; zeros move in."""
    side = images.shape[-1]
    pixels = (shifts * side).round() / side
    identity = torch.eye(2, device=images.device, dtype=images.dtype).expand(len(images), 2, 2)
    transform = torch.cat([identity, 2 * pixels[..., None]], dim=2)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)
