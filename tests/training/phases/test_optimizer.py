import pytest
import torch
from torch import nn

from training.phases.optimizer import Ema, learning_rate_at, make_optimizer
from training.recipes.recipe import OptimizerConfig


def test_schedule_warms_up_then_follows_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate_at(step, 110, config) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)


def test_ema_follows_its_definition_and_restores_the_trained_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, decay=0.5)
    expected = 0.0
    for step in range(20):
        with torch.no_grad():
            module.weight.fill_(step + 1.0)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    with ema.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == 20.0


def test_frozen_parameters_are_not_optimized_or_averaged() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    optimizer = make_optimizer(module, OptimizerConfig(weight_decay=0.1))
    matrices, vectors = optimizer.param_groups
    assert matrices["params"] == [module[1].weight]
    assert vectors["params"] == [module[1].bias]
    assert vectors["weight_decay"] == 0.0
    assert set(Ema(module, 0.9).shadow) == {"1.weight", "1.bias"}
