"""Typed configuration of the tokenizer, and the presets.

Every value is validated where it is written: unknown fields are errors, and a combination that
cannot be built is refused with a sentence that names the fields.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

MAX_WIDTH = 8192
MAX_GRID = 128  # 16,384 tokens: position tables are computed, so no file bounds them
Width = Annotated[int, Field(ge=8, le=MAX_WIDTH)]
Depth = Annotated[int, Field(ge=1, le=64)]
PixelTriple = tuple[float, float, float]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveTriple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
MlpKind = Literal["gelu", "gelu_tanh", "swiglu"]
PositionResize = Literal["bicubic_antialias", "bicubic", "bilinear_antialias"]


class FrozenConfig(BaseModel):
    """Base of every configuration: immutable, numbers finite, a typo an error instead of a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EncoderConfig(FrozenConfig):
    """A frozen ViT. The defaults are ``dinov2-with-registers-base``; `ENCODERS` names the others.

    One module serves DINOv2 (arXiv 2304.07193, 2309.16588), SigLIP 2 (2502.14786) and MAE (2111.06377):
    they differ by these fields alone.
    """

    width: Width = Field(768, description="Token width C.")
    depth: Depth = Field(12, description="Number of blocks L; each gives one hidden state.")
    num_heads: int = Field(12, ge=1, le=MAX_WIDTH, description="Attention heads; divides the width.")
    mlp_ratio: float = Field(
        4.0, gt=0, le=512, description="MLP width over token width, SwiGLU's before its cut."
    )
    mlp: MlpKind = Field(
        "gelu", description="Exact GELU, its tanh approximation, or SwiGLU at two thirds of the MLP width."
    )
    layer_scale: bool = Field(True, description="Whether residual branches have learned gains (DINOv2).")
    patch_size: int = Field(14, ge=1, le=64, description="Patch side, pixels.")
    image_size: int = Field(224, ge=8, le=1024, description="Input side, pixels; images are resized to it.")
    class_token: bool = Field(True, description="Whether a class token precedes the patches.")
    num_registers: int = Field(4, ge=0, le=64, description="Register tokens after the class token.")
    positions: Literal["learned", "sincos"] = Field(
        "learned", description="Learned position table, or the fixed 2-D sin-cos table (MAE)."
    )
    position_grid: int = Field(
        37, ge=1, le=MAX_GRID, description="Side of the stored position table, patches."
    )
    position_resize: PositionResize = Field(
        "bicubic_antialias", description="How the table is resized to the input's grid."
    )
    layer_norm_eps: float = Field(1e-6, gt=0, description="eps of every LayerNorm, LN_bb included.")

    @property
    def grid(self) -> int:
        """Patches along one side of the input."""
        return self.image_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens that precede the patch tokens."""
        return int(self.class_token) + self.num_registers

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP; SwiGLU's is cut to two thirds, rounded up to a multiple of 8."""
        full = int(round(self.width * self.mlp_ratio, 6))  # a ratio of two integers gives the integer back
        return (int(full * 2 / 3) + 7) // 8 * 8 if self.mlp == "swiglu" else full

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}")
        if self.grid > MAX_GRID:
            raise ValueError(
                f"image_size={self.image_size} in patches of {self.patch_size} is a grid of {self.grid} x "
                f"{self.grid}; at most {MAX_GRID} x {MAX_GRID} is possible"
            )
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no MLP at width={self.width}")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"positions='sincos' needs a width divisible by 4, not width={self.width}")
        return self


class FusionConfig(FrozenConfig):
    """Multi-layer representation fusion (arXiv 2605.10780). The ablations are values of these fields.

    The defaults of the sizes are those of ``dinov2-b``. In a `TokenizerConfig` sizes that are not given
    follow the encoder: all layers, a hidden width of 2 C, and as many heads.
    """

    num_layers: Depth = Field(12, description="How many of the deepest layers are fused; all if not given.")
    mixer: Literal["experts", "cross_attention"] = Field(
        "experts", description="Layer experts with a router, or attention over layers queried by the last."
    )
    hidden_width: Width = Field(1536, description="Expert hidden width h (experts only); 2 C if not given.")
    routing: Literal["energy", "softmax"] = Field("energy", description="How router weights are normalised.")
    router_input_norm: bool = Field(True, description="Whether the router sees LN_bb-normalised states.")
    correction: Literal["incremental", "replace"] = Field(
        "incremental", description="z_base + beta (z_fuse - z_base), or z_fuse alone."
    )
    beta: float = Field(0.2, ge=0, le=1, description="Size of the incremental correction.")
    energy_eps: float = Field(1e-6, gt=0, description="eps under the energy normalisation's square root.")
    hidden_norm_eps: float = Field(1e-5, gt=0, description="eps of the experts' hidden LayerNorm.")
    num_heads: int = Field(
        12,
        ge=1,
        le=MAX_WIDTH,
        description="Attention heads (cross_attention only); the encoder's if not given.",
    )

    def fitted(self, encoder: EncoderConfig) -> Self:
        """With the sizes that were not given taken from the encoder."""
        sizes = {
            "num_layers": encoder.depth,
            "hidden_width": min(2 * encoder.width, MAX_WIDTH),
            "num_heads": encoder.num_heads,
        }
        return self.model_copy(
            update={name: size for name, size in sizes.items() if name not in self.model_fields_set}
        )


class DecoderConfig(FrozenConfig):
    """MAE-style ViT decoder. The defaults are RAE's ViT-XL."""

    width: Width = Field(1152, description="Token width; divisible by 4 for the 2-D sin-cos positions.")
    depth: Depth = Field(28, description="Number of blocks.")
    num_heads: int = Field(16, ge=1, le=MAX_WIDTH, description="Attention heads; divides the width.")
    mlp_width: Width = Field(4096, description="MLP hidden width.")
    patch_size: int = Field(16, ge=1, le=64, description="Output patch side, pixels.")
    layer_norm_eps: float = Field(1e-12, gt=0, description="eps of every LayerNorm.")
    position_span: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="Length of a side in sin-cos positions; null for one a patch (RAE).",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}")
        if self.width % 4:
            raise ValueError(f"width={self.width} is not divisible by 4")
        return self


class TokenizerConfig(FrozenConfig):
    """A whole tokenizer. ``fusion=None`` is a plain single-layer RAE."""

    name: str = Field(min_length=1, max_length=100, description="Name shown to users and in metadata.")
    image_size: int = Field(256, ge=8, le=1024, description="Side of the images in and out, pixels.")
    encoder: EncoderConfig = EncoderConfig()
    fusion: FusionConfig | None = Field(FusionConfig(), validate_default=True)
    decoder: DecoderConfig = DecoderConfig()
    pixel_mean: PixelTriple = Field(IMAGENET_MEAN, description="Per-channel mean of the pixels, in [0, 1].")
    pixel_std: PositiveTriple = Field(IMAGENET_STD, description="Per-channel deviation of the pixels.")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one latent."""
        return (self.encoder.width, self.encoder.grid, self.encoder.grid)

    @property
    def fused_layers(self) -> tuple[int, ...]:
        """1-based numbers of the blocks that feed the latent, shallow to deep."""
        depth = self.encoder.depth
        num_layers = self.fusion.num_layers if self.fusion else 1
        return tuple(range(depth - num_layers + 1, depth + 1))

    @field_validator("fusion")
    @classmethod
    def _fit_fusion(cls, fusion: FusionConfig | None, info: ValidationInfo) -> FusionConfig | None:
        encoder = info.data.get("encoder")  # absent where it is itself at fault
        return fusion if fusion is None or encoder is None else fusion.fitted(encoder)

    @model_validator(mode="after")
    def _check(self) -> Self:
        decoded = self.decoder.patch_size * self.encoder.grid
        if decoded != self.image_size:
            raise ValueError(
                f"decoder.patch_size x encoder grid = {self.decoder.patch_size} x {self.encoder.grid} = "
                f"{decoded} differs from image_size={self.image_size}"
            )
        if self.fusion is not None:
            if self.fusion.num_layers > self.encoder.depth:
                raise ValueError(
                    f"fusion.num_layers={self.fusion.num_layers} exceeds encoder.depth={self.encoder.depth}"
                )
            if self.fusion.mixer == "cross_attention" and self.encoder.width % self.fusion.num_heads:
                raise ValueError(
                    f"encoder.width={self.encoder.width} is not divisible by "
                    f"fusion.num_heads={self.fusion.num_heads}"
                )
        return self


def fusion_num_parameters(num_layers: int, width: int, hidden_width: int) -> int:
    """Parameters of the expert fusion: ``L (C h + h + h C + h) + C L^2 + L``."""
    experts = num_layers * (2 * width * hidden_width + 2 * hidden_width)
    router = width * num_layers**2 + num_layers
    return experts + router


_VIT_SIZES = {  # width, depth, heads
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giant": (1536, 40, 24),
}


def _dinov2(size: str, num_registers: int) -> EncoderConfig:
    width, depth, num_heads = _VIT_SIZES[size]
    return EncoderConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp="swiglu" if size == "giant" else "gelu",
        num_registers=num_registers,
        position_resize="bicubic_antialias" if num_registers else "bicubic",
    )


def _siglip2(width: int, depth: int, num_heads: int, mlp_width: int) -> EncoderConfig:
    return EncoderConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_width / width,
        mlp="gelu_tanh",
        layer_scale=False,
        patch_size=16,
        image_size=256,
        class_token=False,
        num_registers=0,
        position_grid=16,
        position_resize="bicubic",
    )


def _mae(size: str) -> EncoderConfig:
    width, depth, num_heads = _VIT_SIZES[size]
    return EncoderConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        layer_scale=False,
        patch_size=16,
        image_size=256,
        num_registers=0,
        positions="sincos",
        position_grid=14,
        position_resize="bicubic",
        layer_norm_eps=1e-12,
    )


# By the names of their repositories on the hub, each with the input that gives 16 x 16 patches, as RAE.
ENCODERS: dict[str, EncoderConfig] = {
    **{f"dinov2-with-registers-{size}": _dinov2(size, 4) for size in _VIT_SIZES},
    **{f"dinov2-{size}": _dinov2(size, 0) for size in _VIT_SIZES},
    "siglip2-base-patch16-256": _siglip2(768, 12, 12, 3072),
    "siglip2-large-patch16-256": _siglip2(1024, 24, 16, 4096),
    "siglip2-so400m-patch16-256": _siglip2(1152, 27, 16, 4304),
    "vit-mae-base": _mae("base"),
    "vit-mae-large": _mae("large"),
}


def _preset(name: str, encoder: str, **fields: Any) -> TokenizerConfig:
    if encoder.startswith("siglip2"):
        fields |= {"pixel_mean": SIGLIP_MEAN, "pixel_std": SIGLIP_STD}
    return TokenizerConfig(name=name, encoder=ENCODERS[encoder], **fields)


PRESETS: dict[str, TokenizerConfig] = {
    preset.name: preset
    for preset in (
        TokenizerConfig(
            name="mini",
            encoder=EncoderConfig(width=192, num_heads=3),
            decoder=DecoderConfig(width=320, depth=8, num_heads=5, mlp_width=1280),
        ),
        _preset("dinov2-s", "dinov2-with-registers-small"),
        _preset("dinov2-b", "dinov2-with-registers-base"),
        _preset("dinov2-b-h3072", "dinov2-with-registers-base", fusion=FusionConfig(hidden_width=3072)),
        _preset("dinov2-l", "dinov2-with-registers-large"),
        _preset("dinov2-g", "dinov2-with-registers-giant"),
        _preset("dinov2-s-no-registers", "dinov2-small"),
        _preset("dinov2-b-no-registers", "dinov2-base"),
        _preset("dinov2-l-no-registers", "dinov2-large"),
        _preset("dinov2-g-no-registers", "dinov2-giant"),
        _preset("siglip2-b", "siglip2-base-patch16-256"),
        _preset("siglip2-l", "siglip2-large-patch16-256"),
        _preset("siglip2-so400m", "siglip2-so400m-patch16-256"),
        _preset("mae-b", "vit-mae-base"),
        _preset("mae-l", "vit-mae-large"),
    )
}
