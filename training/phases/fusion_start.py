"""A fusion that starts fitted to a frozen linear readout, as the decoder starts as a ridge regression.

It is phase 2 in its purest form: the best linear decoder of base latents stays as it is, and only the fusion
learns, on hidden states that are computed once. A step costs a hundredth of one through the real decoder,
so the fusion first learns what the layers hold in minutes; phase 2 itself then fits it to the decoder.

Shape legend: B batch, L layers, N tokens, C width, T = tokens of all images, P patch values (3 p^2).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.reference import token_norm
from model.images.tensors import to_unit
from model.networks.fusion import Fusion
from model.tokenizer import Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import Sample, spread_samples
from training.distributed.device import autocast
from training.errors import DataError
from training.evaluation.readout import PENALTY, Ridge
from training.phases.optimizer import learning_rate_at, set_learning_rate
from training.recipes.recipe import FusionStartConfig, OptimizerConfig

logger = logging.getLogger(__name__)

BATCH_SIZE = 16
WARMUP_STEPS = 20
FINAL_RATE = 0.05  # of the learning rate, at the end


@dataclass(frozen=True)
class TokenSet:
    """Hidden states of tokens drawn from many images, and the patches they stand for.

    Attributes:
        states: [T, L, C] float16.
        patches: [T, P] float16, as the decoder's last layer gives them.
    """

    states: Tensor
    patches: Tensor


@torch.no_grad()
def collect_tokens(
    tokenizer: Tokenizer, samples: Sequence[Sample], num_images: int | None, precision: str
) -> TokenSet:
    """Every token of ``num_images`` images, spread over the listing; of all without a number.

    Raises:
        DataError: no image could be decoded.
    """
    num_layers = len(tokenizer.config.fused_layers)
    states, patches = [], []
    chosen = spread_samples(samples, num_images)
    for _, batch in evaluation_batches(chosen, tokenizer.config.image_size, BATCH_SIZE):
        images = to_unit(batch.images.to(tokenizer.device))
        with autocast(tokenizer.device, precision):
            layers = tokenizer.encoder(tokenizer.preprocess(images))[-num_layers:]
        states.append(torch.stack(layers, dim=2).flatten(0, 1).half())
        patches.append(tokenizer.decoder.patchify(images).flatten(0, 1).half())
    if not states:
        raise DataError("fusion initialisation: no image could be decoded")
    return TokenSet(torch.cat(states), torch.cat(patches))


def fuse_tokens(fusion: Fusion, states_TLC: Tensor) -> Tensor:
    """Enriched latents [T, C] of tokens' hidden states [T, L, C]."""
    return fusion([layer[None] for layer in states_TLC.float().unbind(dim=1)])[0]


def base_decoder(tokens: TokenSet, eps: float) -> nn.Linear:
    """The best linear decoder of base latents, one token to its patch, frozen."""
    ridge = Ridge(tokens.states.shape[-1], tokens.patches.shape[-1])
    for states, patches in zip(tokens.states.split(4096), tokens.patches.split(4096), strict=True):
        ridge.add(token_norm(states[:, -1].float(), eps), patches)
    weights = ridge.solve(PENALTY * ridge.num_rows).weights.to(tokens.states.device, torch.float32)
    decoder = nn.Linear(weights.shape[0] - 1, weights.shape[1], device=weights.device)
    with torch.no_grad():
        decoder.weight.copy_(weights[:-1].T)
        decoder.bias.copy_(weights[-1])
    return decoder.requires_grad_(False)


def fit_fusion(
    fusion: Fusion,
    tokens: TokenSet,
    decoder: nn.Linear,
    config: FusionStartConfig,
    generator: torch.Generator,
    precision: str = "auto",
) -> list[float]:
    """Train the fusion: its latents through the linear decoder should give the patches.

    The decoder is trained along where it is not frozen.

    Returns:
        The mean squared error of each step, pixels of unit variance.
    """
    trained = [*fusion.parameters(), *(p for p in decoder.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    rates = OptimizerConfig(
        learning_rate=config.learning_rate,
        final_learning_rate=FINAL_RATE * config.learning_rate,
        warmup_steps=WARMUP_STEPS,
    )
    errors = []
    for step in range(config.num_steps):
        set_learning_rate(optimizer, learning_rate_at(step, config.num_steps, rates))
        rows = torch.randint(len(tokens.states), (config.batch_tokens,), generator=generator)
        with autocast(tokens.states.device, precision):
            found = decoder(fuse_tokens(fusion, tokens.states[rows]))
        loss = F.mse_loss(found.float(), tokens.patches[rows].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
        if (step + 1) % 100 == 0:
            logger.info("fusion start: step %d, squared error %.4f", step + 1, sum(errors[-50:]) / 50)
    return errors


def initialize_fusion(
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    config: FusionStartConfig,
    generator: torch.Generator,
    precision: str = "auto",
) -> None:
    """Fit the tokenizer's fusion to the linear readout of its base latents.

    Raises:
        DataError: no image could be decoded.
    """
    assert tokenizer.fusion is not None
    tokens = collect_tokens(tokenizer, samples, config.num_images, precision)
    decoder = base_decoder(tokens, tokenizer.config.encoder.layer_norm_eps)
    fit_fusion(tokenizer.fusion, tokens, decoder, config, generator, precision)
