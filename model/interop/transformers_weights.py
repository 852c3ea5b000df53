"""Weights of transformers' encoders by this package's names, and back.

Three families of names, each as transformers 5 has them in memory and as the files on the hub do, which
keep those of version 4: DINOv2 (with registers or without), SigLIP (1 and 2, fixed size and NaFlex) and
ViT as MAE has it. Pure functions; nothing is read or written.

Dropped, because nothing here uses it:

- everywhere: the final LayerNorm, since LN_bb has no affine part (RAE removes it too), and empty tensors;
- DINOv2: the mask token, and the classifier of a classification model;
- SigLIP: the pooling head, the position numbers, and of two towers the text model, ``logit_scale`` and
  ``logit_bias``;
- MAE: the decoder of pre-training.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from model.config import EncoderConfig
from model.errors import CheckpointError
from model.interop.renaming import TensorNames, affine, fused, translate, translate_back
from model.networks.encoder import Encoder

SIGLIP_POSITIONS = "embeddings.position_embedding.weight"
SIGLIP_PATCHES = "embeddings.patch_embedding.weight"
TransformersRelease = Literal[4, 5]
OLD_SWIGLU = "mlp.weights_in"  # gate and value in one, gate first


@dataclass(frozen=True)
class _Family:
    """Names of one family by transformers 5, and how other files differ."""

    names: TensorNames
    prefixes: tuple[str, ...]
    """What files of larger models put before each name."""
    beside: tuple[str, ...]
    """How the names of a larger model's other tensors start."""
    dropped: tuple[str, ...]
    """How the names of the encoder's own unused tensors start."""
    old_block_prefix: str
    old_parts: dict[str, str]
    """Parts of a block: transformers 5 to transformers 4."""


_InBlock = dict[str, str | tuple[str, ...]]
_PLAIN_MLP: _InBlock = {**affine({"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"})}
_SWIGLU_MLP: _InBlock = {
    **fused("mlp.up", "mlp.gate_proj", "mlp.up_proj"),
    **affine({"mlp.down": "mlp.down_proj"}),
}
_OLD_ATTENTION = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_VIT_EMBEDDINGS = {
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    **affine({"patch_embed": "embeddings.patch_embeddings.projection"}),
}


def encoder_state_from_transformers(
    state_dict: Mapping[str, Tensor], config: EncoderConfig
) -> dict[str, Tensor]:
    """Weights for `model.networks.encoder.Encoder` from an encoder of transformers.

    Args:
        state_dict: its tensors, by the names of transformers 5 or 4, with or without the prefix of a
            larger model (``dinov2.``, ``vision_model.``, ``vit.``); what the module's page lists is
            dropped and may be absent.
        config: the encoder that is wanted, as `encoder_config_from_transformers` gives it.

    Returns:
        A state dict that ``Encoder.load_state_dict`` takes strictly, of the same dtypes.

    Raises:
        CheckpointError: a tensor is missing, not known or of another shape; names it.
    """
    family = _family(config)
    tensors = _ForeignTensors.read(state_dict, family)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Encoder(config).state_dict().items()}
    translated = translate(tensors.by_name(config), family.names, config.depth, tensors.spell, shapes)
    if not config.num_registers:
        embed = translated["patch_embed.weight"]
        translated["register_tokens"] = embed.new_zeros(1, 0, len(embed))
    return translated


def encoder_state_to_transformers(
    state_dict: Mapping[str, Tensor], config: EncoderConfig, release: TransformersRelease = 5
) -> dict[str, Tensor]:
    """Weights for an encoder of transformers from those of `model.networks.encoder.Encoder`.

    Args:
        state_dict: a complete state dict of ``Encoder(config)``.
        config: the encoder.
        release: of transformers, by whose names.

    Returns:
        The tensors of ``Dinov2Model``, ``Dinov2WithRegistersModel``, ``SiglipVisionModel`` (whose files
        put ``vision_model.`` before each name, as release 4 does in memory too) or ``ViTMAEModel``, without
        what an import drops.
    """
    foreign = translate_back(state_dict, _family(config).names, config.depth)
    if SIGLIP_POSITIONS in foreign:
        foreign[SIGLIP_POSITIONS] = foreign[SIGLIP_POSITIONS].squeeze(0)
    return foreign if release == 5 else _spelled_by_release_4(foreign, config)


def _spelled_by_release_4(foreign: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    family = _family(config)
    spelling = _ForeignTensors(family, "", {}, {})
    prefix = "vision_model." if SIGLIP_POSITIONS in foreign else ""
    spelled: dict[str, Tensor] = {}
    for name, tensor in foreign.items():
        old = prefix + spelling._old_name(name)
        spelled[old] = torch.cat([spelled[old], tensor]) if old in spelled else tensor  # SwiGLU's halves
    return spelled


@dataclass(frozen=True)
class _ForeignTensors:
    """Tensors of a file by the names of transformers 5, and what the file itself calls them."""

    family: _Family
    prefix: str
    tensors: dict[str, Tensor]
    originals: dict[str, str]

    @classmethod
    def read(cls, state_dict: Mapping[str, Tensor], family: _Family) -> Self:
        found = (p for p in family.prefixes if any(name.startswith(p) for name in state_dict))
        foreign = cls(family, next(found, ""), {}, {})
        for original, tensor in state_dict.items():
            foreign._add(original, tensor)
        return foreign

    def spell(self, name: str) -> str:
        """The file's word for a tensor, also for one that it lacks."""
        if name in self.originals:
            return self.originals[name]
        is_old = any(original != self.prefix + new for new, original in self.originals.items())
        return self.prefix + (self._old_name(name) if is_old else name)

    def by_name(self, config: EncoderConfig) -> dict[str, Tensor]:
        """The tensors in our shapes: SigLIP has positions [N, C], and NaFlex a matrix as patch embedding."""
        tensors = dict(self.tensors)
        positions, patches = tensors.get(SIGLIP_POSITIONS), tensors.get(SIGLIP_PATCHES)
        if positions is not None and positions.ndim == 2:
            tensors[SIGLIP_POSITIONS] = positions[None]
        side = config.patch_size
        if patches is not None and patches.shape == (config.width, 3 * side**2):
            cells = patches.unflatten(1, (side, side, 3))
            tensors[SIGLIP_PATCHES] = cells.permute(0, 3, 1, 2).contiguous()
        return tensors

    def _add(self, original: str, tensor: Tensor) -> None:
        if not original.startswith(self.prefix):
            if original.startswith(self.family.beside):
                return
            raise CheckpointError(f"unexpected tensor {original!r}")
        name = original.removeprefix(self.prefix)
        if name.startswith(self.family.dropped) or not tensor.numel():
            return
        for new, part in self._modern(name, tensor):
            if new in self.tensors:
                twin = self.originals[new]
                raise CheckpointError(f"tensors {twin!r} and {original!r} are two spellings of one")
            self.tensors[new], self.originals[new] = part, original

    def _modern(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        block = self._block(name)
        if block is None:
            return [(name, tensor)]
        start, part, kind = block
        if part == OLD_SWIGLU and tensor.ndim:
            halves = zip(("mlp.gate_proj", "mlp.up_proj"), tensor.chunk(2), strict=False)
            return [(f"{start}{new}.{kind}", half) for new, half in halves]
        new_parts = {old: new for new, old in self.family.old_parts.items()}
        return [(f"{start}{new_parts.get(part, part)}.{kind}", tensor)]

    def _old_name(self, name: str) -> str:
        block = self._block(name)
        if block is None:
            return name
        start, part, kind = block
        old_start = start.replace(self.family.names.block_prefix, self.family.old_block_prefix, 1)
        return f"{old_start}{self.family.old_parts.get(part, part)}.{kind}"

    def _block(self, name: str) -> tuple[str, str, str] | None:
        """Block, in the new form of its prefix, then part and kind; None for a tensor outside of blocks."""
        new_prefix = self.family.names.block_prefix
        for prefix in (new_prefix, self.family.old_block_prefix):
            match = re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.+)\.(\w+)", name)
            if match is not None:
                return f"{new_prefix}{match[1]}.", match[2], match[3]
        return None


def _family(config: EncoderConfig) -> _Family:
    """The family whose names an encoder's tensors have: LayerScale is DINOv2's, no class token SigLIP's."""
    mlp = _SWIGLU_MLP if config.mlp == "swiglu" else _PLAIN_MLP
    if config.layer_scale:
        return _dinov2(config, mlp)
    return _vit(mlp) if config.class_token else _siglip(mlp)


def _dinov2(config: EncoderConfig, mlp: _InBlock) -> _Family:
    registers = {"register_tokens": "embeddings.register_tokens"} if config.num_registers else {}
    return _Family(
        TensorNames(
            block_prefix="encoder.layer.",
            outside={**_VIT_EMBEDDINGS, **registers},
            in_block={
                **affine(
                    {"norm_attention": "norm1", "attention.out": "attention.o_proj", "norm_mlp": "norm2"}
                ),
                **_fused_qkv("attention"),
                **mlp,
                "scale_attention.gain": "layer_scale1.lambda1",
                "scale_mlp.gain": "layer_scale2.lambda1",
            },
        ),
        prefixes=("dinov2.", "dinov2_with_registers."),
        beside=("classifier.",),
        dropped=("embeddings.mask_token", "layernorm."),
        old_block_prefix="encoder.layer.",
        old_parts={
            **_OLD_ATTENTION,
            "mlp.gate_proj": OLD_SWIGLU,
            "mlp.up_proj": OLD_SWIGLU,
            "mlp.down_proj": "mlp.weights_out",
        },
    )


def _vit(mlp: _InBlock) -> _Family:
    return _Family(
        TensorNames(
            block_prefix="layers.",
            outside=_VIT_EMBEDDINGS,
            in_block={
                **affine(
                    {
                        "norm_attention": "layernorm_before",
                        "attention.out": "attention.o_proj",
                        "norm_mlp": "layernorm_after",
                    }
                ),
                **_fused_qkv("attention"),
                **mlp,
            },
        ),
        prefixes=("vit.",),
        beside=("decoder.",),
        dropped=("layernorm.",),
        old_block_prefix="encoder.layer.",
        old_parts={**_OLD_ATTENTION, "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
    )


def _siglip(mlp: _InBlock) -> _Family:
    return _Family(
        TensorNames(
            block_prefix="encoder.layers.",
            outside={"positions": SIGLIP_POSITIONS, **affine({"patch_embed": "embeddings.patch_embedding"})},
            in_block={
                **affine(
                    {
                        "norm_attention": "layer_norm1",
                        "attention.out": "self_attn.out_proj",
                        "norm_mlp": "layer_norm2",
                    }
                ),
                **_fused_qkv("self_attn"),
                **mlp,
            },
        ),
        prefixes=("vision_model.",),
        beside=("text_model.", "logit_scale", "logit_bias"),
        dropped=("post_layernorm.", "head.", "embeddings.position_ids"),
        old_block_prefix="encoder.layers.",
        old_parts={},
    )


def _fused_qkv(module: str) -> _InBlock:
    return fused("attention.qkv", *(f"{module}.{letter}_proj" for letter in "qkv"))
