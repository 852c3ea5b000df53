"""What every phase's optimizer shares: schedule, moving average, precision, device."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from training.recipe import OptimizerConfig


class Ema:
    """Exponential moving average of a module's trained parameters.

    The decay is warmed up as ``min(decay, (1 + t) / (10 + t))``, so that a short run does not
    average over its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters after optimizer step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.shadow[name].lerp_(parameter.detach(), 1 - decay)

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
            parameter.copy_(values[name])

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Restore averages written by a checkpoint."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; weight decay spares vectors (norms, biases, gains)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then cosine from ``learning_rate`` to ``final_learning_rate``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(module: nn.Module, clip_norm: float | None) -> float:
    """Gradient norm before clipping; clips where a limit is given."""
    limit = math.inf if clip_norm is None else clip_norm
    trained = [p for p in module.parameters() if p.requires_grad]
    return float(torch.nn.utils.clip_grad_norm_(trained, limit))


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision: bfloat16 products on CUDA, or on request; float32 otherwise."""
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Randomness of one step, a function of (seed, step) alone, so that resuming needs no saved state."""
    return torch.Generator(device).manual_seed((seed + 1) * 1_000_003 + step)
