"""Device code of the fused operator: four Triton kernels, from raw hidden states to z_final.

`measure` reads each hidden state: LayerNorm statistics, its share of the router's logits, and the norm
of the expert's output without the output (``|a|^2`` and ``s^2`` are weighted sums of squares of one
projection, the folded basis). `route` makes router weights of the logits, and of weights and norms the
factor that each layer's output takes. `combine` is then one matrix product of depth L * C, of the raw
tokens: between two layers the sum so far is scaled by the ratio of their factors. `finish` adds the
splits up and applies the last norms.

The hidden states lie evenly apart in one buffer, and are read where the encoder wrote them. Raw tokens go
into every product: their mean leaves by the sums of the rounded rows. Every row of every product belongs
to one token, so a non-finite token spoils only itself.

Shape legend: T tokens, L layers, P logit columns (L padded), C token width, R rows of a basis; BM x BN
output tiles, BK depth of a step; S splits of the basis. Vectors and accumulators are float32.
"""

import triton
import triton.language as tl

NOT_SPECIALIZED = ["num_tokens", "tokens_per_image"]
"""Compiled once for all: 196 or 729 tokens per image would else compile anew in the middle of traffic."""

FP8_TOKEN_UNITS = tl.constexpr(8.0)
"""Of a normalised token, of which no channel exceeds sqrt(C), at most 45: e4m3 reaches 448."""


@triton.jit
def _token_offsets(rows, tokens_per_image, stride_image, stride_token):
    """Element offset of each token, 64-bit: class and register tokens are skipped by the image stride."""
    image = (rows // tokens_per_image).to(tl.int64)
    return image * stride_image + (rows % tokens_per_image).to(tl.int64) * stride_token


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right`` in float32 accumulators."""
    # Triton's interpreter multiplies bfloat16's bit patterns (triton-lang/triton#11584): there the
    # operands, already rounded, are widened first, which is the tensor cores' arithmetic.
    if PRECISION == "interpreted":
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32))
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _round(values, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """float32 to ``dtype``, to nearest even; float16 saturates, and keeps NaN."""
    if dtype == tl.float16:
        values = tl.clamp(values, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    # The interpreter cuts bfloat16's lower bits off: there half a unit is added first, as the hardware does.
    if PRECISION == "interpreted" and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _tile_energies(p, mean, rstd, sums, energies, FP8: tl.constexpr):
    """``|p|^2`` and ``sum_i energy_i p_i^2`` of one tile of columns, [BM] each."""
    if FP8:  # of normalised tokens, and rows that have units of their own
        p *= tl.load(sums)[None, :]
    else:
        p = rstd[:, None] * (p - mean[:, None] * tl.load(sums)[None, :])
    p *= p
    return tl.sum(p, axis=1), tl.sum(p * tl.load(energies)[None, :], axis=1)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def measure(
    states_ptr,
    router_ptr,  # [L, TERMS * P, C]
    router_sum_ptr,  # [L, TERMS * P]
    cross_ptr,  # [L, C]
    basis_ptr,  # [L, R, C]
    basis_sum_ptr,  # [L, R]; units of the rows with FP8
    basis_energy_ptr,  # [L, R]
    logits_ptr,  # out [L, T, P]
    mean_ptr,  # out [L, T]
    rstd_ptr,  # out [L, T]
    overlap_ptr,  # out [L, T]
    energy_ptr,  # out [2, S, L, T]
    num_tokens,
    tokens_per_image,
    stride_image,
    stride_token,
    stride_layer,
    norm_eps,
    L: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    TERMS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS_PER_SPLIT: tl.constexpr,
    ROUTER_NORM: tl.constexpr,
    FP8: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Per token and layer, with x the normalised token: mean, 1 / deviation, logits, ``cross . x``; and of
    one split's rows of ``p = basis x`` the sums ``|p|^2`` and ``sum_i energy_i p_i^2``.
    """
    layer = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < num_tokens
    ks = tl.arange(0, BK)
    ns = tl.arange(0, BN)
    columns = tl.arange(0, P)
    terms = tl.arange(0, TERMS * P)
    offsets = _token_offsets(rows, tokens_per_image, stride_image, stride_token)
    tokens = states_ptr + layer.to(tl.int64) * stride_layer + offsets[:, None] + ks[None, :]
    router = router_ptr + layer * TERMS * P * C + terms[None, :] * C + ks[:, None]
    first = layer * R + split * COLUMNS_PER_SPLIT
    basis = basis_ptr + first * C + ns[None, :] * C + ks[:, None]

    # The first columns of the projection share their reading of the token with everything else that is
    # wanted of it. Sums of deviations from a pivot near the mean do not cancel as plain sums would: the
    # mean of BK of the C channels lies within sqrt(C / BK) standard deviations of the mean.
    pivot = tl.sum(tl.load(tokens, mask=valid[:, None], other=0.0).to(tl.float32), axis=1) / BK
    deviation = tl.zeros((BM,), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    cross = tl.zeros((BM,), tl.float32)
    logits = tl.zeros((BM, TERMS * P), tl.float32)
    p = tl.zeros((BM, BN), tl.float32)
    for k in range(0, C, BK):
        z = tl.load(tokens + k, mask=valid[:, None], other=0.0)
        if not FP8:
            p = _dot(z, tl.load(basis + k), p, PRECISION)
        logits = _dot(z, tl.load(router + k), logits, PRECISION)
        centred = z.to(tl.float32) - pivot[:, None]
        deviation += tl.sum(centred, axis=1)
        square += tl.sum(centred * centred, axis=1)
        if HAS_SHIFT:
            cross += tl.sum(centred * tl.load(cross_ptr + layer * C + k + ks)[None, :], axis=1)
    deviation /= C
    mean = pivot + deviation
    variance = tl.maximum(square / C - deviation * deviation, 0.0)
    # Of a constant token the products hold rounding alone, which the norms would magnify: its x is zero.
    rstd = tl.where(variance <= mean * mean * 2.0**-40, 0.0, tl.rsqrt(variance + norm_eps))
    at = layer * num_tokens + rows
    # All splits of the basis need mean and deviation, and one of them writes what they found alike.
    writes = valid & (split == 0)
    tl.store(mean_ptr + at, mean, mask=writes)
    tl.store(rstd_ptr + at, rstd, mask=writes)
    if HAS_SHIFT:
        tl.store(overlap_ptr + at, rstd * cross, mask=writes)
    if ROUTER_NORM:
        row_sums = tl.load(router_sum_ptr + layer * TERMS * P + terms)
        logits = rstd[:, None] * (logits - mean[:, None] * row_sums[None, :])
    if TERMS > 1:
        logits = tl.sum(tl.reshape(logits, (BM, TERMS, P)), axis=1)
    tl.store(logits_ptr + at.to(tl.int64)[:, None] * P + columns[None, :], logits, mask=writes[:, None])

    sums = basis_sum_ptr + first + ns
    energies = basis_energy_ptr + first + ns
    hidden_energy, product_energy = _tile_energies(p, mean, rstd, sums, energies, FP8)
    # FP8 takes normalised tokens, whose statistics must be known first: the pass above then has no columns.
    for n in range(0 if FP8 else BN, COLUMNS_PER_SPLIT, BN):
        p = tl.zeros((BM, BN), tl.float32)
        for k in range(0, C, BK):
            z = tl.load(tokens + k, mask=valid[:, None], other=0.0)
            if FP8:
                x = (z.to(tl.float32) - mean[:, None]) * (rstd * FP8_TOKEN_UNITS)[:, None]
                z = x.to(tl.float8e4nv)
            p = _dot(z, tl.load(basis + n * C + k), p, PRECISION)
        hidden, product = _tile_energies(p, mean, rstd, sums + n, energies + n, FP8)
        hidden_energy += hidden
        product_energy += product
    energy = energy_ptr + split * L * num_tokens + at
    tl.store(energy, hidden_energy, mask=valid)
    tl.store(energy + SPLITS * L * num_tokens, product_energy, mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def route(
    logits_ptr,  # [L, T, P]
    router_bias_ptr,  # [P]
    constants_ptr,  # [4, L]: hidden_scale, output_eps, |shift|^2, the router's unit
    energy_ptr,  # [2, S, L, T]
    overlap_ptr,  # [L, T]
    rstd_ptr,  # [L, T]
    weights_ptr,  # out [T, L]
    scale_ptr,  # out [L, T]
    tail_ptr,  # out [L, T]
    num_tokens,
    energy_eps,
    hidden_eps,
    L: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BM: tl.constexpr,
):
    """Router weights w; and of each layer's ``z - mean`` (scale) and ``shift`` (tail) the factor in the sum.

    With ``s^2 = hidden_scale |p|^2 + hidden_eps``,
    ``|a|^2 = sum_i energy_i p_i^2 + 2 s (cross . x) + s^2 |shift|^2``.
    `combine` divides one layer's scale by the next one's, so none may be zero: see `_bounded`.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.arange(0, P)
    inside = (rows < num_tokens)[:, None] & (columns < L)[None, :]
    weights = tl.zeros((BM, P), tl.float32) + tl.load(router_bias_ptr + columns)[None, :]
    for layer in range(L):
        at = (layer * num_tokens + rows).to(tl.int64)[:, None] * P + columns[None, :]
        logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
        weights += logits * tl.load(constants_ptr + 3 * L + layer)
    if SOFTMAX:
        weights = tl.where((columns < L)[None, :], weights, float("-inf"))
        weights = tl.exp(weights - tl.max(weights, axis=1)[:, None])
        weights /= tl.sum(weights, axis=1)[:, None]
        mixing = weights
    else:
        mixing = weights * tl.rsqrt(tl.sum(weights * weights, axis=1) + energy_eps)[:, None]
    tl.store(weights_ptr + rows[:, None] * L + columns[None, :], weights, mask=inside)

    at = columns[None, :] * num_tokens + rows[:, None]
    hidden_energy = tl.zeros((BM, P), tl.float32)
    energy = tl.zeros((BM, P), tl.float32)
    for split in range(SPLITS):
        part = energy_ptr + split * L * num_tokens + at
        hidden_energy += tl.load(part, mask=inside, other=0.0)
        energy += tl.load(part + SPLITS * L * num_tokens, mask=inside, other=0.0)
    constants = constants_ptr + columns
    real = columns < L
    variance = hidden_energy * tl.load(constants, mask=real, other=0.0)[None, :] + hidden_eps
    if HAS_SHIFT:
        overlap = tl.load(overlap_ptr + at, mask=inside, other=0.0)
        shift_energy = tl.load(constants + 2 * L, mask=real, other=0.0)[None, :]
        energy += 2 * tl.sqrt(variance) * overlap + variance * shift_energy
    floor = variance * tl.load(constants + L, mask=real, other=1.0)[None, :]
    mixing *= tl.rsqrt(tl.maximum(energy, 0.0) / C + floor)
    if HAS_SHIFT:
        tl.store(tail_ptr + at, mixing * tl.sqrt(variance), mask=inside)
    scale = mixing * tl.load(rstd_ptr + at, mask=inside, other=0.0)
    tl.store(scale_ptr + at, _bounded(tl.where(inside, scale, 0.0)), mask=inside)


@triton.jit
def _bounded(scale):
    """Scales [BM, P] away from zero, with their signs: at least 2^-40 of the token's largest, and 2^-100.

    What that adds to the sum over layers is 1e-12 of it; the sum so far grows by 2^40 at most, far below
    float32's limit. A token whose scales are all zero gets ratios of 1, and a sum of next to nothing.
    """
    magnitude = tl.abs(scale)
    floor = tl.maximum(tl.max(magnitude, axis=1) * 2.0**-40, 2.0**-100)[:, None]
    return tl.where(magnitude < floor, tl.where(scale < 0, -floor, floor), scale)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def combine(
    states_ptr,
    product_ptr,  # [L, C, C]
    product_sum_ptr,  # [L, C]
    shift_ptr,  # [L, C]
    mean_ptr,  # [L, T]
    scale_ptr,  # [L, T]
    tail_ptr,  # [L, T]
    partial_ptr,  # out [splits, T, C]
    num_tokens,
    tokens_per_image,
    stride_image,
    stride_token,
    stride_layer,
    L: tl.constexpr,
    LAYERS_PER_SPLIT: tl.constexpr,
    C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``sum_k mixing_k h_k`` over one split's layers: one product of depth layers * C.

    Both operands go from shared memory to the tensor cores as they lie in device memory. With
    ``y_k = product_k (z_k - mean_k)`` and ``r_k = scale_k / scale_(k + 1)`` the sum is
    ``((y_1 r_1 + y_2) r_2 + ...) scale_last``.
    """
    split = tl.program_id(1)
    # Neighbouring programs share rows, so that a token tile comes from L2 for all but the first.
    rows = tl.program_id(0) // (C // BN) * BM + tl.arange(0, BM)
    ns = tl.program_id(0) % (C // BN) * BN + tl.arange(0, BN)
    valid = rows < num_tokens
    ks = tl.arange(0, BK)
    offsets = _token_offsets(rows, tokens_per_image, stride_image, stride_token)[:, None] + ks[None, :]
    product = product_ptr + ns[None, :] * C + ks[:, None]
    first = split * LAYERS_PER_SPLIT
    last = tl.minimum(first + LAYERS_PER_SPLIT, L)
    total = tl.zeros((BM, BN), tl.float32)
    for layer in range(first, last):
        tokens = states_ptr + stride_layer.to(tl.int64) * layer + offsets
        for k in range(0, C, BK):
            z = tl.load(tokens + k, mask=valid[:, None], other=0.0)
            total = _dot(z, tl.load(product + layer * C * C + k), total, PRECISION)
        at = layer * num_tokens + rows
        mean = tl.load(mean_ptr + at, mask=valid, other=0.0)
        scale = tl.load(scale_ptr + at, mask=valid, other=0.0)
        next_scale = tl.load(scale_ptr + at + num_tokens, mask=valid & (layer + 1 < last), other=1.0)
        row_sums = tl.load(product_sum_ptr + layer * C + ns)
        total = (total - mean[:, None] * row_sums[None, :]) * (scale / next_scale)[:, None]
    if HAS_SHIFT:
        for layer in range(first, last):
            tail = tl.load(tail_ptr + layer * num_tokens + rows, mask=valid, other=0.0)
            total += tail[:, None] * tl.load(shift_ptr + layer * C + ns)[None, :]
    at = (split * num_tokens + rows).to(tl.int64)[:, None] * C + ns[None, :]
    tl.store(partial_ptr + at, total, mask=valid[:, None])


@triton.jit
def _norm(tokens, inside, eps, C: tl.constexpr):
    """LN_bb over the last dimension; columns outside C hold zeros, before and after."""
    centred = tl.where(inside, tokens - tl.sum(tokens, axis=1)[:, None] / C, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)[:, None]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish(
    partial_ptr,  # [splits, T, C]
    states_ptr,
    out_ptr,  # out [T, C]
    num_tokens,
    tokens_per_image,
    stride_image,
    stride_token,
    stride_layer,
    beta,
    norm_eps,
    L: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    REPLACE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z_fuse from the splits' sums, and z_final from it and the last hidden state."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < num_tokens)[:, None] & (columns < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    total = tl.zeros((BM, BLOCK_C), tl.float32)
    for split in range(SPLITS):  # more than one only for few tokens: 32 bits hold the offset
        total += tl.load(partial_ptr + split * num_tokens * C + at, mask=inside, other=0.0)
    out = _norm(total, inside, norm_eps, C)
    if not REPLACE:
        last = states_ptr + (L - 1) * stride_layer.to(tl.int64)
        offsets = _token_offsets(rows, tokens_per_image, stride_image, stride_token)
        state = tl.load(last + offsets[:, None] + columns[None, :], mask=inside, other=0.0)
        base = _norm(state.to(tl.float32), inside, norm_eps, C)
        out = _norm(base + beta * (out - base), inside, norm_eps, C)
    tl.store(out_ptr + at, _round(out, out_ptr.dtype.element_ty, PRECISION), mask=inside)
