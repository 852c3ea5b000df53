"""A fusion in closed form: experts that write what a linear regression finds missing.

Let D be the best linear decoder of base latents, and r what it misses. A ridge regression predicts r from
the layers before the last; the smallest change of the latent that makes D give the prediction is again
linear in the layers, ``delta = sum_k M_k x_k``. An expert can be made nearly linear: paired directions give
its LayerNorm a constant norm, and its shift adds a constant vector beside which ``M_k x_k`` is small, so
that LN_bb hardly changes it. The constants of all experts cancel, in directions to which D is deaf. The
last layer's expert keeps z_base, and the router gives it the weight at which the correction, after its two
normalisations, adds ``delta``.

Shape legend: L layers, C width, H expert hidden width, P patch values (3 p^2), T tokens.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.reference import token_norm
from model.fusion import Expert, ExpertMixer, Fusion
from training.readout import PENALTY, Ridge

logger = logging.getLogger(__name__)

CHUNK = 4096
# Deviations of delta to try: z_final can differ from z_base by beta / (1 - beta) at most.
SHARES = (0.2, 0.3, 0.45)
# The terms M_k x_k are several times as large as their sum: they must keep their proportions.
CARRIER_GAIN = 20.0


@dataclass(frozen=True)
class Correction:
    """``delta = sum_k (M_k x_k + m_k)``, each term of mean zero.

    Attributes:
        maps: M_k, [L - 1, C, C].
        offsets: m_k, [L - 1, C].
        spread: mean square of each term, [L - 1].
        base_weight: regression of `base_weight` on these layers and a constant, [(L - 1) * C + 1].
    """

    maps: Tensor
    offsets: Tensor
    spread: Tensor
    base_weight: Tensor


def is_solvable(fusion: Fusion) -> bool:
    """Whether this kind of fusion has the closed form: energy routing, a correction, room for pairs."""
    config = fusion.config
    return (
        isinstance(fusion.mixer, ExpertMixer)
        and config.routing == "energy"
        and config.correction == "incremental"
        and config.router_input_norm
        and 0 < config.beta < 1
        and config.num_layers >= 3
        and config.hidden_width >= 2 * fusion.width
    )


@torch.no_grad()
def solve_fusion(
    fusion: Fusion, states_TLC: Tensor, patches_TP: Tensor, decoder: nn.Linear, generator: torch.Generator
) -> float:
    """Set the fusion to the closed form that serves best under the frozen linear decoder.

    Args:
        fusion: of a kind that `is_solvable`; overwritten.
        states_TLC: hidden states of tokens, not normalised.
        patches_TP: what the decoder should give for them.
        decoder: linear, of base latents.
        generator: of the experts' directions, on the CPU.

    Returns:
        Mean squared error of the decoder on (every eighth of) the fused tokens.
    """
    regression = _Regression(states_TLC, patches_TP, decoder, fusion.spec.norm_eps)
    limit = fusion.config.beta / (1 - fusion.config.beta)
    sample = slice(0, None, 8)
    best: tuple[float, dict[str, Tensor]] | None = None
    for share in SHARES:
        _write(fusion, regression.correction(share * limit, fusion.config.beta), decoder, generator)
        found = torch.cat([decoder(fuse_tokens(fusion, part)) for part in states_TLC[sample].split(CHUNK)])
        error = F.mse_loss(found, patches_TP[sample].float()).item()
        logger.info("closed form with delta of deviation %.3f: squared error %.4f", share * limit, error)
        if best is None or error < best[0]:
            best = error, {name: value.clone() for name, value in fusion.state_dict().items()}
    assert best is not None
    fusion.load_state_dict(best[1])
    return best[0]


def fuse_tokens(fusion: Fusion, states_TLC: Tensor) -> Tensor:
    """Enriched latents [T, C] of tokens' hidden states."""
    return fusion([layer[None] for layer in states_TLC.float().unbind(dim=1)])[0]


class _Regression:
    """From the normalised states before the last to what the decoder misses, and to delta's size."""

    def __init__(self, states_TLC: Tensor, patches_TP: Tensor, decoder: nn.Linear, eps: float) -> None:
        self.states, self.eps = states_TLC, eps
        num_layers, self.width = states_TLC.shape[1:]
        self.ridge = Ridge((num_layers - 1) * self.width, patches_TP.shape[1], torch.float32)
        for states, patches in zip(states_TLC.split(CHUNK), patches_TP.split(CHUNK), strict=True):
            normalized = token_norm(states.float(), eps)
            self.ridge.add(normalized[:, :-1].flatten(1), patches.float() - decoder(normalized[:, -1]))
        weights = self.ridge.solve(PENALTY * self.ridge.num_rows).weights
        self.maps_FP, self.intercept_P = weights[:-1], weights[-1]
        left, self.values, right = torch.linalg.svd(decoder.weight.double(), full_matrices=False)
        # The prediction along the decoder's output directions: what a change of the latent can give.
        self.left_PC, self.right_CC = left, right.T
        self.seen_FC = self.maps_FP @ left

    def correction(self, deviation: float, beta: float) -> Correction:
        """The smallest change that gives the prediction, damped so that its deviation is as wanted."""
        gram = self.ridge.gram / self.ridge.num_rows
        mean_F = gram[-1, :-1]
        covariance = gram[:-1, :-1] - torch.outer(mean_F, mean_F)
        power_C = ((covariance @ self.seen_FC) * self.seen_FC).sum(dim=0)
        gain_C = self.values / (self.values**2 + self._damping(power_C, deviation))
        change_CP = (self.right_CC * gain_C) @ self.left_PC.T
        maps_CF = change_CP @ self.maps_FP.T
        maps_CF = maps_CF - maps_CF.mean(dim=0)  # LN_bb takes the mean over C away
        maps = maps_CF.unflatten(1, (-1, self.width)).transpose(0, 1)
        blocks = covariance.unflatten(0, (-1, self.width)).unflatten(2, (-1, self.width))
        spread = torch.stack([((m @ blocks[k, :, k]) * m).sum() / self.width for k, m in enumerate(maps)])
        offsets = -(maps @ mean_F.view(-1, self.width, 1))[..., 0]
        return Correction(maps, offsets, spread, self._base_weight(maps_CF, offsets.sum(dim=0), beta))

    def _damping(self, power_C: Tensor, deviation: float) -> float:
        low, high = -12.0, 6.0
        for _ in range(60):
            middle = (low + high) / 2
            gain = self.values / (self.values**2 + 10**middle)
            is_large = (gain**2 * power_C).sum() / self.width > deviation**2
            low, high = (middle, high) if is_large else (low, middle)
        return float(10**high)

    def _base_weight(self, maps_CF: Tensor, offset_C: Tensor, beta: float) -> Tensor:
        """Regression of `base_weight` on the same features, [F + 1]."""
        ridge = Ridge(maps_CF.shape[1], 1, torch.float32)
        ridge.gram = self.ridge.gram  # of the same features
        for states in self.states.split(CHUNK):
            features = token_norm(states[:, :-1].float(), self.eps).flatten(1)
            change = features @ maps_CF.T.float() + offset_C.float()
            wanted = base_weight(change.square().mean(dim=1), beta)
            ridge.cross += torch.cat([features, features.new_ones(len(features), 1)], 1).T @ wanted[:, None]
        return ridge.solve(10 * PENALTY * ridge.num_rows).weights[:, 0]


def base_weight(square: Tensor, beta: float) -> Tensor:
    """How much of z_base z_fuse must keep, over how much of delta, for the correction to add delta.

    With ``z_fuse = c z_base + d delta`` of unit norm and delta orthogonal to z_base, the correction gives
    ``z_base + delta``, up to scale, where ``beta d = 1 - beta + beta c``.

    Args:
        square: mean square of delta per token.
        beta: of the correction.

    Returns:
        c / d; 0 where delta is larger than the correction can be.
    """
    kappa = (1 - beta) / beta
    linear = square * kappa
    root = (linear**2 - (1 + square) * (kappa * linear - 1)).clamp_min(0)
    kept = ((root.sqrt() - linear) / (1 + square)).clamp_min(0)
    return kept / (kappa + kept)


def _write(fusion: Fusion, correction: Correction, decoder: nn.Linear, generator: torch.Generator) -> None:
    """Put a correction into experts and router."""
    mixer = fusion.mixer
    assert isinstance(mixer, ExpertMixer)
    width, (*early, last) = fusion.width, mixer.experts
    carrier = (
        CARRIER_GAIN * float(correction.spread.max()) ** 0.5
    )  # the constant beside which M_k x_k is small
    amplitude = float((carrier**2 + correction.spread).sqrt().mean())
    constants = carrier * _cancelling_constants(decoder, len(early)) + correction.offsets
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    for expert, map_CC, constant in zip(early, correction.maps, constants, strict=True):
        _write_expert(expert, map_CC, constant, basis)
    _write_expert(last, torch.eye(width, dtype=torch.float64), torch.zeros_like(constants[0]), basis)
    # The other experts give delta / amplitude.
    nn.init.zeros_(mixer.router.weight)
    nn.init.ones_(mixer.router.bias)
    mixer.router.weight[-1, :-width] = correction.base_weight[:-1] / amplitude
    mixer.router.bias[-1] = correction.base_weight[-1] / amplitude


def _write_expert(expert: nn.Module, map_CC: Tensor, constant_C: Tensor, basis_CC: Tensor) -> None:
    """``y = map x + constant`` for states of unit variance.

    The hidden units come in pairs of opposite sign, so that their mean is zero and their norm that of x.
    """
    assert isinstance(expert, Expert)
    hidden_width, width = expert.up.weight.shape
    nn.init.zeros_(expert.up.weight)
    nn.init.zeros_(expert.down.weight)
    expert.up.weight[:width] = basis_CC / 2**0.5
    expert.up.weight[width : 2 * width] = -basis_CC / 2**0.5
    scale = (2 * hidden_width / width) ** 0.5  # of W2's pairs after the LayerNorm over H
    expert.down.weight[:, :width] = map_CC @ basis_CC.T / scale
    expert.down.weight[:, width : 2 * width] = -map_CC @ basis_CC.T / scale
    expert.down.weight += constant_C[:, None] / hidden_width
    nn.init.ones_(expert.norm.weight)
    nn.init.ones_(expert.norm.bias)


def _cancelling_constants(decoder: nn.Linear, count: int) -> Tensor:
    """``count`` vectors of unit variance that sum to zero, where the decoder is deaf: [count, C]."""
    gram = decoder.weight.double().T @ decoder.weight.double()
    # The mean over C is out of bounds, because LN_bb takes it away.
    gram = gram + gram.diagonal().sum() / len(gram)
    directions = torch.linalg.eigh(gram).eigenvectors[:, :count].T
    simplex = torch.eye(count, dtype=torch.float64) - 1 / count
    vectors = simplex @ directions
    return vectors / vectors.square().mean(dim=1, keepdim=True).sqrt()
