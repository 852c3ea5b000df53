"""Benchmark of training steps: ``python -m benchmarks.training --help``."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases.training_weights import write_weights
from benchmarks.harness.runner import Setup, unless_out_of_memory
from benchmarks.harness.script import positive, read_ceilings, run_script, script_parser
from benchmarks.harness.timing import FLUSH_BYTES, Ceilings, Timing, measure_ceilings, time_interleaved
from model.config import PRESETS, TokenizerConfig
from training.data.batches import Batch
from training.phases.reconstruction import TRAINED_PARTS, ReconstructionTask
from training.planning.footprint import Footprint, measure_footprint
from training.recipes.recipe import PhaseRecipe

DESCRIPTION = """\
Time optimizer steps of phases 1, 2 and 3, on random weights, with images already in memory:

  phase1   the decoder, on the frozen encoder's last layer
  phase2   the fusion, between frozen encoder and decoder
  phase3   the decoder, on the enriched latents

Each once before the adversarial loss sets in (plain) and once after (adversarial). The step is that of
`drorae train`: every loss, AdamW, the moving average; decoding of files is left out. Operations and memory
are counted by training.planning.footprint, so each row also tells how good its estimate of the memory is."""
EPILOG = """\
examples:
  python -m benchmarks.training                                full size, results on the screen only
  python -m benchmarks.training --output benchmarks/results/training.csv
  python -m benchmarks.training --device cpu --preset mini --batch 2 --repeats 3 --networks light"""

PHASES = ("phase1", "phase2", "phase3")
DEFAULT_BATCHES = {"cuda": (32,), "cpu": (4,)}
DEFAULT_REPEATS = {"cuda": 20, "cpu": 3}
# Losses as in the full-size recipes, or those that need no published weights.
NETWORKS = {"full": ("lpips-vgg", "dino-vits8"), "light": ("efficientnet-lite0", "encoder")}


@dataclass(frozen=True)
class TrainingRow:
    """One line of the results. benchmarks/README.md has the legend."""

    device: str
    dtype: str
    torch: str
    triton: str
    commit: str
    preset: str
    phase: str
    losses: str
    perceptual: str
    discriminator: str
    compiled: bool
    checkpointing: bool
    float32_matmul: str
    batch: int
    accumulation: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    num_runs: int
    sm_mhz: float | None
    power_w: float | None
    images_per_s: float
    gflop_bfloat16: float
    gflop_float32: float
    tflops: float
    matrix_tflops: float
    float32_tflops: float
    matrix_share: float
    roof_share: float
    memory_gib: float | None
    memory_estimate_gib: float


TABLE: Mapping[str, Callable[[TrainingRow], object]] = {
    "phase": lambda row: row.phase,
    "losses": lambda row: row.losses,
    "batch": lambda row: row.batch,
    "p50 ms": lambda row: row.p50_ms,
    "images/s": lambda row: row.images_per_s,
    "GFLOP/image": lambda row: row.gflop_bfloat16 + row.gflop_float32,
    "TFLOP/s": lambda row: row.tflops,
    "of matrix rate": lambda row: f"{row.matrix_share:.1%}",
    "of both rates": lambda row: f"{row.roof_share:.1%}",
    "GiB": lambda row: row.memory_gib,
    "estimated": lambda row: row.memory_estimate_gib,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 nothing could be measured."""
    return run_script(build_parser(), argv, TrainingRow, run, TABLE)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = script_parser("training", DESCRIPTION, EPILOG, PHASES, DEFAULT_BATCHES)
    parser.add_argument(
        "--preset", choices=PRESETS, default="dinov2-b", help="sizes of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--networks",
        choices=NETWORKS,
        default="full",
        help="full: LPIPS (VGG) and DINO ViT-S/8; light: EfficientNet-Lite0 and the encoder (default: full)",
    )
    parser.add_argument(
        "--accumulation", type=positive, default=1, metavar="N", help="micro-batches of --batch images a step"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile, as the recipe's compile: true")
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    parser.add_argument(
        "--float32-matmul",
        choices=("highest", "high"),
        default="highest",
        help="of what runs in float32; high allows TF32 (default: %(default)s)",
    )
    return parser


def run(setup: Setup, arguments: argparse.Namespace) -> Iterator[list[TrainingRow]]:
    """Rows of each phase and batch size, as they are measured."""
    torch.set_float32_matmul_precision(arguments.float32_matmul)
    ceilings = read_ceilings(setup)
    wide = ceilings if setup.dtype == torch.float32 else measure_ceilings(setup.device, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_weights(Path(folder), PRESETS[arguments.preset], arguments.seed)
        for phase in arguments.implementations:
            for batch in setup.batches:
                case = Case(phase, batch, weights[phase], weights, setup, arguments)
                yield unless_out_of_memory(f"{phase}, batch {batch}", partial(case.rows, ceilings, wide))


class Case:
    """One phase at one micro-batch size."""

    def __init__(
        self,
        phase: str,
        batch: int,
        checkpoint: Path,
        weights: Mapping[str, Path],
        setup: Setup,
        arguments: argparse.Namespace,
    ) -> None:
        self.phase = phase
        self.batch = batch
        self.setup = setup
        self.arguments = arguments
        self.recipe = self._recipe(checkpoint, weights)

    def rows(self, ceilings: Ceilings, wide: Ceilings) -> Iterator[TrainingRow]:
        """Before and after the adversarial loss sets in."""
        recipe, setup = self.recipe, self.setup
        task = ReconstructionTask(self.phase, recipe, samples=[])
        footprints = self._footprints(task.tokenizer.config)
        side = task.tokenizer.config.image_size
        images = torch.randint(256, (self.batch, 3, side, side), dtype=torch.uint8).to(setup.device)
        micro_batches = [Batch(images, torch.zeros(self.batch), 0)] * recipe.accumulation_steps
        for losses, step in (("plain", 0), ("adversarial", recipe.discriminator.start_step)):

            def take(step: int = step) -> Tensor:
                with torch.enable_grad():
                    task.train_step(step, micro_batches)
                return images

            with _peak_memory(setup.device) as peak_bytes:
                timing = time_interleaved(
                    {losses: take},
                    setup.device,
                    self._num_runs(),
                    f"{self.phase}, {losses}, batch {self.batch}",
                )[losses]
            yield self._row(losses, step, footprints[losses], timing, ceilings, wide, peak_bytes)

    def _row(
        self,
        losses: str,
        step: int,
        footprint: Footprint,
        timing: Timing,
        ceilings: Ceilings,
        wide: Ceilings,
        peak_bytes: Sequence[int],
    ) -> TrainingRow:
        recipe, arguments = self.recipe, self.arguments
        operations = footprint.operations_per_image(step, recipe)
        images_per_s = 1e3 * recipe.batch_size / timing.p50_ms
        tflops = operations.total() * images_per_s / 1e12
        ideal_s = (
            operations[torch.bfloat16] / ceilings.matrix_tflops
            + operations[torch.float32] / wide.matrix_tflops
        ) / 1e12
        return TrainingRow(
            **vars(self.setup.provenance),
            preset=arguments.preset,
            phase=self.phase,
            losses=losses,
            perceptual=recipe.loss.perceptual_network,
            discriminator=recipe.discriminator.backbone,
            compiled=recipe.compile,
            checkpointing=recipe.activation_checkpointing,
            float32_matmul=arguments.float32_matmul,
            batch=self.batch,
            accumulation=recipe.accumulation_steps,
            **vars(timing),
            images_per_s=images_per_s,
            gflop_bfloat16=operations[torch.bfloat16] / 1e9,
            gflop_float32=operations[torch.float32] / 1e9,
            tflops=tflops,
            matrix_tflops=ceilings.matrix_tflops,
            float32_tflops=wide.matrix_tflops,
            matrix_share=tflops / ceilings.matrix_tflops,
            roof_share=ideal_s * images_per_s,
            memory_gib=peak_bytes[0] / 2**30 if peak_bytes else None,
            memory_estimate_gib=footprint.peak_bytes / 2**30,
        )

    def _recipe(self, checkpoint: Path, weights: Mapping[str, Path]) -> PhaseRecipe:
        perceptual, backbone = NETWORKS[self.arguments.networks]
        start = 1000  # a step of its own, so that both kinds can be asked for
        return PhaseRecipe.model_validate(
            {
                "output": "unused",
                "init": str(checkpoint),
                "preset": self.arguments.preset,
                "device": str(self.setup.device),
                "precision": str(self.setup.dtype).removeprefix("torch."),
                "data": {"train": ["unused"], "validation": ["unused"]},
                "num_steps": 2 * start,
                "batch_size": self.batch * self.arguments.accumulation,
                "accumulation_steps": self.arguments.accumulation,
                "compile": self.arguments.compile,
                "activation_checkpointing": self.arguments.checkpointing,
                "noise_tau": 0.8 if self.phase == "phase1" else 0.0,
                "loss": {
                    "perceptual_network": perceptual,
                    "vgg_weights": str(weights["vgg"]),
                    "lpips_weights": str(weights["lpips"]),
                },
                "discriminator": {
                    "backbone": backbone,
                    "dino_weights": str(weights["dino"]),
                    "start_step": start,
                    "adversarial_start_step": start,
                },
            }
        )

    def _footprints(self, config: TokenizerConfig) -> dict[str, Footprint]:
        """Estimates before and after the adversarial loss sets in."""
        plain = self.recipe.loss.model_copy(update={"adversarial": 0.0})
        recipes = {"plain": self.recipe.model_copy(update={"loss": plain}), "adversarial": self.recipe}
        return {
            name: measure_footprint(config, recipe, TRAINED_PARTS[self.phase])
            for name, recipe in recipes.items()
        }

    def _num_runs(self) -> int:
        return self.arguments.repeats or DEFAULT_REPEATS[self.setup.device.type]


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Gets one figure on the way out, the most that was allocated at once; none on a CPU."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        # Less the buffer that empties the cache between runs, which is the clock's.
        found.append(torch.cuda.max_memory_allocated(device) - FLUSH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
