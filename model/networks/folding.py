"""Folding: an exact rewrite of trained experts that makes their width free at inference.

An expert is linear but for two normalisations. With ``P_n = I - 11^T / n`` (mean removal), G and b
LN_bb's affine part (identity and zero for the paper's plain LN_bb) and x the token normalised without it,

    P_H up (G x + b) = Q (hidden x + hidden_bias)                 QR of P_H up [G P_C, b]
    s^2 = |hidden x + hidden_bias|^2 / H + eps_H                  variance that LayerNorm_H divides by
    factor = P_C down diag(gain) Q,   product = factor hidden
    a = product x + factor hidden_bias + s P_C down shift         the output before LN_bb, times s
    h = G a / sqrt(|a|^2 / C + eps_bb s^2) + b

which is the definition's h, both eps included. Multiply-adds per token and layer are 2 C H before and
C^2 + C^2/2 after (``hidden`` is triangular), whatever H is.

Shape legend: L layers, C token width, H expert hidden width, R = min(H, C), or min(H, C + 1) with a bias.
"""

import math

import torch
from torch import Tensor

from kernels.operands import ExpertWeights, FoldedExperts, FusionSpec


@torch.no_grad()
def fold_experts(weights: ExpertWeights, spec: FusionSpec) -> FoldedExperts:
    """Fold trained experts, in float64 on the weights' device.

    Args:
        weights: the experts and the router.
        spec: scalars; the backbone norm's eps is folded in.

    Returns:
        Operands in float64; ``.to(device, dtype)`` gives those for inference.

    Raises:
        ValueError: an expert holds a non-finite weight; names the layer.
    """
    layers = [_fold_expert(weights, layer, spec.norm_eps) for layer in range(weights.num_layers)]
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    is_plain = weights.norm_bias is None
    return FoldedExperts(
        hidden=stacked["hidden"],
        hidden_bias=None if is_plain else stacked["hidden_bias"],
        factor=stacked["factor"],
        product=stacked["product"],
        product_bias=None if is_plain else stacked["product_bias"],
        shift=stacked["shift"] if bool(stacked["shift"].any()) else None,
        hidden_scale=stacked["hidden_scale"],
        output_eps=stacked["output_eps"],
        router_weight=weights.router_weight.double(),
        router_bias=weights.router_bias.double(),
        norm_weight=None if weights.norm_weight is None else weights.norm_weight.double(),
        norm_bias=None if weights.norm_bias is None else weights.norm_bias.double(),
    )


def _fold_expert(weights: ExpertWeights, layer: int, norm_eps: float) -> dict[str, Tensor]:
    up, gain, shift, down = (
        parts[layer].double() for parts in (weights.up, weights.gain, weights.shift, weights.down)
    )
    if not all(bool(torch.isfinite(part).all()) for part in (up, gain, shift, down)):
        raise ValueError(f"expert {layer} cannot be folded: a weight is not finite")
    hidden_width, width = up.shape
    scaled_up = up if weights.norm_weight is None else up * weights.norm_weight.double()
    bias = up.new_zeros(width) if weights.norm_bias is None else weights.norm_bias.double()
    columns = torch.cat([_centre(scaled_up, dim=1), (up @ bias)[:, None]], dim=1)  # [H, C + 1]
    if weights.norm_bias is None:
        columns = columns[:, :width]
    q, r = torch.linalg.qr(_centre(columns, dim=0))
    hidden, hidden_bias = r[:, :width], r[:, width:].sum(dim=1)
    centred_down = _centre(down, dim=0)
    factor = (centred_down * gain) @ q
    product = factor @ hidden
    hidden_unit, product_unit = _power_of_two(hidden), _power_of_two(product)
    return {
        "hidden": hidden / hidden_unit,
        "hidden_bias": hidden_bias / hidden_unit,
        "factor": factor * (hidden_unit / product_unit),
        "product": product / product_unit,
        "product_bias": factor @ hidden_bias / product_unit,
        "shift": centred_down @ shift / product_unit,
        "hidden_scale": up.new_tensor(hidden_unit**2 / hidden_width),
        "output_eps": up.new_tensor(norm_eps / product_unit**2),
    }


def _centre(matrix: Tensor, dim: int) -> Tensor:
    """Remove the mean along a dimension: P_n applied from that side."""
    return matrix - matrix.mean(dim=dim, keepdim=True)


def _power_of_two(matrix: Tensor) -> float:
    """The power of two nearest to the norm of the matrix's typical row; 1 for a zero matrix."""
    norm = float(torch.linalg.norm(matrix)) / math.sqrt(matrix.shape[0])
    return 2.0 ** round(math.log2(norm)) if norm > 0 else 1.0
