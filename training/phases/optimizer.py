"""Shared by every phase: the optimizer and its schedule, gradient clipping, the moving average."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.distributed.modules import is_sharded, like, local, whole, whole_state
from training.recipes.generator import GeneratorOptimizer
from training.recipes.recipe import OptimizerConfig


class Ema:
    """Exponential moving average of a module's trained parameters.

    The decay is warmed up as ``min(decay, (1 + t) / (10 + t))``, so that a short run does not
    average over its initial weights. Of a sharded parameter each rank averages its shard.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters after optimizer step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = [local(value) for value in self.shadow.values()]
        torch._foreach_lerp_(shadow, [local(p) for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module holds the averaged weights."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.shadow)
        try:
            yield
        finally:
            self._assign(trained)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(values[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, whole, in memory of rank 0; empty on other ranks. Collective."""
        with self.applied():
            state = whole_state(self.module, trained_only=True)
            return {name: state[name].clone() for name in self.shadow if name in state}

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Restore averages that `state_dict` gave, on any number of ranks."""
        for name, value in self.shadow.items():
            local(value).copy_(local(like(shadow[name], value)))


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; weight decay spares vectors (norms, biases, gains)."""
    return _adamw((p for p in module.parameters() if p.requires_grad), config)


def make_generator_optimizers(
    network: nn.Module, blocks: nn.Module, config: GeneratorOptimizer
) -> list[torch.optim.Optimizer]:
    """One AdamW, or Muon for the matrices of ``blocks`` and AdamW for the rest; one rate fits both.

    Muon's steps are scaled to the size of AdamW's, ``0.2 sqrt(max(rows, columns))`` (arXiv 2502.16982).
    """
    if config.matrices == "adamw":
        return [make_optimizer(network, config)]
    matrices = [p for p in blocks.parameters() if p.requires_grad and p.ndim == 2]
    chosen = set(matrices)
    rest = (p for p in network.parameters() if p.requires_grad and p not in chosen)
    muon = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, _adamw(rest, config)]


def _adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    trained = list(parameters)
    groups: list[dict[str, Any]] = []
    # Sharded parameters have groups of their own: the fused update takes them or whole ones at a time.
    for share in (
        [p for p in trained if not is_sharded(p)],
        [p for p in trained if is_sharded(p)],
    ):
        if share:
            matrices, vectors = [p for p in share if p.ndim > 1], [p for p in share if p.ndim <= 1]
            groups.append({"params": matrices, "weight_decay": config.weight_decay})
            groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, a plateau until ``decay_start_step``, then a decay to ``final_learning_rate``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    start = max(config.warmup_steps, config.decay_start_step)
    end = num_steps if config.decay_end_step is None else config.decay_end_step
    progress = min(1.0, max(0, step - start) / max(1, end - start))
    kept = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * kept


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(module: nn.Module, clip_norm: float | None) -> Tensor:
    """Gradient norm before clipping, over all shards, on the device; clips where a limit is given."""
    limit = math.inf if clip_norm is None else clip_norm
    trained = [p for p in module.parameters() if p.requires_grad]
    sharded = [p for p in trained if is_sharded(p)]
    if not sharded:
        return nn.utils.clip_grad_norm_(trained, limit)
    whole_ones = [p for p in trained if not is_sharded(p)]
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in share if p.grad is not None]))
        for share in (whole_ones, sharded)
        if share
    ]
    norm = torch.stack(norms).norm()
    for share in (whole_ones, sharded):
        nn.utils.clip_grads_with_norm_(share, limit, norm)
    return norm
