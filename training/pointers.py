"""Decoder heads that start as pointers: each attends to one neighbour and adds what a readout takes there.

The decoder's positions are sines and cosines of the row and the column. A query that holds them for the
place one step further has its largest product with the key of that very place, so a head with fixed
weights attends to one offset, and at the border to the nearest token inside.

Shape legend: B batch, N tokens, C latent width, D decoder width, E head width, R room for neighbours,
P patch values (3 p^2).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from model.decoder import Decoder
from model.vit import Attention, Block
from training.readout import NEIGHBOURS, LinearMap, shifted

MAX_FREQUENCIES = 8  # per axis: the highest ones tell neighbours apart best
LOGIT_GAP = 9.0  # between the target and the places next to it, which then get exp(-9) of its weight
ADDED_SHARE = 0.05  # of the stream's variance that neighbours add: the norms stay nearly constant
POSITION_TOLERANCE = 1e-6  # singular values of the positions below this share of the largest count as 0
MAX_STATISTICS_BATCHES = 16


@torch.no_grad()
def point_at_neighbours(
    decoder: Decoder,
    content_DC: Tensor,
    free_DR: Tensor,
    gain: float,
    readout: LinearMap,
    batches: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Make heads of the first blocks add the readout's share of each neighbour to free directions.

    Args:
        decoder: its embedding writes ``gain`` times the latent to the content; its blocks add nothing yet.
        content_DC: orthonormal directions that hold the latent.
        free_DR: orthonormal directions that are still zero.
        gain: of the embedding.
        readout: of the 3x3 neighbourhood, ``training.readout.neighbourhood``'s order.
        batches: latent tokens [B, N, C] with their images, from which the shares' statistics are taken.
    """
    width = content_DC.shape[1]
    scale = _norm_scale(decoder, gain, width)
    heads = list(_heads(decoder))[: len(NEIGHBOURS)]
    shares_KCP = readout.weights[:-1].unflatten(0, (len(NEIGHBOURS) + 1, width))[1 : len(heads) + 1]
    maps_KCR, mean_R = _principal_shares(shares_KCP, decoder.grid, free_DR.shape[1], gain, batches)
    for (attention, rows), offset, map_CR in zip(heads, NEIGHBOURS, maps_KCR, strict=False):
        _point(attention, rows, decoder, offset, scale)
        left, values, right = torch.linalg.svd(map_CR, full_matrices=False)
        rank = min(rows.stop - rows.start, len(values))
        value = attention.qkv.weight.chunk(3)[2][rows]
        value[:rank] = (left[:, :rank].T @ content_DC.T * (scale / gain)).to(value)
        up_DE = free_DR @ (right[:rank].T * values[:rank])
        attention.out.weight[:, rows][:, :rank] = up_DE.to(value)
    first, _ = heads[0]
    first.out.bias.copy_(-free_DR @ mean_R)


def _heads(decoder: Decoder) -> Iterator[tuple[Attention, slice]]:
    """Every head, the first block's first, with its rows of each of query, key and value."""
    for block in decoder.blocks:
        assert isinstance(block, Block)
        head_width = block.attention.out.in_features // block.attention.num_heads
        for head in range(block.attention.num_heads):
            yield block.attention, slice(head * head_width, (head + 1) * head_width)


def _norm_scale(decoder: Decoder, gain: float, width: int) -> float:
    """Deviation of a stream of positions and content, by which the blocks' norms divide."""
    positions_ND = decoder.positions[0, 1:].double()
    variance = gain**2 * width / positions_ND.shape[1] + positions_ND.var(dim=1, correction=0).mean()
    return float(variance) ** 0.5


def _principal_shares(
    shares_KCP: Tensor, grid: int, room: int, gain: float, batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The readout's shares [K, C, R] along the main directions of their sum, and that sum's mean [R]."""
    sums = []
    for tokens, _ in batches[:MAX_STATISTICS_BATCHES]:
        parts = zip(NEIGHBOURS, shares_KCP.to(tokens), strict=False)
        sums.append(sum(shifted(tokens, grid, offset) @ share for offset, share in parts).flatten(0, 1))
    sums_TP = torch.cat(sums).double().cpu()
    mean_P = sums_TP.mean(dim=0)
    values, vectors = torch.linalg.eigh((sums_TP - mean_P).T @ (sums_TP - mean_P) / len(sums_TP))
    main_PR = vectors[:, -room:]
    wanted = ADDED_SHARE * gain**2 * shares_KCP.shape[1]
    main_PR = main_PR * (wanted / values[-room:].sum()).sqrt()
    return shares_KCP @ main_PR, mean_P @ main_PR


def _point(
    attention: Attention, rows: slice, decoder: Decoder, offset: tuple[int, int], scale: float
) -> None:
    """Query and key of one head: attend to the token at ``offset``."""
    head_width = rows.stop - rows.start
    queries_NE, keys_NE = _pointer(decoder, offset, head_width)
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    for weight, bias, wanted_NE in zip(weights[:2], biases[:2], (queries_NE, keys_NE), strict=True):
        read = _read_positions(decoder, wanted_NE)
        weight[rows] = (read.weights[:-1].T * scale).to(weight)
        bias[rows] = read.weights[-1].to(bias)
    weights[2][rows] = 0.0
    nn.init.zeros_(biases[2][rows])


def _pointer(decoder: Decoder, offset: tuple[int, int], head_width: int) -> tuple[Tensor, Tensor]:
    """Queries and keys [N, E] whose product peaks at ``offset``."""
    num_frequencies = min(MAX_FREQUENCIES, head_width // 4)
    exponents = torch.arange(num_frequencies, dtype=torch.float64) / (decoder.embed.out_features / 4)
    frequencies = 10000.0**-exponents
    places = torch.arange(decoder.grid, dtype=torch.float64)
    gap = (1 - frequencies.cos()).sum()
    amplitude = (LOGIT_GAP * head_width**0.5 / gap).sqrt()

    def waves(rows: Tensor, columns: Tensor) -> Tensor:
        angles = [torch.outer(steps, frequencies) for steps in (rows, columns)]
        row, column = (amplitude * torch.cat([a.sin(), a.cos()], dim=1) for a in angles)
        grid = (decoder.grid, decoder.grid, -1)
        both = torch.cat([row[:, None].expand(grid), column[None].expand(grid)], dim=2).flatten(0, 1)
        return torch.nn.functional.pad(both, (0, head_width - both.shape[1]))

    return waves(places + offset[0], places + offset[1]), waves(places, places)


def _read_positions(decoder: Decoder, wanted_NE: Tensor) -> LinearMap:
    """The smallest linear map that gives ``wanted_NE`` of the tokens' positions, less their means.

    It stays within the directions that the content avoids, so that it reads nothing of the content.
    """
    positions_ND = decoder.positions[0, 1:].double().cpu()
    centred = positions_ND - positions_ND.mean(dim=1, keepdim=True)
    ones = torch.ones(len(centred), 1, dtype=torch.float64)
    inputs = torch.cat([centred, ones], dim=1)
    solution = torch.linalg.lstsq(inputs, wanted_NE, rcond=POSITION_TOLERANCE, driver="gelsd").solution
    return LinearMap(solution)
