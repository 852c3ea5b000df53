"""Enriched latents from diffusers' AutoencoderRAE and the fusion that an export keeps beside it.

Copied into every export of a fused checkpoint, where it needs torch and safetensors and nothing else::

    from diffusers import AutoencoderRAE
    from drorae_fusion import load_fusion

    autoencoder = AutoencoderRAE.from_pretrained(folder).eval()
    fusion = load_fusion(folder)
    latents = fusion.encode(autoencoder, images)      # images [B, 3, H, W] in [0, 1]
    pictures = autoencoder.decode(latents).sample     # in [0, 1], not clamped

``autoencoder.encode`` alone gives the base latents, normalised by the enriched latents' statistics.

Shape legend: B batch, N patch tokens, C latent width, H expert hidden width, L fused layers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class Fusion:
    """Multi-layer representation fusion (arXiv 2605.10780, section 3), unfolded and for inference."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config["fusion"]
        self.eps = float(config["layer_norm_eps"])
        self.num_prefix_tokens = int(config["num_prefix_tokens"])
        self.tensors = tensors

    def to(self, *args: Any, **kwargs: Any) -> "Fusion":
        """Move the weights, as ``Tensor.to``."""
        self.tensors = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()}
        return self

    @torch.no_grad()
    def encode(self, autoencoder: Any, images: Tensor) -> Tensor:
        """Enriched latents [B, C, h, w], as ``autoencoder.decode`` takes them, of images [B, 3, H, W]."""
        pixels = autoencoder._resize_and_normalize(images)
        tokens_BNC = self(self.hidden_states(autoencoder, pixels))
        side = round(tokens_BNC.shape[1] ** 0.5)
        latents = tokens_BNC.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        normalized: Tensor = autoencoder._normalize_latents(latents) * autoencoder.config.scaling_factor
        return normalized

    def hidden_states(self, autoencoder: Any, pixels: Tensor) -> list[Tensor]:
        """Patch tokens [B, N, C] after every block of the encoder, from prepared pixels [B, 3, S, S]."""
        options: dict[str, Any] = {"output_hidden_states": True}
        if autoencoder.config.encoder_type != "dinov2":
            options["interpolate_pos_encoding"] = True
        if autoencoder.config.encoder_type == "mae":  # sorted noise leaves every patch in its place
            num_patches = (pixels.shape[-1] // autoencoder.config.encoder_patch_size) ** 2
            options["noise"] = torch.arange(num_patches).expand(len(pixels), -1).to(pixels)
        states = autoencoder.encoder(pixels, **options).hidden_states[1:]
        return [state[:, self.num_prefix_tokens :] for state in states]

    def __call__(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Enriched tokens z_final [B, N, C] of every block's patch tokens, shallow to deep."""
        config = self.config
        selected = list(hidden_states)[-config["num_layers"] :]
        normalized = [self._norm(state) for state in selected]
        base = normalized[-1]
        if config["correction"] == "incremental" and config["beta"] == 0:
            return base
        experts = config["mixer"] == "experts"
        fused = self._experts(selected, normalized) if experts else self._attention(normalized)
        if config["correction"] == "replace":
            return fused
        return self._norm(torch.lerp(base, fused, config["beta"]))

    def _norm(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)

    def _linear(self, name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _experts(self, selected: list[Tensor], normalized: list[Tensor]) -> Tensor:
        config = self.config
        seen = normalized if config["router_input_norm"] else selected
        weights_BNL = self._linear("mixer.router", torch.cat(seen, dim=-1))
        if config["routing"] == "softmax":
            weights_BNL = weights_BNL.softmax(dim=-1)
        total = torch.zeros_like(normalized[0])
        for layer, tokens in enumerate(normalized):
            name = f"mixer.experts.{layer}"
            hidden = self._linear(f"{name}.up", tokens)
            gain, shift = self.tensors[f"{name}.norm.weight"], self.tensors[f"{name}.norm.bias"]
            hidden = F.layer_norm(hidden, gain.shape, gain, shift, config["hidden_norm_eps"])
            total = total + weights_BNL[..., layer, None] * self._norm(self._linear(f"{name}.down", hidden))
        if config["routing"] == "energy":
            total = total / torch.sqrt(weights_BNL.square().sum(-1, keepdim=True) + config["energy_eps"])
        return self._norm(total)

    def _attention(self, normalized: list[Tensor]) -> Tensor:
        heads = (self.config["num_heads"], -1)
        query = self._linear("mixer.query", normalized[-1])[:, :, None].unflatten(-1, heads)
        layers = torch.stack(normalized, dim=2)
        key, value = self._linear("mixer.key_value", layers).unflatten(-1, (2, *heads)).unbind(dim=-3)
        mixed = F.scaled_dot_product_attention(*(part.transpose(2, 3) for part in (query, key, value)))
        return self._norm(self._linear("mixer.out", mixed.transpose(2, 3).flatten(2)))


def load_fusion(folder: str | Path) -> Fusion:
    """The fusion of an exported folder: ``fusion.json`` and ``fusion.safetensors``."""
    config = json.loads((Path(folder) / "fusion.json").read_text(encoding="utf-8"))
    return Fusion(config, load_file(Path(folder) / "fusion.safetensors"))
