"""The footprint against the real step: parameters, operations, and memory as the allocator saw it."""

import gc
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.config import PRESETS, TokenizerConfig
from tests.training.conftest import TINY
from training.data.batches import Batch
from training.phases.reconstruction import TRAINED_PARTS, ReconstructionTask
from training.planning.footprint import Footprint, measure_footprint
from training.recipes.recipe import PhaseRecipe, in_steps, load_recipe

MICRO_BATCH = 8
CHANGES = [
    f"batch_size={MICRO_BATCH}",
    "accumulation_steps=1",
    "discriminator={start_step: 0, adversarial_start_step: 0}",
]


def footprint(phase: str, recipe: PhaseRecipe, config: TokenizerConfig) -> Footprint:
    return measure_footprint(config, recipe, TRAINED_PARTS[phase])


def measured_peak(task: ReconstructionTask, images: int) -> int:
    """Bytes that the CPU's allocator gave out at once during a step, over those before it."""
    side = task.tokenizer.config.image_size
    batch = Batch(torch.randint(256, (images, 3, side, side), dtype=torch.uint8), torch.zeros(images), 0)
    task.train_step(0, [batch])  # the optimizer's moments, which the step itself does not count
    task.optimizer.zero_grad(set_to_none=True)
    task.discriminator.zero_grad(set_to_none=True)
    gc.collect()  # what earlier tests left would otherwise be freed meanwhile, and count as this step's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task.train_step(1, [batch])
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("phase", ["phase1", "phase2", "joint"])
def test_peak_is_what_the_allocator_saw(recipe_file: Path, phase: str, recompute: bool) -> None:
    recipe = load_recipe(PhaseRecipe, recipe_file, [*CHANGES, f"activation_checkpointing={recompute}"])
    task = ReconstructionTask(phase, recipe, [])
    counted = footprint(phase, recipe, task.tokenizer.config)
    measured = measured_peak(task, MICRO_BATCH)
    assert counted.peak_bytes - held(counted) == pytest.approx(measured, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_peak_is_what_the_gpus_allocator_saw(recipe_file: Path, phase: str) -> None:
    recipe = load_recipe(PhaseRecipe, recipe_file, [*CHANGES, "device=cuda", "batch_size=512"])
    task = ReconstructionTask(phase, recipe, [])
    images = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)
    task.train_step(0, [Batch(images, torch.zeros(512), 0)])
    torch.cuda.reset_peak_memory_stats()
    task.train_step(1, [Batch(images, torch.zeros(512), 0)])
    counted = footprint(phase, recipe, task.tokenizer.config)
    assert counted.peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def held(found: Footprint) -> int:
    """Weights, moments and averages, which are there before the step."""
    return sum(part.weight_bytes + part.optimizer_bytes + part.ema_bytes for part in found.parts)


def test_parts_are_those_of_the_task(recipe_file: Path) -> None:
    recipe = load_recipe(PhaseRecipe, recipe_file, CHANGES)
    task = ReconstructionTask("phase2", recipe, [])
    parts = {part.name: part for part in footprint("phase2", recipe, task.tokenizer.config).parts}
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
    counted = footprint("phase1", recipe, TINY).generator[0].total()
    images = torch.rand(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        task.tokenizer.decoder(task.tokenizer.tokens(images)).sum().backward()
    # torch's counter knows no attention on the CPU: two products of N x N x C per block, five backward.
    encoder, decoder = TINY.encoder, TINY.decoder
    attention = 4 * (16 + 2) ** 2 * encoder.width * encoder.depth
    attention += 14 * (16 + 1) ** 2 * decoder.width * decoder.depth
    assert counted == counter.get_total_flops() // 2 + attention


def test_full_size_without_weights_or_memory() -> None:
    file = Path(__file__).parents[3] / "training" / "recipes" / "dinov2-b-phase2.yaml"
    changes = ["accumulation_steps=64", "precision=bfloat16"]
    recipe = in_steps(load_recipe(PhaseRecipe, file, changes), 0)
    plain = footprint("phase2", recipe, PRESETS["dinov2-b"])
    parts = {part.name: part.num_parameters for part in plain.parts}
    assert parts["fusion"] == 28_459_020
    assert parts["decoder"] == 415_056_640
    # Encoder 47, decoder 222 and again backward, and the fusion; losses in float32.
    assert plain.generator[0][torch.bfloat16] / 1e9 == pytest.approx(540, abs=2)
    recompute = recipe.model_copy(update={"activation_checkpointing": True})
    recomputed = footprint("phase2", recompute, PRESETS["dinov2-b"])
    assert recomputed.kept_bytes < 0.65 * plain.kept_bytes  # the losses' networks are not recomputed
    assert recomputed.generator[1].total() > plain.generator[1].total()


def test_the_run_adds_up_its_spans(recipe_file: Path) -> None:
    changes = ["num_steps=10", "discriminator={start_step: 2, adversarial_start_step: 6}"]
    recipe = load_recipe(PhaseRecipe, recipe_file, [*CHANGES, *changes])
    cost = footprint("phase1", recipe, TINY)
    first, second, third = (cost.operations_per_image(step, recipe).total() for step in (0, 2, 6))
    assert first < second < third
    assert cost.run_operations(recipe).total() == MICRO_BATCH * (2 * first + 4 * second + 4 * third)
