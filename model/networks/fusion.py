"""Multi-layer representation fusion (arXiv 2605.10780, section 3): experts, router, correction.

The definition is what trains. For inference a frozen fusion is prepared: its experts are folded, and a
faster implementation takes over (`kernels.dispatch` chooses it).

Shape legend: B batch, N tokens, C width, H expert hidden width, L fused layers.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import folded
from kernels.dispatch import FusionPath, FusionProblem
from kernels.operands import ExpertWeights, Fused, FusionSpec
from kernels.reference import correct, expert_output, mix_experts, route, token_norm
from model.config import EncoderConfig, FusionConfig
from model.networks.folding import fold_experts
from model.networks.vit import Freezable

logger = logging.getLogger(__name__)


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
        weights = (self.up.weight, self.norm.weight, self.norm.bias, self.down.weight)
        return expert_output(tokens_BNC, *weights, self.norm.eps)


class ExpertMixer(nn.Module):
    """Layer experts weighted per token by a linear router."""

    def __init__(self, width: int, config: FusionConfig, spec: FusionSpec) -> None:
        super().__init__()
        self.spec = spec
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

    def weights(self) -> ExpertWeights:
        """The parameters as the operator takes them, without copies."""

        def each(name: str) -> list[Tensor]:
            return [expert.get_parameter(name) for expert in self.experts]

        return ExpertWeights(
            up=each("up.weight"),
            gain=each("norm.weight"),
            shift=each("norm.bias"),
            down=each("down.weight"),
            router_weight=self.router.weight,
            router_bias=self.router.bias,
        )

    def route(self, hidden_states: Sequence[Tensor], normalized: Sequence[Tensor]) -> Tensor:
        """Router weights w, [B, N, L]; negative values suppress a layer."""
        return route(hidden_states, normalized, self.weights(), self.spec)

    def forward(self, hidden_states: Sequence[Tensor], normalized: Sequence[Tensor]) -> Tensor:
        weights = self.weights()
        router_weights = route(hidden_states, normalized, weights, self.spec)
        return mix_experts(normalized, router_weights, weights, self.spec)


class CrossAttentionMixer(nn.Module):
    """Ablation: each token's last layer attends over that token's layers."""

    def __init__(self, width: int, config: FusionConfig, spec: FusionSpec) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm_eps = spec.norm_eps
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


@dataclass(frozen=True)
class PreparedFusion:
    """An inference implementation, with the operands that it reads."""

    path: FusionPath
    device: torch.device
    dtype: torch.dtype
    fuse: Callable[[Sequence[Tensor]], Fused]


class Fusion(Freezable):
    """Fuses the deepest layers' patch tokens into the enriched latent z_final."""

    def __init__(self, config: FusionConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width = encoder.width
        self.spec = FusionSpec(
            routing=config.routing,
            router_input_norm=config.router_input_norm,
            correction=config.correction,
            beta=config.beta,
            energy_eps=config.energy_eps,
            hidden_norm_eps=config.hidden_norm_eps,
            norm_eps=encoder.layer_norm_eps,
        )
        mixer = ExpertMixer if config.mixer == "experts" else CrossAttentionMixer
        self.mixer = mixer(encoder.width, config, self.spec)
        self._prepared: PreparedFusion | None = None

    @property
    def last_layer(self) -> Tensor:
        """The weight nearest the output, at which phase 2 balances the adversarial term."""
        return self.mixer.last_layer

    @property
    def path(self) -> FusionPath:
        """Which implementation runs on hidden states that need no gradient."""
        return "reference" if self._prepared is None else self._prepared.path

    @property
    def has_router(self) -> bool:
        """Whether a router weighs the layers; the cross-attention ablation has none."""
        return isinstance(self.mixer, ExpertMixer)

    def problem(self, dtype: torch.dtype) -> FusionProblem:
        """This fusion's sizes and options, for `kernels.dispatch.choose_path`."""
        return FusionProblem(
            num_layers=self.config.num_layers,
            width=self.width,
            hidden_width=self.config.hidden_width,
            dtype=dtype,
            has_experts=self.has_router,
        )

    def prepare(self, path: FusionPath, device: torch.device, dtype: torch.dtype) -> None:
        """Fold the experts for inference on ``device`` in ``dtype``, where the module is then moved.

        Folding before the move keeps the weights' full precision. Changing the weights or moving the
        module elsewhere afterwards brings the definition back.

        Args:
            path: as `kernels.dispatch.choose_path` gave it.
            device: where the hidden states will be.
            dtype: of the hidden states.

        Raises:
            ValueError: the fusion is not frozen, or a weight is not finite.
        """
        self._prepared = None
        if path == "reference":
            return
        if not self.frozen:
            raise ValueError("only a frozen fusion can be prepared for inference")
        assert isinstance(self.mixer, ExpertMixer)
        device = torch.empty(0, device=device).device  # "cuda" becomes the very device, as tensors name it
        experts = fold_experts(self.mixer.weights(), self.spec)
        fuse: Callable[[Sequence[Tensor]], Fused]
        if path.startswith("triton"):
            from kernels import fused  # triton is needed by these paths alone

            packed = fused.pack_experts(experts, device, dtype, fp8_norms=path == "triton_fp8")
            fuse = partial(fused.fuse_layers, packed=packed, spec=self.spec)
        else:
            moved = experts.to(device, dtype)
            maps = folded.make_maps(moved, pack=True)
            fuse = partial(folded.fuse_layers, folded=moved, spec=self.spec, maps=maps)
        self._prepared = PreparedFusion(path, device, dtype, fuse)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Enriched latent of every block's patch tokens.

        Args:
            hidden_states: z^(k) for k = 1..depth, each [B, N, C], not normalised.

        Returns:
            z_final, [B, N, C]; with ``beta = 0`` exactly z_base.
        """
        if self.config.correction == "incremental" and self.config.beta == 0:
            return token_norm(hidden_states[-1], self.spec.norm_eps)
        if self._prepared is not None and not any(state.requires_grad for state in hidden_states):
            return self._prepared.fuse(hidden_states[-self.config.num_layers :]).tokens
        base, fused = self.base_and_fused(hidden_states)
        return correct(base, fused, self.spec)

    def base_and_fused(self, hidden_states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """z_base and z_fuse by the definition, each [B, N, C], before the correction."""
        selected, normalized = self._select(hidden_states)
        return normalized[-1], self.mixer(selected, normalized)

    def router_weights(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Router weights w of every token, [B, N, L], as the implementation that runs computes them.

        Raises:
            TypeError: the fusion is the cross-attention ablation, which has no router.
        """
        if not isinstance(self.mixer, ExpertMixer):
            raise TypeError("the cross_attention mixer has no router weights")
        if self._prepared is not None and not any(state.requires_grad for state in hidden_states):
            return self._prepared.fuse(hidden_states[-self.config.num_layers :]).router_weights
        return self.mixer.route(*self._select(hidden_states))

    def forget_derived(self) -> None:
        self._prepared = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = self.last_layer
        prepared = self._prepared
        if prepared is not None and (weight.device, weight.dtype) != (prepared.device, prepared.dtype):
            logger.warning("the fusion was moved: it runs by its definition until it is prepared again")
            self._prepared = None
        return self

    def _select(self, hidden_states: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        selected = hidden_states[-self.config.num_layers :]
        return selected, [token_norm(tokens, self.spec.norm_eps) for tokens in selected]
