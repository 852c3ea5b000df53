"""The frozen encoder: DINOv2 with registers, giving every block's patch tokens.

Shape legend: B batch, N patch tokens, C width, S input side, P prefix (class and register) tokens.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EncoderConfig
from model.vit import Block, Freezable, initialize_linear

INITIAL_LAYER_SCALE = 1.0


class Encoder(Freezable):
    """DINOv2 ViT with registers (arXiv 2304.07193, 2309.16588)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.position_grid**2, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.num_heads,
                int(width * config.mlp_ratio),
                config.layer_norm_eps,
                layer_scale=INITIAL_LAYER_SCALE,
            )
            for _ in range(config.depth)
        )
        self.resized_positions: Tensor | None
        self.register_buffer("resized_positions", None, persistent=False)
        self.apply(initialize_linear)
        for parameter in (self.class_token, self.register_tokens, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

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
            pixels: [B, 3, S, S], ImageNet-normalised; S any multiple of the patch size.

        Returns:
            L tensors z^(k) of shape [B, N, C], views that skip the class and register tokens.
        """
        prefix = self.config.num_prefix_tokens
        return [tokens[:, prefix:] for tokens in self.hidden_states(pixels)]

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """As `forward`, with the class and register tokens in front: L tensors [B, P + N, C]."""
        tokens = self.embed(pixels)
        states = []
        for block in self.blocks:
            tokens = block(tokens)
            states.append(tokens)
        return states

    def embed(self, pixels: Tensor) -> Tensor:
        """The first block's input: class, register and patch embeddings, [B, P + N, C]."""
        patches = self.patch_embed(pixels)  # [B, C, rows, columns]
        num_rows, num_columns = patches.shape[-2:]
        positions = self._positions_for(num_rows, num_columns)
        patches = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        batch = patches.shape[0]
        class_token = (self.class_token + positions[:, :1]).expand(batch, -1, -1)
        return torch.cat([class_token, self.register_tokens.expand(batch, -1, -1), patches], dim=1)

    def _positions_for(self, num_rows: int, num_columns: int) -> Tensor:
        if self.resized_positions is not None and num_rows == num_columns == self.config.grid:
            return self.resized_positions
        return self._resize_positions(num_rows, num_columns)

    def _resize_positions(self, num_rows: int, num_columns: int) -> Tensor:
        side = self.config.position_grid
        if (num_rows, num_columns) == (side, side):
            return self.positions
        table = self.positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resized = F.interpolate(
            table.float(), size=(num_rows, num_columns), mode="bicubic", align_corners=False, antialias=True
        )
        patches = resized.to(table.dtype).flatten(2).transpose(1, 2)
        return torch.cat([self.positions[:, :1], patches], dim=1)
