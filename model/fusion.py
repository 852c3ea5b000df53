"""Multi-layer representation fusion (arXiv 2605.10780, section 3): experts, router, correction.

Shape legend: B batch, N tokens, C width, H expert hidden width, L fused layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.reference import energy_aggregate, incremental_correction, token_norm
from model.config import EncoderConfig, FusionConfig
from model.vit import Freezable


class Expert(nn.Module):
    """One layer's expert: ``W2 LayerNorm_h(W1 x)``, bias-free and without an activation function.

    It starts as a projection onto H directions (``W2 = W1^T``, orthonormal), so that the fusion
    begins near a normalised mean of the layers instead of noise.
    """

    def __init__(self, width: int, hidden_width: int, eps: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.norm = nn.LayerNorm(hidden_width, eps=eps)
        self.down = nn.Linear(hidden_width, width, bias=False)
        nn.init.orthogonal_(self.up.weight)
        with torch.no_grad():
            self.down.weight.copy_(self.up.weight.T)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        return self.down(self.norm(self.up(tokens_BNC)))


class ExpertMixer(nn.Module):
    """Layer experts weighted per token by a linear router."""

    def __init__(self, width: int, config: FusionConfig, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.norm_eps = norm_eps
        num_layers = config.num_layers
        self.experts = nn.ModuleList(
            Expert(width, config.hidden_width, config.hidden_norm_eps) for _ in range(num_layers)
        )
        self.router = nn.Linear(num_layers * width, num_layers)
        # Equal weights of unit energy: the energy normalisation divides gradients by |w|.
        nn.init.zeros_(self.router.weight)
        nn.init.constant_(self.router.bias, num_layers**-0.5)

    @property
    def last_layer(self) -> Tensor:
        """Output map of the deepest layer's expert, [C, H]."""
        return self.experts.get_parameter(f"{len(self.experts) - 1}.down.weight")

    def route(self, hidden_states: Sequence[Tensor], normalized: Sequence[Tensor]) -> Tensor:
        """Router weights w, [B, N, L]; negative values suppress a layer."""
        seen = normalized if self.config.router_input_norm else hidden_states
        weights_BNL = self.router(torch.cat(list(seen), dim=-1))
        return weights_BNL.softmax(dim=-1) if self.config.routing == "softmax" else weights_BNL

    def forward(self, hidden_states: Sequence[Tensor], normalized: Sequence[Tensor]) -> Tensor:
        weights_BNL = self.route(hidden_states, normalized)
        total_BNC = torch.zeros_like(normalized[0])
        for layer, (expert, tokens) in enumerate(zip(self.experts, normalized, strict=True)):
            output = token_norm(expert(tokens), self.norm_eps)
            total_BNC = total_BNC + weights_BNL[..., layer : layer + 1] * output
        if self.config.routing == "softmax":
            return token_norm(total_BNC, self.norm_eps)
        return energy_aggregate(total_BNC, weights_BNL, self.config.energy_eps, self.norm_eps)


class CrossAttentionMixer(nn.Module):
    """Ablation: each token's last layer attends over that token's layers."""

    def __init__(self, width: int, config: FusionConfig, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm_eps = norm_eps
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    @property
    def last_layer(self) -> Tensor:
        """The output projection, [C, C]."""
        return self.out.weight

    def forward(self, hidden_states: Sequence[Tensor], normalized: Sequence[Tensor]) -> Tensor:
        layers_BNLC = torch.stack(list(normalized), dim=2)
        query = self.query(normalized[-1])[:, :, None].unflatten(-1, (self.num_heads, -1))
        key, value = self.key_value(layers_BNLC).unflatten(-1, (2, self.num_heads, -1)).unbind(dim=-3)
        mixed = F.scaled_dot_product_attention(*(part.transpose(2, 3) for part in (query, key, value)))
        return token_norm(self.out(mixed.transpose(2, 3).flatten(2)), self.norm_eps)


class Fusion(Freezable):
    """Fuses the deepest layers' patch tokens into the enriched latent z_final."""

    def __init__(self, config: FusionConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.norm_eps = encoder.layer_norm_eps
        mixer = ExpertMixer if config.mixer == "experts" else CrossAttentionMixer
        self.mixer = mixer(encoder.width, config, self.norm_eps)

    @property
    def last_layer(self) -> Tensor:
        """The weight nearest the output, at which phase 2 balances the adversarial term."""
        return self.mixer.last_layer

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Enriched latent of every block's patch tokens.

        Args:
            hidden_states: z^(k) for k = 1..depth, each [B, N, C], not normalised.

        Returns:
            z_final, [B, N, C]; with ``beta = 0`` exactly z_base.
        """
        if self.config.correction == "incremental" and self.config.beta == 0:
            return token_norm(hidden_states[-1], self.norm_eps)
        base, fused = self.base_and_fused(hidden_states)
        if self.config.correction == "replace":
            return fused
        return incremental_correction(base, fused, self.config.beta, self.norm_eps)

    def base_and_fused(self, hidden_states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """z_base and z_fuse, each [B, N, C], before the correction."""
        selected, normalized = self._select(hidden_states)
        return normalized[-1], self.mixer(selected, normalized)

    def router_weights(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Router weights w of every token, [B, N, L], for analysis.

        Raises:
            TypeError: the fusion is the cross-attention ablation, which has no router.
        """
        if not isinstance(self.mixer, ExpertMixer):
            raise TypeError("the cross_attention mixer has no router weights")
        return self.mixer.route(*self._select(hidden_states))

    def _select(self, hidden_states: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        selected = hidden_states[-self.config.num_layers :]
        return selected, [token_norm(tokens, self.norm_eps) for tokens in selected]
