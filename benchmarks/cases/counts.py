"""Operations and bytes, counted from sizes: those that a task needs, and those of each implementation.

An operation is a multiplication or an addition inside a matrix product, two for each multiply-add.
Everything else (norms, weighting, bias) is left out: it is memory traffic. Bytes are those of device
memory, caches aside: a tensor read by two steps counts twice, a weight matrix counts once a call.

Shape legend: B batch, N tokens per image, T = B * N, L layers, C width, H expert hidden width,
R = min(H, C), S = T * C elements (one layer's tokens).
"""

from dataclasses import dataclass

from kernels.folded import rows_of_block

FLOAT_BYTES = 4


@dataclass(frozen=True)
class FusionSize:
    """One size of the fusion operator."""

    batch: int
    tokens: int
    num_layers: int
    width: int
    hidden_width: int
    element_bytes: int
    """Of hidden states, matrices and output."""

    @property
    def num_tokens(self) -> int:
        return self.batch * self.tokens

    @property
    def rows(self) -> int:
        """R, rows of a folded expert's hidden factor."""
        return min(self.hidden_width, self.width)

    @property
    def logit_columns(self) -> int:
        """P, the router's outputs padded to a power of two as the Triton kernels take them."""
        return max(16, 1 << (self.num_layers - 1).bit_length())

    @property
    def router_columns(self) -> int:
        """Columns of the product that gives them: P for each term, of which half precision has two."""
        has_two = self.element_bytes < FLOAT_BYTES and self.num_layers <= 32
        return (1 + has_two) * self.logit_columns

    @property
    def layer_elements(self) -> int:
        """S, elements of one layer's tokens."""
        return self.num_tokens * self.width

    @property
    def copied_elements(self) -> int:
        """Elements moved by the copy that LayerNorm makes of a layer's strided view; one image is none."""
        return 2 * self.layer_elements if self.batch > 1 else 0


def definition_operations(size: FusionSize) -> int:
    """As published: ``4 C H`` per token and layer, and the router."""
    return _per_token_layer(size, 4 * size.width * size.hidden_width + router_operations(size))


def folded_operations(size: FusionSize) -> int:
    """Folded: ``2 C^2 + 2 R C - R^2`` per token and layer, which is ``3 C^2`` for H >= C, and the router."""
    experts = 2 * size.width**2 + 2 * size.rows * size.width - size.rows**2
    return _per_token_layer(size, experts + router_operations(size))


def needed_operations(size: FusionSize) -> int:
    """The fewer of `definition_operations` and `folded_operations`: no implementation gains by doing more."""
    return min(definition_operations(size), folded_operations(size))


def folded_executed_operations(size: FusionSize) -> int:
    """Operations of `kernels.folded`: its blocks of the triangle reach over the diagonal."""
    block = rows_of_block(size.rows)
    triangle = sum(
        min(block, size.rows - start) * (size.width - start) for start in range(0, size.rows, block)
    )
    return _per_token_layer(size, 2 * (size.width**2 + triangle) + router_operations(size))


def fused_executed_operations(size: FusionSize) -> int:
    """Operations of `kernels.fused`: ``2 (R C + C^2)`` per token and layer, and the router's padded columns.

    Zero rows that pad R to a whole tile (none for H >= C) are not counted.
    """
    experts = 2 * (size.rows * size.width + size.width**2)
    return _per_token_layer(size, experts + 2 * size.router_columns * size.width)


def router_operations(size: FusionSize) -> int:
    """``2 L C`` per token and layer: L outputs of a layer's C inputs."""
    return 2 * size.num_layers * size.width


def minimum_bytes(size: FusionSize) -> int:
    """``(L + 1) S`` elements, hidden states in and output out, and the smaller form's matrices."""
    unfolded = 2 * size.width * size.hidden_width
    folded = size.width**2 + size.rows * size.width - size.rows**2 // 2
    elements = (size.num_layers + 1) * size.layer_elements + _matrices(size, min(unfolded, folded))
    return elements * size.element_bytes


def definition_bytes(size: FusionSize) -> int:
    """Bytes that `kernels.reference` moves: ``L (14 S + 4 T H) + 10 S`` elements and the matrices.

    A layer: norm 2 S; concatenation 2 S and its read by the router S; up S + T H, norm 2 T H, down
    T H + S, norm 2 S; weighting 2 S and sum 3 S. Once: start of the sum S, division 2 S, norm 2 S,
    interpolation 3 S, norm 2 S. For more than one image, also the copy that a norm makes of a strided view.
    """
    per_layer = 14 * size.layer_elements + 4 * size.num_tokens * size.hidden_width + size.copied_elements
    matrices = _matrices(size, 2 * size.width * size.hidden_width)
    elements = size.num_layers * per_layer + 10 * size.layer_elements + matrices
    return elements * size.element_bytes


def folded_bytes(size: FusionSize) -> int:
    """Bytes that `kernels.folded` moves: float32 ``L (12 S + D + 2 T R) + 14 S`` elements and the matrices.

    A layer: norm 2 S, router S, triangle D (2.5 S in four blocks, which skip columns) and T R, its norm T R,
    product 2 S, shift 3 S, norm S, sum 3 S. Once: start of the sum S, division 2 S, norm 2 S, base 2 S,
    interpolation 3 S, norm 2 S, output 2 S. A narrower dtype keeps the first norm, the triangle and what the
    products read and write, and widens each layer's tokens for the router 2 S and the product 2 S. For more
    than one image, also the copy that a norm makes of a strided view.
    """
    layer, hidden = size.layer_elements, size.num_tokens * size.rows
    starts = range(0, size.rows, rows_of_block(size.rows))
    triangle = sum(size.num_tokens * (size.width - start) for start in starts)
    matrices = _matrices(size, size.width**2 + size.rows * size.width)
    per_layer = 4 * layer + triangle + 2 * hidden + size.copied_elements
    narrow = size.num_layers * per_layer + layer + matrices
    wide = (8 * size.num_layers + 13) * layer
    if size.element_bytes < FLOAT_BYTES:
        narrow += size.num_layers * 2 * layer + layer
        wide += size.num_layers * 2 * layer
    return narrow * size.element_bytes + wide * FLOAT_BYTES


def fused_bytes(size: FusionSize) -> int:
    """Bytes that `kernels.fused` moves: ``(2 L + 2) S`` elements, the matrices, and float32 scratch.

    Hidden states are read by measure and by combine, the last one again by finish. Scratch: logits twice
    T L P; statistics, norms and factors 14 T L; the router's weights T L; the sums 2 S. Not counted: sums
    that are split over programs, for few tokens, and tiles that miss the L2 cache.
    """
    token_layers = size.num_tokens * size.num_layers
    scratch = token_layers * (2 * size.logit_columns + 15) + 2 * size.layer_elements
    per_layer = size.width**2 + size.rows * size.width + size.router_columns * size.width
    elements = (2 * size.num_layers + 2) * size.layer_elements + size.num_layers * per_layer
    return elements * size.element_bytes + scratch * FLOAT_BYTES


def transformer_operations(num_tokens: int, width: int, mlp_width: int, depth: int) -> int:
    """Blocks of one image: ``8 C^2 + 4 C M + 4 N C`` per token and block (projections, MLP, attention)."""
    return num_tokens * depth * (8 * width**2 + 4 * width * mlp_width + 4 * num_tokens * width)


def linear_operations(num_tokens: int, inputs: int, outputs: int) -> int:
    """A linear map on every token, ``2 N inputs outputs``."""
    return 2 * num_tokens * inputs * outputs


def _per_token_layer(size: FusionSize, operations: int) -> int:
    return size.num_tokens * size.num_layers * operations


def _matrices(size: FusionSize, per_layer: int) -> int:
    """Elements of all experts' matrices and of the router's."""
    return size.num_layers * per_layer + size.num_layers**2 * size.width
