"""Device code of the fused operator: four Triton kernels, from raw hidden states to z_final.

`measure` reads each hidden state: LayerNorm statistics, its share of the router's logits, and the norm
of the expert's output without the output (``|a|^2`` and ``s^2`` are weighted sums of squares of one
projection, the folded basis). `route` makes router weights of the logits. `combine` is then one matrix
product of depth L * C whose left operand is normalised and weighted on its way from shared memory to
the tensor cores. `finish` adds the splits up and applies the last norms.

The hidden states come as a tuple of pointers, one per layer, and are read where the encoder wrote them.
Every row of every product belongs to one token, so a non-finite token spoils only itself.

Shape legend: T tokens, L layers, P logit columns (L padded), C token width, R rows of a basis;
BM x BN output tiles, BK depth of a step. Vectors and accumulators are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _select(pointers, index):
    """Pointer number ``index`` of a tuple, for an index known only at run time."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


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
def measure(
    hidden_states,
    router_ptr,  # [L, P, C]
    router_sum_ptr,  # [L, P]
    cross_ptr,  # [L, C]
    basis_ptr,  # [L, R, C]
    basis_sum_ptr,  # [L, R]
    basis_energy_ptr,  # [L, R]
    constants_ptr,  # [L, 3]: hidden_scale, output_eps, |shift|^2
    logits_ptr,  # out [L, T, P]
    mean_ptr,  # out [L, T]
    scale_ptr,  # out [L, T]
    tail_ptr,  # out [L, T]
    num_tokens,
    tokens_per_image,
    stride_image,
    stride_token,
    norm_eps,
    hidden_eps,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    ROUTER_NORM: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Per token and layer: mean, logits, and the factors of ``z - mean`` (scale) and ``shift`` (tail).

    With ``p = basis x``: ``s^2 = hidden_scale |p|^2 + hidden_eps`` and
    ``|a|^2 = sum_i energy_i p_i^2 + 2 s (cross . x) + s^2 |shift|^2``.
    """
    layer = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < num_tokens
    ks = tl.arange(0, BK)
    ns = tl.arange(0, BN)
    columns = tl.arange(0, P)
    offsets = _token_offsets(rows, tokens_per_image, stride_image, stride_token)
    tokens = _select(hidden_states, layer) + offsets[:, None] + ks[None, :]
    router = router_ptr + layer * P * C + columns[None, :] * C + ks[:, None]
    basis = basis_ptr + layer * R * C + ns[None, :] * C + ks[:, None]

    # The first columns of the projection share their reading of the token with everything else that is
    # wanted of it. Sums of deviations from a pivot near the mean do not cancel as plain sums would: the
    # mean of BK of the C channels lies within sqrt(C / BK) standard deviations of the mean.
    pivot = tl.sum(tl.load(tokens, mask=valid[:, None], other=0.0).to(tl.float32), axis=1) / BK
    deviation = tl.zeros((BM,), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    cross = tl.zeros((BM,), tl.float32)
    logits = tl.zeros((BM, P), tl.float32)
    p = tl.zeros((BM, BN), tl.float32)
    for k in range(0, C, BK):
        z = tl.load(tokens + k, mask=valid[:, None], other=0.0)
        p = _dot(z, tl.load(basis + k), p, PRECISION)
        logits = _dot(z, tl.load(router + k), logits, PRECISION)
        centred = z.to(tl.float32) - pivot[:, None]
        deviation += tl.sum(centred, axis=1)
        square += tl.sum(centred * centred, axis=1)
        if HAS_SHIFT:
            cross += tl.sum(centred * tl.load(cross_ptr + layer * C + k + ks)[None, :], axis=1)
    deviation /= C
    mean = pivot + deviation
    rstd = tl.rsqrt(tl.maximum(square / C - deviation * deviation, 0.0) + norm_eps)
    at = layer * num_tokens + rows
    tl.store(mean_ptr + at, mean, mask=valid)
    # Raw tokens went into the products: their mean leaves by the sums of the rounded rows.
    if ROUTER_NORM:
        row_sums = tl.load(router_sum_ptr + layer * P + columns)
        logits = rstd[:, None] * (logits - mean[:, None] * row_sums[None, :])
    tl.store(logits_ptr + at.to(tl.int64)[:, None] * P + columns[None, :], logits, mask=valid[:, None])

    sums = basis_sum_ptr + layer * R + ns
    energies = basis_energy_ptr + layer * R + ns
    p = rstd[:, None] * (p - mean[:, None] * tl.load(sums)[None, :])
    p *= p
    hidden_energy = tl.sum(p, axis=1)
    product_energy = tl.sum(p * tl.load(energies)[None, :], axis=1)
    for n in range(BN, R, BN):
        p = tl.zeros((BM, BN), tl.float32)
        for k in range(0, C, BK):
            z = tl.load(tokens + k, mask=valid[:, None], other=0.0)
            p = _dot(z, tl.load(basis + n * C + k), p, PRECISION)
        p = rstd[:, None] * (p - mean[:, None] * tl.load(sums + n)[None, :])
        p *= p
        hidden_energy += tl.sum(p, axis=1)
        product_energy += tl.sum(p * tl.load(energies + n)[None, :], axis=1)

    variance = hidden_energy * tl.load(constants_ptr + 3 * layer) + hidden_eps
    energy = product_energy
    if HAS_SHIFT:
        energy += 2 * tl.sqrt(variance) * rstd * cross + variance * tl.load(constants_ptr + 3 * layer + 2)
    floor = variance * tl.load(constants_ptr + 3 * layer + 1)
    inverse_norm = tl.rsqrt(tl.maximum(energy, 0.0) / C + floor)
    tl.store(scale_ptr + at, inverse_norm * rstd, mask=valid)
    if HAS_SHIFT:
        tl.store(tail_ptr + at, inverse_norm * tl.sqrt(variance), mask=valid)


@triton.jit
def route(
    logits_ptr,  # [L, T, P]
    router_bias_ptr,  # [P]
    weights_ptr,  # out [T, L]
    scale_ptr,  # in and out [L, T]
    tail_ptr,  # in and out [L, T]
    num_tokens,
    energy_eps,
    L: tl.constexpr,
    P: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BM: tl.constexpr,
):
    """Router weights w; ``measure``'s factors are multiplied by w over its energy, or by its softmax."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < num_tokens
    columns = tl.arange(0, P)
    inside = valid[:, None] & (columns < L)[None, :]
    weights = tl.zeros((BM, P), tl.float32) + tl.load(router_bias_ptr + columns)[None, :]
    for layer in range(L):
        at = (layer * num_tokens + rows).to(tl.int64)[:, None] * P + columns[None, :]
        weights += tl.load(logits_ptr + at, mask=inside, other=0.0)
    if SOFTMAX:
        weights = tl.where((columns < L)[None, :], weights, float("-inf"))
        weights = tl.exp(weights - tl.max(weights, axis=1)[:, None])
        weights /= tl.sum(weights, axis=1)[:, None]
        mixing = weights
    else:
        mixing = weights * tl.rsqrt(tl.sum(weights * weights, axis=1) + energy_eps)[:, None]
    tl.store(weights_ptr + rows[:, None] * L + columns[None, :], weights, mask=inside)
    at = columns[None, :] * num_tokens + rows[:, None]
    tl.store(scale_ptr + at, mixing * tl.load(scale_ptr + at, mask=inside, other=0.0), mask=inside)
    if HAS_SHIFT:
        tl.store(tail_ptr + at, mixing * tl.load(tail_ptr + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def combine(
    hidden_states,
    product_ptr,  # [L, C, C]
    shift_ptr,  # [L, C]
    mean_ptr,  # [L, T]
    scale_ptr,  # [L, T]
    tail_ptr,  # [L, T]
    partial_ptr,  # out [splits, T, C]
    num_tokens,
    tokens_per_image,
    stride_image,
    stride_token,
    L: tl.constexpr,
    LAYERS_PER_SPLIT: tl.constexpr,
    C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``sum_k mixing_k h_k`` over one split's layers: one product of depth layers * C."""
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
    # One loop over layers and depth: the pipeline of loads then runs on from layer to layer.
    for step in range(first * (C // BK), last * (C // BK)):
        layer = step // (C // BK)
        k = step % (C // BK) * BK
        z = tl.load(_select(hidden_states, layer) + offsets + k, mask=valid[:, None], other=0.0)
        at = layer * num_tokens + rows
        mean = tl.load(mean_ptr + at, mask=valid, other=0.0)
        scale = tl.load(scale_ptr + at, mask=valid, other=0.0)
        x = _round((z.to(tl.float32) - mean[:, None]) * scale[:, None], z.dtype, PRECISION)
        weight = tl.load(product + layer * C * C + k)
        total = _dot(x, weight, total, PRECISION)
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


@triton.jit
def finish(
    partial_ptr,  # [splits, T, C]
    last_state_ptr,
    out_ptr,  # out [T, C]
    num_tokens,
    tokens_per_image,
    stride_image,
    stride_token,
    beta,
    norm_eps,
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
        offsets = _token_offsets(rows, tokens_per_image, stride_image, stride_token)
        state = tl.load(last_state_ptr + offsets[:, None] + columns[None, :], mask=inside, other=0.0)
        base = _norm(state.to(tl.float32), inside, norm_eps, C)
        out = _norm(base + beta * (out - base), inside, norm_eps, C)
    tl.store(out_ptr + at, _round(out, out_ptr.dtype.element_ty, PRECISION), mask=inside)
