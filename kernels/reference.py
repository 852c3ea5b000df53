"""Plain PyTorch definitions of the fusion's operators; every faster path is tested against these.

Shape legend: B batch, N tokens, C width, L layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_norm(tokens: Tensor, eps: float) -> Tensor:
    """LN_bb: the backbone's final LayerNorm without its affine part, over the last dimension.

    Args:
        tokens: [..., C].
        eps: added to the variance.

    Returns:
        [..., C], zero mean and unit variance per token.
    """
    return F.layer_norm(tokens, tokens.shape[-1:], eps=eps)


def energy_aggregate(weighted_sum: Tensor, weights: Tensor, energy_eps: float, norm_eps: float) -> Tensor:
    """Energy-constrained aggregation: ``LN_bb(sum_k w_k h_k / sqrt(sum_k w_k^2 + eps))``.

    Dividing by the weights' energy instead of a softmax keeps negative weights, with which the
    router suppresses a layer.

    Args:
        weighted_sum: ``sum_k w_k h_k``, [B, N, C].
        weights: w, [B, N, L].
        energy_eps: keeps an all-zero w finite.
        norm_eps: eps of LN_bb.

    Returns:
        z_fuse, [B, N, C].
    """
    energy = torch.sqrt(weights.square().sum(dim=-1, keepdim=True) + energy_eps)
    return token_norm(weighted_sum / energy, norm_eps)


def incremental_correction(base: Tensor, fused: Tensor, beta: float, norm_eps: float) -> Tensor:
    """``z_final = LN_bb(z_base + beta (z_fuse - z_base))``; ``beta = 0`` is z_base itself, bit for bit.

    Args:
        base: z_base, [B, N, C], already normalised.
        fused: z_fuse, [B, N, C].
        beta: size of the correction, in [0, 1].
        norm_eps: eps of LN_bb.

    Returns:
        z_final, [B, N, C].
    """
    if beta == 0:
        return base
    return token_norm(torch.lerp(base, fused, beta), norm_eps)
