"""Start of phases 1 to 3 and joint training: the recipe is checked, the tokenizer loaded and initialised."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from model.checkpoints.tokenizers import resolve_checkpoint
from model.config import PRESETS, DecoderConfig, TokenizerConfig
from model.errors import CheckpointError
from model.tokenizer import Tokenizer
from training.data.sources import Sample
from training.distributed.device import step_generator
from training.errors import RecipeError
from training.phases.fusion_start import initialize_fusion
from training.phases.neighbour_block import initialize_neighbour_block
from training.phases.ridge_decoder import initialize_decoder
from training.recipes.recipe import BaseRecipe, PhaseRecipe


def check_recipe(phase: str, recipe: PhaseRecipe, num_ranks: int) -> None:
    """Whether the phase can do what the recipe asks.

    Raises:
        RecipeError: names the field.
    """
    check_batches(recipe, num_ranks)
    if not recipe.data.validation:
        raise RecipeError(
            "field 'data.validation': phases 1 to 3 report PSNR and SSIM on it, so it is required"
        )
    if recipe.decoder_init == "ridge" and phase != "phase1":
        raise RecipeError("field 'decoder_init': only phase 1 may replace the decoder")
    if recipe.fusion_init is not None and phase not in ("phase2", "joint"):
        raise RecipeError("field 'fusion_init': only phase 2 and joint training start a fusion")
    if recipe.neighbour_block is not None and phase != "phase3":
        raise RecipeError("field 'neighbour_block': only phase 3 appends it, to a decoder that is trained")
    if recipe.discriminator.start_step > recipe.discriminator.adversarial_start_step:
        raise RecipeError("field 'discriminator.start_step' comes after discriminator.adversarial_start_step")


def check_batches(recipe: BaseRecipe, num_ranks: int) -> None:
    """Whether a step's batch can be shared out equally.

    Raises:
        RecipeError: names the field.
    """
    if recipe.batch_size % (recipe.accumulation_steps * num_ranks):
        raise RecipeError(
            f"field 'accumulation_steps': batch_size={recipe.batch_size} does not divide into "
            f"{recipe.accumulation_steps} micro-batches on {num_ranks} ranks"
        )


def with_networks(recipe: PhaseRecipe, networks: dict[str, str]) -> PhaseRecipe:
    """The recipe with every ``auto`` network replaced by the one in use."""
    loss = recipe.loss.model_copy(update={"perceptual_network": networks["perceptual"]})
    discriminator = recipe.discriminator.model_copy(update={"backbone": networks["discriminator"]})
    return recipe.model_copy(update={"loss": loss, "discriminator": discriminator})


def make_tokenizer(phase: str, recipe: PhaseRecipe) -> Tokenizer:
    """The checkpoint that the recipe starts from, given the architecture that the phase needs.

    Raises:
        RecipeError: the recipe names no checkpoint, or one that the phase cannot start from.
    """
    if recipe.init is None:
        raise RecipeError(f"field 'init': {phase} starts from a checkpoint with a pre-trained encoder")
    source = Tokenizer.load(_existing(recipe.init), fusion="reference")
    config = _phase_config(phase, recipe, source.config)
    tokenizer = Tokenizer(config)
    tokenizer.encoder.load_state_dict(source.encoder.state_dict())
    grown = tokenizer.decoder.state_dict() if recipe.neighbour_block else {}
    tokenizer.decoder.load_state_dict(grown | source.decoder.state_dict())
    if tokenizer.fusion is not None and source.fusion is not None:
        tokenizer.fusion.load_state_dict(source.fusion.state_dict())
    mean, var = source.latent_mean, source.latent_var
    if mean is not None and var is not None and _keeps_latents(phase, recipe, source):
        tokenizer.set_statistics(mean, var)
    return tokenizer


def _existing(init: str) -> Path:
    """The checkpoint's directory, or how to get it where there is none.

    Raises:
        RecipeError: it is not there.
    """
    try:
        return resolve_checkpoint(init)
    except CheckpointError as exc:
        raise RecipeError(
            f"field 'init': {exc}. Train the phase before this one, or import weights (drorae import); to "
            "start from the bundled checkpoint: --set init=mini"
        ) from exc


def initialize_parts(
    phase: str, recipe: PhaseRecipe, tokenizer: Tokenizer, samples: Sequence[Sample]
) -> None:
    """Fit what a new run starts from, as the recipe asks: the decoder, or the fusion.

    Raises:
        DataError: none of the training images could be decoded.
    """
    generator = step_generator(recipe.seed, -1, torch.device("cpu"))
    if recipe.decoder_init == "ridge":
        initialize_decoder(tokenizer, samples, recipe.noise_tau, generator)
    if recipe.fusion_init is not None:
        initialize_fusion(tokenizer, samples, recipe.fusion_init, generator, recipe.precision)
    if recipe.neighbour_block is not None:
        initialize_neighbour_block(tokenizer, samples, recipe.neighbour_block, generator, recipe.precision)


def _keeps_latents(phase: str, recipe: PhaseRecipe, source: Tokenizer) -> bool:
    """Whether the source's statistics, such as published ones, hold for what the phase makes of it."""
    return phase == "phase1" and source.fusion is None and not recipe.train_encoder


def _phase_config(phase: str, recipe: PhaseRecipe, source: TokenizerConfig) -> TokenizerConfig:
    fusion = source.fusion
    if phase == "phase1":
        fusion = None
    elif fusion is None and phase == "phase3":
        raise RecipeError(
            f"field 'init': {recipe.init} has no fusion; phase 3 starts from phase 2's checkpoint"
        )
    elif fusion is None:
        fusion = recipe.fusion or (PRESETS[recipe.preset].fusion if recipe.preset else None)
        if fusion is None:
            raise RecipeError("field 'fusion': name a preset or give the fusion to train")
    changes: dict[str, Any] = {"fusion": fusion, "name": recipe.name}
    if recipe.neighbour_block is not None:
        changes["decoder"] = _with_neighbour_block(source)
    try:  # fits the fusion to the encoder, and checks that it does
        return TokenizerConfig(**dict(source) | changes)
    except ValidationError as exc:
        raise RecipeError(f"field 'fusion': {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from exc


def _with_neighbour_block(source: TokenizerConfig) -> DecoderConfig:
    """The decoder with one more block, whose heads must have room for codes of a token's row and column."""
    decoder, room = source.decoder, source.decoder.width // source.decoder.num_heads
    if room < 2 * source.encoder.grid:
        raise RecipeError(
            f"field 'neighbour_block': heads of width {room} have no room for positions on a grid of "
            f"{source.encoder.grid} x {source.encoder.grid} tokens, which takes {2 * source.encoder.grid}"
        )
    return decoder.model_copy(update={"depth": decoder.depth + 1})
