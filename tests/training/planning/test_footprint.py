"""The footprint against the real step: parameters, operations, and memory as the allocator saw it."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.config import PRESETS, TokenizerConfig
from tests.training.conftest import TINY, TINY_FUSION
from training.data.batches import Batch
from training.phases.reconstruction import TRAINED_PARTS, ReconstructionTask
from training.planning.footprint import Footprint, build_networks, measure_footprint
from training.recipes.recipe import PhaseRecipe, load_recipe

MICRO_BATCH = 8
CHANGES = [
    f"batch_size={MICRO_BATCH}",
    "accumulation_steps=1",
    "discriminator={start_step: 0, adversarial_start_step: 0}",
]


def footprint(phase: str, recipe: PhaseRecipe, config: TokenizerConfig, micro_batch: int) -> Footprint:
    networks = build_networks(config, recipe, TRAINED_PARTS[phase])
    return measure_footprint(networks, recipe, micro_batch)


def measured_peak(task: ReconstructionTask, images: int) -> int:
    """Bytes that the CPU's allocator gave out at once during a step, over those before it."""
    side = task.tokenizer.config.image_size
    batch = Batch(torch.randint(256, (images, 3, side, side), dtype=torch.uint8), torch.zeros(images), 0)
    task.train_step(0, [batch])  # the optimizer's moments, which the step itself does not count
    task.optimizer.zero_grad(set_to_none=True)
    task.discriminator.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task.train_step(1, [batch])
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_peak_is_what_the_allocator_saw(recipe_file: Path, tmp_path: Path, phase: str) -> None:
    config = TINY if phase == "phase1" else TINY.model_copy(update={"fusion": TINY_FUSION})
    recipe = load_recipe(PhaseRecipe, recipe_file, CHANGES)
    task = ReconstructionTask(phase, recipe, [])
    counted = footprint(phase, recipe, config, MICRO_BATCH)
    assert counted.adversarial is not None
    assert counted.adversarial.peak_bytes == pytest.approx(measured_peak(task, MICRO_BATCH), rel=0.02)


def test_parts_are_those_of_the_task(recipe_file: Path) -> None:
    recipe = load_recipe(PhaseRecipe, recipe_file, CHANGES)
    task = ReconstructionTask("phase2", recipe, [])
    parts = {part.name: part for part in footprint("phase2", recipe, task.tokenizer.config, 2).parts}
    for name in ("encoder", "fusion", "decoder"):
        module = getattr(task.tokenizer, name)
        assert parts[name].num_parameters == sum(p.numel() for p in module.parameters())
    assert parts["fusion"].num_trained == parts["fusion"].num_parameters
    assert parts["encoder"].num_trained == parts["decoder"].num_trained == 0
    averages = sum(value.nbytes for value in task.ema.shadow.values())
    assert parts["fusion"].ema_bytes == averages
    assert parts["fusion"].optimizer_bytes == 2 * averages
    heads = sum(p.numel() for p in task.discriminator.heads.parameters())
    assert parts["discriminator"].num_parameters == heads  # the backbone is the encoder


def test_operations_are_those_of_the_modules(recipe_file: Path) -> None:
    recipe = load_recipe(PhaseRecipe, recipe_file, [*CHANGES, "loss.adversarial=0", "loss.perceptual=0"])
    task = ReconstructionTask("phase1", recipe, [])
    counted = footprint("phase1", recipe, TINY, 2).plain.operations
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.tokenizer.tokens(torch.rand(2, 3, 32, 32))
    # torch's counter knows no attention on the CPU: two products of N x N x C in each block.
    num_tokens, width, depth = 16 + 2, TINY.encoder.width, TINY.encoder.depth
    attention = 2 * 2 * num_tokens**2 * width * depth
    assert counted["encoder"].total == counter.get_total_flops() // 2 + attention
    assert counted["backward"].total > counted["decoder"].total


def test_full_size_without_weights_or_memory() -> None:
    file = Path(__file__).parents[3] / "training" / "recipes" / "dinov2-b-phase2.yaml"
    recipe = load_recipe(PhaseRecipe, file, ["activation_checkpointing=true"])
    checkpointed = footprint("phase2", recipe, PRESETS["dinov2-b"], 8)
    parts = {part.name: part.num_parameters for part in checkpointed.parts}
    assert parts["fusion"] == 28_459_020
    assert parts["decoder"] == 415_056_640
    plain = checkpointed.plain
    assert plain.operations["encoder"].total / 1e9 == pytest.approx(47, abs=1)
    assert plain.operations["decoder"].total / 1e9 == pytest.approx(222, abs=1)
    assert plain.operations["decoder"].float32 == 0  # under autocast
    assert plain.operations["losses"].bfloat16 == 0  # outside of it
    # Without recomputation a decoder keeps 284 MiB an image.
    assert plain.activation_bytes["decoder"] / 8 < 50 * 2**20


def test_the_run_adds_up_its_spans(recipe_file: Path) -> None:
    changes = ["num_steps=10", "discriminator={start_step: 2, adversarial_start_step: 6}"]
    recipe = load_recipe(PhaseRecipe, recipe_file, [*CHANGES, *changes])
    cost = footprint("phase1", recipe, TINY, MICRO_BATCH)
    assert cost.adversarial is not None
    first, second, third = (cost.operations_per_image(step, recipe).total for step in (0, 2, 6))
    assert first < second < third
    assert cost.run_operations(recipe).total == MICRO_BATCH * (2 * first + 4 * second + 4 * third)
