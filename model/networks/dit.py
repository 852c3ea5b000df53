"""DiT^DH, the generator of RAE (arXiv 2510.11690): a narrow deep trunk that steers a wide shallow head.

The network predicts the velocity ``e - x`` of the linear path ``x_t = (1 - t) x + t e``: t = 0 is data, t = 1
is noise. The names of the tensors are RAE's, so that its checkpoints load as they are.

Matrix products run in the type of autocast. The residual streams, the modulations, the time embedding and
RMSNorm stay in the type of the parameters.

Shape legend: B batch, C latent channels, N tokens (row * grid + column), D trunk width, E head width,
W width of a block (D or E), H hidden width of a block's MLP, P width of one attention head.
"""

import math
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.config import MAX_GRID, MAX_WIDTH, Depth, FrozenConfig, Width
from model.networks.vit import sincos_positions

NORM_EPS = 1e-6
ROPE_BASE = 10000.0
TIME_FREQUENCIES = 256
# Tensors that are not trained: positions, and the frequencies of the time.
TABLES = frozenset(
    {"pos_embed", "t_embedder.W"}
    | {f"{part}_feat_rope.freqs_{wave}" for part in ("enc", "dec") for wave in ("cos", "sin")}
)
NumHeads = Annotated[int, Field(ge=1, le=MAX_WIDTH)]


class GeneratorConfig(FrozenConfig):
    """Sizes of a DiT^DH. The defaults are RAE's DiT^DH-XL on DINOv2-B latents of 256-pixel images."""

    name: str = Field("generator", min_length=1, max_length=100, description="Name shown to users.")
    num_classes: int = Field(1000, ge=1, le=10**6, description="Classes; the null class comes after them.")
    latent_channels: Width = Field(768, description="Channels C of the latents.")
    grid: int = Field(16, ge=1, le=MAX_GRID, description="Side of the latents, tokens.")
    trunk_width: Width = Field(1152, description="Width D of the trunk; divisible by 4 x heads.")
    trunk_depth: Depth = Field(28, description="Blocks of the trunk.")
    trunk_heads: NumHeads = Field(16, description="Attention heads of the trunk.")
    head_width: Width = Field(2048, description="Width E of the head; divisible by 4 x heads.")
    head_depth: Depth = Field(2, description="Blocks of the head.")
    head_heads: NumHeads = Field(16, description="Attention heads of the head.")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="MLP width over block width, before SwiGLU's cut.")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one latent."""
        return (self.latent_channels, self.grid, self.grid)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.num_classes

    def mlp_width(self, width: int) -> int:
        """Hidden width of the SwiGLU in a block of ``width``: two thirds, cut (RAE: 2048 -> 5461)."""
        return int(2 / 3 * int(width * self.mlp_ratio))

    @model_validator(mode="after")
    def _check(self) -> Self:
        for part in ("trunk", "head"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % (4 * heads):  # rotary positions turn pairs of rows and pairs of columns
                raise ValueError(
                    f"{part}_width={width} is not divisible by 4 x {part}_heads={heads} = {4 * heads}"
                )
            if self.mlp_width(width) < 1:
                raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no MLP at {part}_width={width}")
        return self


GENERATOR_PRESETS: dict[str, GeneratorConfig] = {
    preset.name: preset
    for preset in (
        GeneratorConfig(name="dit-dh-xl"),
        GeneratorConfig(name="dit-dh-s", trunk_width=384, trunk_depth=12, trunk_heads=6),
        # Small enough to learn something in hours on two CPU cores: 11 MiB in float16.
        GeneratorConfig(
            name="dit-dh-mini",
            num_classes=12,
            latent_channels=192,
            trunk_width=192,
            trunk_depth=6,
            trunk_heads=3,
            head_width=256,
            head_depth=1,
            head_heads=4,
        ),
    )
}


class RmsNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.rms_norm(tokens, self.weight.shape, self.weight, NORM_EPS)


class RotaryPositions(nn.Module):
    """2-D rotary positions: of a head's channels the first half turns with the row, the rest with the column.

    Channels 2j and 2j + 1 turn together, by position * 10000^(-2j / half).
    """

    freqs_cos: Tensor  # [N, P]
    freqs_sin: Tensor

    def __init__(self, head_width: int, grid: int) -> None:
        super().__init__()
        cos, sin = rotary_tables(head_width, grid)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def forward(self, heads: Tensor) -> Tensor:
        """Turn queries or keys [B, heads, N, P]."""
        even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return heads * self.freqs_cos + turned * self.freqs_sin


def rotary_tables(head_width: int, grid: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [grid * grid, head_width] float32.

    On the meta device shapes alone.
    """
    shape = (grid * grid, head_width)
    if torch.get_default_device().type == "meta":
        return torch.empty(shape), torch.empty(shape)
    half = head_width // 2
    frequencies = ROPE_BASE ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    angles = angles.repeat_interleave(2, dim=-1)  # [grid, half]
    rows = angles[:, None].expand(grid, grid, half)
    columns = angles[None, :].expand(grid, grid, half)
    table = torch.cat([rows, columns], dim=-1).reshape(shape)
    return table.cos().float(), table.sin().float()


class TokenEmbedder(nn.Module):
    """A linear map per token, stored as the 1 x 1 convolution that RAE has."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=1)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        nn.init.zeros_(_bias(self.proj))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] to [B, N, W]."""
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Random Fourier features of the time (fixed W), and an MLP. [B] to [B, D], outside of autocast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(TIME_FREQUENCIES), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, time: Tensor) -> Tensor:
        with torch.autocast(time.device.type, enabled=False):
            # Rounding an angle of a thousand in bfloat16 would leave no angle at all.
            angles = time.to(self.W.dtype)[:, None] * self.W * 2 * math.pi
            return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class ClassEmbedder(nn.Module):
    """A row per class, and the last one for the null class. [B] to [B, D]."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions. [B, N, W] -> [B, N, W]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, rotary: RotaryPositions) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, P]
        query, key = rotary(query).to(value.dtype), rotary(key).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SwiGlu(nn.Module):
    """``w3(silu(g) * u)``, where ``w12`` gives g and u."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden_width)
        self.w3 = nn.Linear(hidden_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Modulation(nn.Sequential):
    """Conditioning [B, 1 or N, W] to ``num_parts`` shifts, scales or gates of that shape; zero at first."""

    def __init__(self, width: int, num_parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, num_parts * width))
        self.num_parts = num_parts
        _zero(self[1])

    def parts(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """The parts, in the type of the conditioning."""
        return self(conditioning).to(conditioning.dtype).chunk(self.num_parts, dim=-1)


class Block(nn.Module):
    """A transformer block whose norms and residuals the conditioning modulates (adaLN)."""

    def __init__(self, width: int, num_heads: int, hidden_width: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = RmsNorm(width)
        self.mlp = SwiGlu(width, hidden_width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, tokens: Tensor, conditioning: Tensor, rotary: RotaryPositions) -> Tensor:
        """Tokens [B, N, W] under a conditioning [B, 1, W] or [B, N, W]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation.parts(conditioning)
        tokens = tokens + gate1 * self.attn(self.norm1(tokens) * (1 + scale1) + shift1, rotary)
        return tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """The head's tokens [B, N, E] to velocities [B, N, C]; zero at first."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = RmsNorm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = Modulation(width, 2)
        _zero(self.linear)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation.parts(conditioning)
        return self.linear(self.norm_final(tokens) * (1 + scale) + shift)


class DiT(nn.Module):
    """DiT^DH. The trunk reads the noisy latent, the time and the class; it steers the head token by token."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        trunk, head = config.trunk_width, config.head_width
        channels, grid = config.latent_channels, config.grid
        self.pos_embed = nn.Parameter(sincos_positions(trunk, grid)[:, 1:].clone(), requires_grad=False)
        self.x_embedder = TokenEmbedder(channels, head)
        self.s_embedder = TokenEmbedder(channels, trunk)
        self.s_projector = nn.Linear(trunk, head) if trunk != head else nn.Identity()
        self.t_embedder = TimeEmbedder(trunk)
        self.y_embedder = ClassEmbedder(config.num_classes, trunk)
        self.blocks = nn.ModuleList(
            [Block(trunk, config.trunk_heads, config.mlp_width(trunk)) for _ in range(config.trunk_depth)]
            + [Block(head, config.head_heads, config.mlp_width(head)) for _ in range(config.head_depth)]
        )
        self.final_layer = FinalLayer(head, channels)
        self.enc_feat_rope = RotaryPositions(trunk // config.trunk_heads, grid)
        self.dec_feat_rope = RotaryPositions(head // config.head_heads, grid)

    def forward(self, latents: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Velocity of noisy latents.

        Args:
            latents: x_t, [B, C, h, w], normalised.
            time: t, [B] in [0, 1], 0 is data.
            labels: [B] int64 up to and with ``config.null_class``.

        Returns:
            [B, C, h, w] in the type of the parameters.
        """
        dtype = self.pos_embed.dtype
        noisy = latents.to(dtype).flatten(2).transpose(1, 2)  # [B, N, C]
        time_embedding = self.t_embedder(time)  # [B, D]
        conditioning = F.silu(time_embedding + self.y_embedder(labels))[:, None]
        depth = self.config.trunk_depth
        trunk = self.s_embedder(noisy).to(dtype) + self.pos_embed
        for block in self.blocks[:depth]:
            trunk = block(trunk, conditioning, self.enc_feat_rope)
        steering = F.silu(time_embedding[:, None] + trunk)
        steering = self.s_projector(steering).to(dtype)  # [B, N, E]
        head = self.x_embedder(noisy).to(dtype)
        for block in self.blocks[depth:]:
            head = block(head, steering, self.dec_feat_rope)
        velocity = self.final_layer(head, steering).to(dtype)
        return velocity.transpose(1, 2).unflatten(2, self.config.latent_shape[1:])


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _zero(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(_bias(layer))
