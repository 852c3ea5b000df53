"""Recipe of the generator's training (stage 2)."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from model.generator import GENERATOR_PRESETS, GeneratorConfig, TimeLaw
from model.spelling import suggest
from model.tokenizer import LatentKind
from training.recipes.recipe import BaseRecipe, DataConfig, NonNegativeInt, OptimizerConfig, PositiveInt


class GeneratorData(DataConfig):
    """Images, or folders of their latents (`drorae tokenize`), for training and validation."""

    train: list[Path] = Field([], description="Folders or tar shards.")
    latents: Path | None = Field(
        None, description="Folder of latents to train on, instead of the images of train."
    )
    validation_latents: Path | None = Field(
        None, description="Folder of latents, instead of the images of validation."
    )


class GeneratorOptimizer(OptimizerConfig):
    """As for the phases, and a choice for the blocks' matrices."""

    matrices: Literal["adamw", "muon"] = Field(
        "adamw",
        description="What updates the blocks' matrices. muon (arXiv 2502.16982) learns more per image; its "
        "products are bfloat16, which some CPUs emulate slowly. The rest is AdamW's.",
    )


class GeneratorRecipe(BaseRecipe):
    """A DiT^DH on the normalised latents of a frozen tokenizer.

    Of the inherited fields ``init`` is a generator to go on from, and ``preset`` an architecture of
    generators, which is fitted to the tokenizer's latents and the classes of the data.
    """

    data: GeneratorData
    tokenizer: str = Field(description="Tokenizer checkpoint: a directory or preset.")
    latent: LatentKind = Field("enriched", description="Which of its latents are learned.")
    correction: Literal["incremental", "replace"] | None = Field(
        None,
        description="Of the fusion instead of the tokenizer's own, for the paper's test of a latent space; "
        "no decoder fits such latents, so nothing is sampled.",
    )
    generator: GeneratorConfig | None = Field(None, description="Architecture, instead of a preset.")
    class_names: tuple[str, ...] | None = Field(
        None, description="Names in the order of the labels; null: classes.txt beside the data, or folders."
    )
    statistics: Literal["tokenizer", "data"] = Field(
        "tokenizer",
        description="Mean and variance of the latents: the tokenizer's own, or of the data trained on.",
    )
    hold_latents: bool = Field(
        False,
        description="Keep all latents on the device: read from data.latents, or of every image once, "
        "centre-cropped.",
    )
    latents_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="Of the latents that are held."
    )
    optimizer: GeneratorOptimizer = GeneratorOptimizer()
    balance_classes: bool = Field(
        False, description="Draw images of small classes more often, so that all come alike; of held latents."
    )
    time_law: TimeLaw = Field(
        "logit-normal",
        description="Law of the times before the shift (RAE in 2025: uniform; since: logit-normal).",
    )
    shift: float | None = Field(None, ge=1, description="Time shift; null: by the latents' size.")
    class_dropout: float = Field(0.1, ge=0, lt=1, description="Share of labels replaced by the null class.")
    ema_decay: float = Field(0.9995, ge=0, lt=1)
    keep_snapshots: bool = Field(
        False, description="Export the averaged weights at every validation too, such as for a guide."
    )
    validation_images: PositiveInt = Field(
        1024, description="Images of data.validation that are used, spread over it."
    )
    sample_points: PositiveInt = Field(50, ge=2, description="Points of the ODE's grid for sample pictures.")
    samples_per_class: NonNegativeInt = Field(4, description="Sample pictures per class and validation.")
    sampled_classes: PositiveInt = Field(12, description="Classes that are sampled, the first ones.")

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in GENERATOR_PRESETS:
            known = ", ".join(GENERATOR_PRESETS)
            raise ValueError(f"{preset!r} is none of {known}{suggest(preset, GENERATOR_PRESETS)}")
        return preset
