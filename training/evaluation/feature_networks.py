"""Networks in whose features image sets are compared, and where their weights come from.

`EfficientNetFeatures` needs only the training extra. `InceptionFeatures` is the network of FID:
torch-fidelity's port of the TensorFlow graph, which torchmetrics wraps too. Nothing here downloads weights.

Shape legend: B batch, D width of features.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.errors import WeightsError
from training.losses.efficientnet import FEATURE_WIDTH, EfficientNetLite0
from training.losses.perceptual import read_weights

EFFICIENTNET_COLUMN = "frechet_efficientnet_lite0"
EFFICIENTNET_SIDE = 224
INCEPTION_COLUMN = "rfid"
INCEPTION_WIDTH = 2048
INCEPTION_LOGITS = "logits_unbiased"  # as the Inception score takes them
# torch-fidelity's and pytorch-fid's names of the same file; the digits begin its sha256.
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILES[0]}"


class FeatureNetwork(Protocol):
    """Frozen network that gives one feature vector an image."""

    column: str
    """Name of the Frechet distance in its features, in tables and files."""
    title: str
    width: int

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W] uint8."""


class EfficientNetFeatures:
    """Pooled features of EfficientNet-Lite0's head, at its own 224 pixels (antialiased bicubic)."""

    column = EFFICIENTNET_COLUMN
    title = "Frechet, EfficientNet-Lite0"
    width = FEATURE_WIDTH

    def __init__(self, device: torch.device) -> None:
        self.network = EfficientNetLite0().to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [B, 1280] of images [B, 3, H, W] uint8."""
        pixels = images.float() / 255
        size = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        _, maps = self.network.classify(self.network.stages(pixels))
        return maps.mean(dim=(2, 3))


class InceptionFeatures:
    """FID's Inception v3 (2015-12-05), pool features.

    Args:
        weights: torch-fidelity's or pytorch-fid's weight file; by default the one in torch hub's cache.
        device: where it runs.
        sha256_prefix: with which the file's digest begins; FID is defined by these weights alone.
        with_logits: whether `outputs` is wanted too.

    Raises:
        WeightsError: the package or the file is absent, or the file holds something else.
    """

    column = INCEPTION_COLUMN
    title = "rFID"
    width = INCEPTION_WIDTH

    def __init__(
        self,
        weights: Path | None,
        device: torch.device,
        sha256_prefix: str = INCEPTION_SHA256_PREFIX,
        with_logits: bool = False,
    ) -> None:
        file = weights or find_inception()
        if importlib.util.find_spec("torch_fidelity") is None:
            raise WeightsError("rfid needs the package 'torch-fidelity': pip install 'drorae[evaluation]'")
        if file is None:
            raise WeightsError(
                f"rfid needs FID's Inception weights: fetch {INCEPTION_URL} and name the file "
                "with --inception-weights, or put it in torch hub's cache"
            )
        _check_weights(file, sha256_prefix)
        from torch_fidelity import FeatureExtractorInceptionV3  # loads torchvision

        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                [str(INCEPTION_WIDTH), *([INCEPTION_LOGITS] if with_logits else [])],
                feature_extractor_weights_path=str(file),
            )
        except RuntimeError as exc:
            raise WeightsError(f"{file}: not FID's Inception weights: {exc}") from exc
        self.network = network.to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [B, 2048] of images [B, 3, H, W] uint8; the network resizes them to 299 pixels itself."""
        pooled: Tensor = self.network(images)[0]
        return pooled

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 2048], and logits [B, 1008] without the bias; needs ``with_logits``."""
        pooled, logits = self.network(images)
        return pooled, logits


def find_inception() -> Path | None:
    """FID's Inception weights in torch hub's cache, where torch-fidelity and pytorch-fid leave them."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in INCEPTION_FILES if (folder / name).is_file()), None)


def _check_weights(file: Path, sha256_prefix: str) -> None:
    """The right file, and one that unpickles to tensors alone: torch-fidelity itself would run anything."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise WeightsError(f"{file}: cannot be read: {exc.strerror}") from exc
    if not digest.startswith(sha256_prefix):
        raise WeightsError(
            f"{file}: sha256 begins with {digest[:8]}, that of FID's Inception weights with {sha256_prefix}: "
            "truncated, or another network"
        )
    read_weights(file)
