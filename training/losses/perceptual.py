"""Perceptual distance: LPIPS (VGG) where its weights are available, else EfficientNet-Lite0 features.

Shape legend: B batch, C channels of a stage.
"""

import importlib.util
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.networks.vit import Freezable
from training.errors import WeightsError
from training.losses.efficientnet import NAME, EfficientNetLite0
from training.recipes.recipe import LossConfig

logger = logging.getLogger(__name__)

LPIPS_NAME = "lpips-vgg"
# VGG16 up to relu5_3; each inner tuple ends at a tap: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG_FILE = "vgg16-397923af.pth"
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10


class EfficientNetDistance(Freezable):
    """Mean over five stages of the squared distance between channel-normalised features."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite0()
        self.freeze()

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance [B] of images to references, each [B, 3, H, W] in [0, 1]."""
        with torch.no_grad():
            targets = self.network.stages(references)
        pairs = zip(self.network.stages(images), targets, strict=True)
        stages = [_unit(a).sub(_unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
        return torch.stack(stages).mean(dim=0)


class Lpips(Freezable):
    """LPIPS v0.1 with VGG16 (Zhang et al. 2018), from torchvision's and LPIPS's own weight files."""

    name = LPIPS_NAME

    def __init__(self, vgg_weights: Path | None, lpips_weights: Path | None) -> None:
        """Without a file its weights are random, which is good for counting alone."""
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.stages = nn.ModuleList(_vgg_stages())
        widths = [stage[-1] for stage in VGG_STAGES]
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE).view(1, 3, 1, 1))
        if vgg_weights is not None:
            self._load_vgg(read_weights(vgg_weights), vgg_weights)
        if lpips_weights is not None:
            self._load_heads(read_weights(lpips_weights), lpips_weights)
        self.freeze()

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance [B] of images to references, each [B, 3, H, W] in [0, 1]."""
        with torch.no_grad():
            targets = self._features(references)
        total = images.new_zeros(len(images))
        for head, a, b in zip(self.heads, self._features(images), targets, strict=True):
            total = total + head(_unit(a).sub(_unit(b)).square()).mean(dim=(1, 2, 3))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        hidden = (images * 2 - 1 - self.shift) / self.scale
        maps = []
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return maps

    def _load_vgg(self, weights: Mapping[str, Tensor], file: Path) -> None:
        index = 0  # torchvision numbers convolutions, activations and pools in one sequence
        for number, stage in enumerate(self.stages):
            index += number > 0
            for layer in stage.children():
                if isinstance(layer, nn.Conv2d):
                    _copy(layer.weight, weights, f"features.{index}.weight", file)
                    assert layer.bias is not None
                    _copy(layer.bias, weights, f"features.{index}.bias", file)
                    index += 2

    def _load_heads(self, weights: Mapping[str, Tensor], file: Path) -> None:
        for number, head in enumerate(self.heads):
            _copy(head.get_parameter("weight"), weights, f"lin{number}.model.1.weight", file)


class CroppedDistance(nn.Module):
    """Mean distance over a batch, on one random square of it where a side is given.

    The crop bounds the cost on small machines; its place changes every step.
    """

    def __init__(self, distance: EfficientNetDistance | Lpips, side: int | None) -> None:
        super().__init__()
        self.distance = distance
        self.side = side

    @property
    def name(self) -> str:
        return self.distance.name

    def forward(self, images: Tensor, references: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar; images and references [B, 3, H, W] in [0, 1]."""
        if self.side is not None and self.side < images.shape[-1]:
            limit = images.shape[-1] - self.side + 1
            top, left = torch.randint(limit, (2,), generator=generator, device=generator.device).tolist()
            window = (..., slice(top, top + self.side), slice(left, left + self.side))
            images, references = images[window], references[window]
        return self.distance(images, references).mean()


def make_perceptual(config: LossConfig) -> CroppedDistance:
    """The network that the recipe names, or for ``auto`` the best one whose weights are here.

    Raises:
        WeightsError: the named network's weights are absent; says where they were looked for.
    """
    vgg, lpips = _find_vgg(config), _find_lpips(config)
    if perceptual_name(config) == NAME:
        return CroppedDistance(EfficientNetDistance(), config.perceptual_crop)
    if vgg is None:
        raise WeightsError(
            f"loss.perceptual_network is {LPIPS_NAME} but no VGG16 weights were found: "
            f"set loss.vgg_weights to torchvision's {VGG_FILE}"
        )
    if lpips is None:
        raise WeightsError(
            f"loss.perceptual_network is {LPIPS_NAME} but no LPIPS heads were found: "
            "set loss.lpips_weights to lpips/weights/v0.1/vgg.pth, or install the lpips package"
        )
    return CroppedDistance(Lpips(vgg, lpips), config.perceptual_crop)


def perceptual_name(config: LossConfig) -> str:
    """The network that a recipe gets: ``auto`` is LPIPS where both its files are found."""
    if config.perceptual_network != "auto":
        return config.perceptual_network
    return LPIPS_NAME if _find_vgg(config) and _find_lpips(config) else NAME


def find_lpips(vgg_weights: Path | None = None, lpips_weights: Path | None = None) -> tuple[Path, Path]:
    """VGG16's and LPIPS's weight files: those given, else torch hub's cached one and the lpips package's.

    Raises:
        WeightsError: one of them is nowhere; says how to name it.
    """
    config = LossConfig(vgg_weights=vgg_weights, lpips_weights=lpips_weights)
    vgg, lpips = _find_vgg(config), _find_lpips(config)
    if vgg is None:
        raise WeightsError(f"lpips needs VGG16's weights: name torchvision's {VGG_FILE} with --vgg-weights")
    if lpips is None:
        raise WeightsError(
            "lpips needs its linear heads: name lpips/weights/v0.1/vgg.pth with --lpips-weights, "
            "or install the lpips package"
        )
    return vgg, lpips


def _find_vgg(config: LossConfig) -> Path | None:
    default = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    return config.vgg_weights or (default if default.exists() else None)


def _find_lpips(config: LossConfig) -> Path | None:
    if config.lpips_weights is not None:
        return config.lpips_weights
    spec = importlib.util.find_spec("lpips")  # found, not imported: the package imports torchvision
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"


def _vgg_stages() -> list[nn.Sequential]:
    stages, width = [], 3
    for number, widths in enumerate(VGG_STAGES):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        for next_width in widths:
            layers += [nn.Conv2d(width, next_width, 3, padding=1), nn.ReLU()]
            width = next_width
        stages.append(nn.Sequential(*layers))
    return stages


def _unit(features: Tensor) -> Tensor:
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + NORM_EPS)


def read_weights(file: Path) -> Mapping[str, Tensor]:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise WeightsError(f"{file}: no such file") from exc
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        raise WeightsError(f"{file}: not a readable state dict") from exc
    if not isinstance(weights, Mapping):
        raise WeightsError(f"{file}: not a state dict")
    return weights


def _copy(parameter: Tensor, weights: Mapping[str, Tensor], name: str, file: Path) -> None:
    if name not in weights:
        raise WeightsError(f"{file}: tensor {name!r} is missing")
    if weights[name].shape != parameter.shape:
        found, wanted = list(weights[name].shape), list(parameter.shape)
        raise WeightsError(f"{file}: tensor {name!r} has shape {found}, expected {wanted}")
    with torch.no_grad():
        parameter.copy_(weights[name])
