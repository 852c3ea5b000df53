"""The ViT decoder: latents to pixels, MAE style.

Shape legend: B batch, N tokens, C latent width, D decoder width, p patch side.
"""

import torch
from torch import Tensor, nn

from model.config import TokenizerConfig
from model.networks.linear import Linear
from model.networks.vit import Block, Freezable, initialize_linear, sincos_positions


class Decoder(Freezable):
    """ViT decoder of RAE (arXiv 2510.11690)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.positions: Tensor
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        decoder = config.decoder
        self.grid = config.encoder.grid
        self.patch_size = decoder.patch_size
        self.embed = Linear(config.encoder.width, decoder.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.blocks = nn.ModuleList(
            Block(decoder.width, decoder.num_heads, decoder.mlp_width, decoder.layer_norm_eps)
            for _ in range(decoder.depth)
        )
        self.norm = nn.LayerNorm(decoder.width, eps=decoder.layer_norm_eps)
        self.predict = Linear(decoder.width, 3 * decoder.patch_size**2)
        for name, constant in self.constants(config).items():
            self.register_buffer(name, constant, persistent=False)
        self.apply(initialize_linear)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    @staticmethod
    def constants(config: TokenizerConfig) -> dict[str, Tensor]:
        """The buffers that follow from the configuration, so that no checkpoint stores them."""
        return {
            "positions": sincos_positions(
                config.decoder.width, config.encoder.grid, config.decoder.position_span
            ),
            "pixel_mean": torch.tensor(config.pixel_mean).view(1, 3, 1, 1),
            "pixel_std": torch.tensor(config.pixel_std).view(1, 3, 1, 1),
        }

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adversarial term is balanced (VQGAN's adaptive weight)."""
        return self.predict.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Pixels of latent tokens.

        Args:
            tokens: [B, N, C], not normalised by statistics.

        Returns:
            [B, 3, grid * p, grid * p], nominally in [0, 1] but not clamped.
        """
        return self.to_pixels(self.predict(self.features(tokens)))

    def features(self, tokens: Tensor) -> Tensor:
        """Input of the last layer, [B, N, D], from latent tokens [B, N, C]."""
        return self.norm(self.hidden(tokens, len(self.blocks)))[:, 1:]

    def hidden(self, tokens: Tensor, depth: int) -> Tensor:
        """Tokens after ``depth`` blocks, [B, 1 + N, D] with the class token first, from [B, N, C]."""
        hidden = self.embed(tokens)
        hidden = torch.cat([self.class_token.expand(len(hidden), -1, -1), hidden], dim=1) + self.positions
        for block in self.blocks[:depth]:
            hidden = block(hidden)
        return hidden

    def patchify(self, images: Tensor) -> Tensor:
        """Target of the last layer, [B, N, p * p * 3], from images [B, 3, S, S] in [0, 1]."""
        normalized = (images - self.pixel_mean) / self.pixel_std
        size = (3, self.grid, self.patch_size, self.grid, self.patch_size)
        return normalized.view(-1, *size).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def to_pixels(self, patches: Tensor) -> Tensor:
        """Inverse of `patchify`."""
        return self._unpatchify(patches) * self.pixel_std + self.pixel_mean

    def _unpatchify(self, patches: Tensor) -> Tensor:
        side = self.grid * self.patch_size
        cells = patches.view(-1, self.grid, self.grid, self.patch_size, self.patch_size, 3)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side, side)
