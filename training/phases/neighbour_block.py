"""A block that looks at a token's neighbours, appended to a trained decoder and fitted in closed form.

A decoder that was trained briefly predicts each patch nearly alone, and the patches show at their borders: a
mosaic. The remedy is linear in what the decoder already knows, so it needs no gradient descent through the
decoder. Each head of one more block attends to one neighbour (left, right, above, below); what the heads
bring in is a ridge regression on what the last layer still gets wrong, and the last layer is refitted to it,
in turn. The block's MLP starts at zero; training goes on from there with nothing frozen.

Shape legend: B batch, N tokens of the grid, T = 1 + N with the class token, D decoder width, H heads that
attend, K width of a head, P patch values (3 p^2), M images.
"""

import logging
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.networks.decoder import Decoder
from model.networks.vit import Block
from model.tokenizer import Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import Sample, spread_samples
from training.distributed.device import autocast
from training.errors import DataError
from training.evaluation.readout import NEIGHBOURS, LinearMap, Ridge, shifted
from training.output.progress import log_progress
from training.recipes.recipe import NeighbourBlockConfig

logger = logging.getLogger(__name__)

BATCH_SIZE = 16
ATTENTION_BATCH_SIZE = 4
SHARPNESS = 32.0  # logit of the neighbour where queries and keys are exact codes of their positions
PENALTY = 1e-3  # per row, in units of a normalised feature's variance
CUTOFF = 1e-3  # of the last layer's singular values, relative to the squared largest one


def initialize_neighbour_block(
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    config: NeighbourBlockConfig,
    generator: torch.Generator,
    precision: str,
) -> None:
    """Fit the decoder's last block, which is new, and its last layer.

    Args:
        tokenizer: with a decoder whose other blocks are trained; its enriched latents are used.
        samples: training images; ``config.num_images`` of them are used, spread evenly.
        generator: of the order in which attention is fitted, on the CPU.
        precision: of the networks: auto, float32 or bfloat16.

    Raises:
        DataError: no image could be decoded.
    """
    decoder = tokenizer.decoder
    block = decoder.blocks[-1]
    assert isinstance(block, Block)
    for layer in (block.attention.out, block.mlp.down):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    hidden, patches = _collect(tokenizer, samples, config.num_images, precision)
    fit = _NeighbourFit(decoder, block, hidden, patches)
    loss = fit.attend(config.attention_steps, config.learning_rate, generator)
    logger.info("neighbour block: heads attend with a cross-entropy of %.2f", loss)
    with torch.no_grad():
        fit.refit_last_layer()
        for number in range(1, config.rounds + 1):
            fit.refit_heads()
            error = fit.refit_last_layer()
            logger.info("neighbour block: round %d of %d, squared error %.4f", number, config.rounds, error)


@torch.no_grad()
def _collect(
    tokenizer: Tokenizer, samples: Sequence[Sample], num_images: int, precision: str
) -> tuple[Tensor, Tensor]:
    """Input of the last block [M, T, D] and patches [M, N, P], both float16 on the CPU."""
    decoder, device = tokenizer.decoder, tokenizer.device
    chosen = spread_samples(samples, num_images)
    hidden, patches = [], []
    batches = evaluation_batches(chosen, tokenizer.config.image_size, BATCH_SIZE)
    for _, batch in log_progress(batches, -(-len(chosen) // BATCH_SIZE), "the neighbour block's images"):
        images = batch.pixels(device)
        with autocast(device, precision):
            tokens = decoder.hidden(tokenizer.tokens(images), len(decoder.blocks) - 1)
        hidden.append(tokens.half().cpu())
        patches.append(decoder.patchify(images).half().cpu())
    if not hidden:
        raise DataError("neighbour block: no image could be decoded")
    return torch.cat(hidden), torch.cat(patches)


class _NeighbourFit:
    """The regressions, on hidden tokens that are computed once."""

    def __init__(self, decoder: Decoder, block: Block, hidden_MTD: Tensor, patches_MNP: Tensor) -> None:
        self.decoder, self.block = decoder, block
        self.hidden, self.patches = hidden_MTD, patches_MNP
        self.head_width = block.attention.out.in_features // block.attention.num_heads
        self.offsets = NEIGHBOURS[: min(4, block.attention.num_heads)]

    def attend(self, num_steps: int, learning_rate: float, generator: torch.Generator) -> float:
        """Fit queries and keys until each head attends to its neighbour; mean cross-entropy at the end.

        They start as codes of the position, row and column, read from the tokens by regression.
        """
        self._start_attention()
        qkv = self.block.attention.qkv.requires_grad_(True)
        optimizer = torch.optim.Adam([qkv.weight, qkv.bias], lr=learning_rate)
        wanted = self._neighbours().to(qkv.weight.device)
        loss = torch.zeros(())
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
            chosen = torch.randint(len(self.hidden), (ATTENTION_BATCH_SIZE,), generator=generator)
            logits = self._logits(self._normed(self.hidden[chosen]))
            loss = F.cross_entropy(logits.flatten(0, 2), wanted.expand(len(chosen), -1, -1).flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def refit_heads(self) -> None:
        """Add to what the heads bring in the best linear correction of the remaining error.

        The last layer sees ``LN(h)``, so a change d of h moves the patch by ``P diag(gain) d / sigma(h)``:
        the wanted change is sigma times the error under that map's pseudo-inverse.
        """
        heads, width = len(self.offsets), self.decoder.norm.normalized_shape[0]
        to_pixels = (self.decoder.predict.weight * self.decoder.norm.weight).double()  # [P, D]
        to_hidden = _pseudo_inverse(to_pixels).float()
        ridge = Ridge(heads * width, width, torch.float32)
        for hidden, patches in self._batches():
            tokens = self.block(hidden)[:, 1:]
            error = patches - self.decoder.predict(self.decoder.norm(tokens))
            change = tokens.std(dim=-1, keepdim=True) * (error @ to_hidden.T)
            ridge.add(self._seen(hidden), change)
        found = ridge.solve(PENALTY * ridge.num_rows)
        self._set_heads(found, ridge, to_pixels.cpu())

    def refit_last_layer(self) -> float:
        """Ridge regression of the last layer; mean square error before it, per normalised value."""
        norm, predict = self.decoder.norm, self.decoder.predict
        ridge = Ridge(predict.in_features, predict.out_features, torch.float32)
        error = 0.0
        for hidden, patches in self._batches():
            features = norm(self.block(hidden)[:, 1:])
            error += (predict(features) - patches).square().mean().item() * len(hidden)
            ridge.add(features, patches)
        ridge.solve(PENALTY * ridge.num_rows).copy_to(predict)
        return error / len(self.hidden)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.decoder.predict.weight.device
        for hidden, patches in zip(
            self.hidden.split(BATCH_SIZE), self.patches.split(BATCH_SIZE), strict=True
        ):
            yield hidden.to(device).float(), patches.to(device).float()

    def _normed(self, hidden: Tensor) -> Tensor:
        norm = self.block.norm_attention
        return norm(hidden.to(norm.weight.device).float())

    def _logits(self, normed_BTD: Tensor) -> Tensor:
        """Of the attending heads, for the tokens of the grid: [B, H, N, T]."""
        attention = self.block.attention
        qkv = attention.qkv(normed_BTD).unflatten(-1, (3, attention.num_heads, -1))
        query, key, _ = qkv[:, :, :, : len(self.offsets)].permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        return query[:, :, 1:] @ key.transpose(-1, -2) / math.sqrt(self.head_width)

    def _seen(self, hidden_BTD: Tensor) -> Tensor:
        """Means of the normalised tokens under each head's attention, [B, N, H D]."""
        normed = self._normed(hidden_BTD)
        return (self._logits(normed).softmax(dim=-1) @ normed[:, None]).transpose(1, 2).flatten(2)

    def _neighbours(self) -> Tensor:
        """Which token each head should attend to, [H, N] in 1..N; beyond the border, the nearest one."""
        return 1 + torch.stack([self._moved(offset) for offset in self.offsets])

    def _moved(self, offset: tuple[int, int]) -> Tensor:
        """Number [N] of every token's neighbour at ``offset``, row by row from 0."""
        grid = self.decoder.grid
        return shifted(torch.arange(grid**2)[None, :, None], grid, offset).flatten()

    @torch.no_grad()
    def _start_attention(self) -> None:
        qkv, width, grid = self.block.attention.qkv, self.decoder.norm.normalized_shape[0], self.decoder.grid
        codes = [
            torch.cat([F.one_hot(place, grid) for place in (moved // grid, moved % grid)], dim=-1).float()
            for moved in map(self._moved, ((0, 0), *self.offsets))
        ]  # each [N, 2 grid]
        ridge = Ridge(width, len(codes) * 2 * grid, torch.float32)
        for hidden, _ in self._batches():
            ridge.add(self._normed(hidden)[:, 1:], torch.cat(codes, dim=-1).expand(len(hidden), -1, -1))
        key, *queries = ridge.solve(PENALTY * ridge.num_rows).weights.float().chunk(len(codes), dim=-1)
        gain = math.sqrt(SHARPNESS * math.sqrt(self.head_width))
        for head, query in enumerate(queries):
            for first, weights in ((0, query), (width, key)):
                rows = slice(first + head * self.head_width, first + (head + 1) * self.head_width)
                for parameter, values in ((qkv.weight, weights[:-1].T), (qkv.bias, weights[-1])):
                    parameter[rows] = 0.0
                    parameter[rows.start : rows.start + 2 * grid] = (gain * values).to(parameter)
        qkv.bias[2 * width :] = 0.0  # of the values: the output has a bias

    def _set_heads(self, found: LinearMap, ridge: Ridge, to_pixels: Tensor) -> None:
        """Write [H D -> D] weights as values and output of the heads, each cut to its head's rank."""
        attention, width = self.block.attention, len(to_pixels.T)
        out, value = attention.out, attention.qkv
        metric = to_pixels.T @ to_pixels
        left = torch.linalg.cholesky(metric + CUTOFF**2 * metric.diagonal().mean() * torch.eye(width)).T
        for head in range(len(self.offsets)):
            columns = slice(head * self.head_width, (head + 1) * self.head_width)
            rows = slice(2 * width + columns.start, 2 * width + columns.stop)
            part = slice(head * width, (head + 1) * width)
            now = (out.weight[:, columns].double() @ value.weight[rows].double()).cpu()
            covariance = ridge.gram[part, part] / ridge.num_rows + PENALTY * torch.eye(width)
            right = torch.linalg.cholesky(covariance.double())
            wanted = now + found.weights[part].T
            factors = _low_rank(left, wanted, right, self.head_width)
            out.weight[:, columns], value.weight[rows] = (factor.to(out.weight) for factor in factors)
        out.bias.add_(found.weights[-1].to(out.bias))


def _low_rank(left: Tensor, matrix: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [D, K] and [K, D] whose product is nearest to ``matrix`` in the norm |left (.) right|."""
    u, s, v = torch.linalg.svd(left @ matrix @ right)
    root = s[:rank].sqrt()
    return torch.linalg.solve(left, u[:, :rank] * root), torch.linalg.solve(right.T, v[:rank].T * root).T


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    """Of [P, D]: [D, P], small singular values damped."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return v.T @ ((s / (s.square() + CUTOFF * s[0] ** 2))[:, None] * u.T)
