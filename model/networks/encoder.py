"""The frozen encoder: a ViT (DINOv2, SigLIP 2 or MAE) that gives every block's patch tokens.

Shape legend: B batch, N patch tokens, C width, S input side, P prefix (class and register) tokens.
"""

from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EncoderConfig, PositionResize
from model.networks.vit import Block, Freezable, initialize_linear, sincos_positions

INITIAL_LAYER_SCALE = 1.0
# Each as transformers resizes the table of the models that were trained so.
RESIZE_OPTIONS: dict[PositionResize, dict[str, Any]] = {
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},  # DINOv2 with registers
    "bicubic": {"mode": "bicubic", "antialias": False},  # DINOv2, SigLIP, MAE
    "bilinear_antialias": {"mode": "bilinear", "antialias": True},  # SigLIP 2 NaFlex
}


class Encoder(Freezable):
    """Pre-norm ViT without its final norm; `EncoderConfig` tells the families apart."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, width))
        self.positions: Tensor
        self._make_positions()
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.num_heads,
                config.mlp_width,
                config.layer_norm_eps,
                layer_scale=INITIAL_LAYER_SCALE if config.layer_scale else None,
                mlp=config.mlp,
            )
            for _ in range(config.depth)
        )
        self.resized_positions: Tensor | None
        self.register_buffer("resized_positions", None, persistent=False)
        self.apply(initialize_linear)
        for parameter in (self.class_token, self.register_tokens, self.positions):
            if isinstance(parameter, nn.Parameter):
                nn.init.trunc_normal_(parameter, std=0.02)

    def _make_positions(self) -> None:
        """Table [1, class token + grid * grid, C]; a fixed one is stored too, so that imports stay exact."""
        config = self.config
        if config.positions == "sincos":
            table = sincos_positions(config.width, config.position_grid)
            self.register_buffer("positions", table[:, 0 if config.class_token else 1 :].clone())
        else:
            num_positions = int(config.class_token) + config.position_grid**2
            self.positions = nn.Parameter(torch.zeros(1, num_positions, config.width))

    def freeze(self) -> Self:
        """Also resize the position table once, for inputs of the configured size."""
        super().freeze()
        with torch.no_grad():
            self.resized_positions = self._resize_positions(self.config.grid, self.config.grid).clone()
        return self

    def forget_derived(self) -> None:
        self.resized_positions = None

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Patch tokens after each block, before any final norm.

        Args:
            pixels: [B, 3, S, S], normalised as the encoder wants; S any multiple of the patch size.

        Returns:
            L tensors z^(k) of shape [B, N, C], views that skip the class and register tokens.
        """
        prefix = self.config.num_prefix_tokens
        return [tokens[:, prefix:] for tokens in self.hidden_states(pixels)]

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """As `forward`, with the class and register tokens in front: L tensors [B, P + N, C].

        Without gradients they are slices of one tensor [L, B, P + N, C], where the fused kernels read them.
        """
        tokens = self.embed(pixels)
        is_inference = not (torch.is_grad_enabled() or torch.is_autocast_enabled(tokens.device.type))
        places: Iterable[Tensor | None] = (
            tokens.new_empty(len(self.blocks), *tokens.shape) if is_inference else [None] * len(self.blocks)
        )
        states = []
        for block, place in zip(self.blocks, places, strict=True):
            tokens = block(tokens, place)
            states.append(tokens)
        return states

    def embed(self, pixels: Tensor) -> Tensor:
        """The first block's input: class, register and patch embeddings, [B, P + N, C]."""
        patches = self.patch_embed(pixels)  # [B, C, rows, columns]
        num_rows, num_columns = patches.shape[-2:]
        positions = self._positions_for(num_rows, num_columns)
        num_leading = int(self.config.class_token)  # positions that no patch has
        patches = patches.flatten(2).transpose(1, 2) + positions[:, num_leading:]
        prefix: list[Tensor] = [self.register_tokens]
        if self.class_token is not None:
            prefix.insert(0, self.class_token + positions[:, :1])
        batch = patches.shape[0]
        return torch.cat([*(tokens.expand(batch, -1, -1) for tokens in prefix), patches], dim=1)

    def _positions_for(self, num_rows: int, num_columns: int) -> Tensor:
        if self.resized_positions is not None and num_rows == num_columns == self.config.grid:
            return self.resized_positions
        return self._resize_positions(num_rows, num_columns)

    def _resize_positions(self, num_rows: int, num_columns: int) -> Tensor:
        side = self.config.position_grid
        if (num_rows, num_columns) == (side, side):
            return self.positions
        num_leading = int(self.config.class_token)
        table = self.positions[:, num_leading:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        options = RESIZE_OPTIONS[self.config.position_resize]
        resized = F.interpolate(table.float(), size=(num_rows, num_columns), align_corners=False, **options)
        patches = resized.to(table.dtype).flatten(2).transpose(1, 2)
        return torch.cat([self.positions[:, :num_leading], patches], dim=1)
