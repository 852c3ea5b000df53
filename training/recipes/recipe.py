"""Recipes: the typed configuration of every phase, read from YAML with overrides.

A recipe is complete: the run directory keeps a copy, and with the same data it gives the same weights.

Fields that count steps may be given in epochs of the training data: ``num_steps: 16 epochs``. They stay
`Epochs` until the images are listed; `in_steps` then replaces them by ``epochs * images / batch_size`` steps.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from model.config import PRESETS, FrozenConfig, FusionConfig
from model.spelling import suggest
from training.errors import RecipeError

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*epochs?\s*")


@dataclass(frozen=True)
class Epochs:
    """A duration in passes over the training images."""

    count: float


def _epochs_or_steps(value: object, validate: ValidatorFunctionWrapHandler) -> Any:
    found = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return validate(value)
    return Epochs(float(found[1])) if float(found[1]) else validate(0)


# The type of a field that counts optimizer steps: an int, or `Epochs` in a recipe that was just read.
Steps = Annotated[int, Field(ge=0), WrapValidator(_epochs_or_steps)]
PositiveSteps = Annotated[int, Field(ge=1), WrapValidator(_epochs_or_steps)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
RecipeType = TypeVar("RecipeType", bound="BaseRecipe")


class DataConfig(FrozenConfig):
    """Images for training and validation. Relative paths start at the working directory."""

    train: list[Path] = Field(min_length=1, description="Folders or tar shards.")
    validation: list[Path] = Field([], description="Folders or tar shards; never trained on.")
    resize_short_side: tuple[PositiveInt, PositiveInt] = Field(
        (384, 384), description="Range of the short side before the random crop, pixels (RAE: 384)."
    )
    crop_area: tuple[float, float] = Field(
        (0.3, 1.0), description="Phase 0: share of the image a crop covers."
    )
    flip: bool = Field(True, description="Random horizontal flip.")
    crops_per_image: PositiveInt | None = Field(
        None,
        description="Fixed random crops of each image, one an epoch in turn; null: a new one every time.",
    )
    num_images: PositiveInt | None = Field(
        None, description="Images in train, to turn epochs into steps by; null: count them."
    )
    num_workers: NonNegativeInt = Field(1, description="Processes that decode images.")


class OptimizerConfig(FrozenConfig):
    """AdamW with linear warm-up and a decay of the rate (RAE's values)."""

    learning_rate: float = Field(2e-4, gt=0)
    final_learning_rate: float = Field(2e-5, ge=0)
    decay: Literal["cosine", "linear"] = Field("cosine", description="Shape of the way to the final rate.")
    decay_start_step: Steps = Field(0, description="Where it begins, after the warm-up.")
    decay_end_step: PositiveSteps | None = Field(None, description="Where it ends; null: with the run.")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Weight = 0.0
    warmup_steps: Steps = 0
    clip_norm: float | None = Field(None, gt=0, description="Gradient norm limit; null for none.")


class LossConfig(FrozenConfig):
    """L1 + perceptual + adaptively weighted adversarial loss (VQGAN's balance, RAE's weights)."""

    l1: Weight = 1.0
    l2: Weight = Field(0.0, description="Mean squared error; the papers have none.")
    seams: Weight = Field(
        0.0, description="L1 of the error of steps across patch borders, against visible patches; ours."
    )
    perceptual: Weight = 1.0
    adversarial: Weight = 0.75
    perceptual_network: Literal["auto", "lpips-vgg", "efficientnet-lite0"] = Field(
        "auto", description="auto: LPIPS (VGG) where its weights are found, else EfficientNet-Lite0."
    )
    perceptual_crop: PositiveInt | None = Field(
        None,
        description="Side of the random crop the perceptual term sees, pixels; null for the whole image.",
    )
    vgg_weights: Path | None = Field(None, description="torchvision's vgg16 state dict, for lpips-vgg.")
    lpips_weights: Path | None = Field(
        None, description="LPIPS v0.1 linear heads; null: the lpips package's."
    )


class DistributedConfig(FrozenConfig):
    """Division of the work among the ranks of ``torchrun``; unused by a single process."""

    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: every rank holds all weights; fsdp: a shard of the decoder's (FSDP2)."
    )
    timeout_s: float = Field(
        600.0, gt=0, description="How long a rank waits for the others before it gives up, seconds."
    )


class DiscriminatorConfig(FrozenConfig):
    """Frozen ViT features with light spectral-norm heads (StyleGAN-T, RAE)."""

    backbone: Literal["auto", "dino-vits8", "encoder"] = Field(
        "auto", description="auto: DINO ViT-S/8 where its weights are given, else the frozen encoder."
    )
    dino_weights: Path | None = Field(None, description="DINO ViT-S/8 state dict, for dino-vits8.")
    start_step: Steps = Field(0, description="First step at which the discriminator is trained.")
    adversarial_start_step: Steps = Field(0, description="First step at which its loss is used.")
    learning_rate: float = Field(2e-4, gt=0)
    augment_probability: float = Field(1.0, ge=0, le=1, description="DiffAug: translation and colour.")


class CacheConfig(FrozenConfig):
    """Outputs of the frozen parts for every crop, computed once and kept on disk (`training.data.cache`)."""

    directory: Path = Field(description="Folder of the cache; made where it is absent.")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Of the stored values.")


class FusionStartConfig(FrozenConfig):
    """A fusion fitted to the frozen linear readout of base latents (`training.phases.fusion_start`)."""

    num_images: PositiveInt = Field(512, description="Images whose tokens it is fitted on, at most.")
    num_steps: PositiveInt = Field(800, description="Optimizer steps (Adam).")
    batch_tokens: PositiveInt = Field(512, description="Tokens per step.")
    learning_rate: float = Field(1e-3, gt=0)


class NeighbourBlockConfig(FrozenConfig):
    """One more decoder block, fitted to a token's neighbours (`training.phases.neighbour_block`)."""

    num_images: PositiveInt = Field(512, description="Images that it is fitted on, at most.")
    rounds: PositiveInt = Field(4, description="Rounds of regression, heads and last layer in turn.")
    attention_steps: PositiveInt = Field(250, description="Steps (Adam) that fit where the heads attend.")
    learning_rate: float = Field(1e-3, gt=0, description="Of those steps.")


class BaseRecipe(FrozenConfig):
    """Settings of every phase."""

    name: str = Field("run", min_length=1, description="Name of the run.")
    output: Path = Field(description="Run directory.")
    init: str | None = Field(None, description="Tokenizer checkpoint to start from: a directory or preset.")
    preset: str | None = Field(None, description="Architecture, where init gives none.")
    data: DataConfig
    seed: NonNegativeInt = 0
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on CUDA.")
    num_steps: PositiveSteps = Field(description="Optimizer steps.")
    batch_size: PositiveInt = Field(512, description="Images an optimizer step, over all ranks.")
    accumulation_steps: PositiveInt = Field(1, description="Micro-batches an optimizer step is split into.")
    distributed: DistributedConfig = DistributedConfig()
    compile: bool = Field(False, description="Compile transformer blocks and the fusion (torch.compile).")
    activation_checkpointing: bool = Field(
        False, description="Recompute the blocks that gradients pass in the backward pass, to save memory."
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = Field(0.9978, ge=0, lt=1)
    log_every_steps: PositiveSteps = 20
    evaluate_every_steps: PositiveSteps = 500
    checkpoint_every_steps: PositiveSteps = 500
    tensorboard: bool = Field(
        False, description="Also write figures and pictures for TensorBoard (extra drorae[tensorboard])."
    )
    storage_dtype: Literal["float32", "float16"] = Field("float32", description="Of the exported weights.")

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"{preset!r} is none of {', '.join(PRESETS)}{suggest(preset, PRESETS)}")
        return preset


class PhaseRecipe(BaseRecipe):
    """Phases 1 to 3, and joint training (an ablation)."""

    loss: LossConfig = LossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    fusion: FusionConfig | None = Field(
        None, description="Fusion that phase 2 or joint adds; null: preset's."
    )
    fusion_init: FusionStartConfig | None = Field(
        None, description="Phase 2 or joint: fit a new fusion to a linear readout first; null: do not."
    )
    decoder_init: Literal["keep", "ridge"] = Field(
        "keep", description="Phase 1: keep the checkpoint's decoder, or start as the best linear one."
    )
    neighbour_block: NeighbourBlockConfig | None = Field(
        None, description="Phase 3: append a decoder block fitted to each token's neighbours; null: do not."
    )
    noise_tau: float = Field(
        0.0, ge=0, description="Latent noise: z + sigma n, sigma ~ U(0, tau) per sample."
    )
    statistics_images: PositiveInt = Field(
        2048, description="Images, at most, of the exported checkpoint's latent statistics."
    )
    train_encoder: bool = Field(False, description="Ablation: unfreeze the backbone.")
    cache: CacheConfig | None = Field(
        None, description="Latents or hidden states kept on disk; needs data.crops_per_image. Null: none."
    )


class DistillationRecipe(BaseRecipe):
    """Phase 0: semantic features for an encoder that no published weights fit."""

    ema_decay: float = Field(0.99, ge=0, lt=1)
    image_size: PositiveInt = Field(112, description="Student input side for most steps, pixels.")
    teacher_image_size: PositiveInt = Field(160, description="Teacher input side, pixels.")
    final_image_size: PositiveInt = Field(224, description="Student input side at the end, pixels.")
    final_steps: Steps = Field(0, description="Steps at the final size (DINOv2's adaptation).")
    final_batch_size: PositiveInt = Field(16, description="Images a step at the final size.")
    logits: Weight = Field(1.0, description="Weight of the class token's soft-label cross-entropy.")
    dense: Weight = Field(1.0, description="Weight of the patch tokens' cosine distance to the feature map.")
    labels: Weight = Field(0.0, description="Weight of the cross-entropy of the images' own classes.")
    num_classes: NonNegativeInt = Field(
        0, description="Classes that the labels name; 0: labels are not used."
    )
    pixels: Weight = Field(0.0, description="Weight of the first block's linear prediction of the pixels.")
    reserved_width: NonNegativeInt = Field(
        0, description="Values per token of the last block that are kept small: room for the fusion."
    )
    reserved_variance: float = Field(0.02, ge=0, description="Variance that is left to each of them.")


def load_recipe(kind: type[RecipeType], path: Path, overrides: list[str]) -> RecipeType:
    """Read a recipe and apply ``section.field=value`` overrides (values are YAML).

    Nothing but the file is read. Durations in epochs become steps in `in_steps`.

    Raises:
        RecipeError: names the file and the field.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise RecipeError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields")
    for override in overrides:
        _apply(fields, override)
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        raise RecipeError(f"{path}: {_describe(exc, kind)}") from exc


def in_steps(recipe: RecipeType, num_listed: int) -> RecipeType:
    """The recipe with every duration in steps.

    Args:
        recipe: of `load_recipe`; its ``data.num_images`` counts instead of the listing where it is given.
        num_listed: images that its ``data.train`` lists.

    Raises:
        RecipeError: a duration is too short for one step; names the field.
    """
    if not _has_epochs(recipe):
        return recipe
    num_images = recipe.data.num_images or num_listed
    if not num_images:
        raise RecipeError("field 'data': durations in epochs need images in data.train, or data.num_images")
    try:
        return type(recipe).model_validate(_steps_of(recipe, num_images / recipe.batch_size))
    except ValidationError as exc:
        raise RecipeError(_describe(exc, type(recipe))) from exc


def _has_epochs(section: BaseModel) -> bool:
    """Whether a recipe still holds durations in epochs, at any depth."""
    return any(
        _has_epochs(value) if isinstance(value, BaseModel) else isinstance(value, Epochs)
        for _, value in section
    )


def _steps_of(section: BaseModel, steps_per_epoch: float) -> dict[str, Any]:
    """The fields of a recipe, durations in steps."""
    fields: dict[str, Any] = dict(section)
    for name, value in section:
        if isinstance(value, Epochs):
            fields[name] = round(value.count * steps_per_epoch)
        elif isinstance(value, BaseModel) and _has_epochs(value):
            fields[name] = _steps_of(value, steps_per_epoch)
    return fields


def _describe(problem: ValidationError, kind: type[BaseModel]) -> str:
    """One sentence. A name that nobody knows comes first: what it was meant to be may be missing for it."""
    errors = problem.errors(include_url=False)
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    field = ".".join(str(step) for step in error["loc"]) or "(root)"
    if error["type"] == "extra_forbidden":
        return f"field {field!r}: there is no such field{suggest(field, _field_paths(kind))}"
    return f"field {field!r}: {error['msg'].removeprefix('Value error, ')}"


def _field_paths(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Names of a recipe's fields and sections, those of sections with their path."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _field_paths(inner, f"{prefix}{name}.")


def _apply(fields: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"override {override!r} is not of the form field=value")
    *sections, field = name.split(".")
    for section in sections:
        inner = fields.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {section!r} is not a section")
        fields = inner
    try:
        fields[field] = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from exc
