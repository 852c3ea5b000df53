from pathlib import Path

import pytest
import torch

from model.config import DecoderConfig
from model.images.similarity import edge_ratio, psnr
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION
from training.data.batches import evaluation_batches
from training.data.sources import list_samples
from training.errors import RecipeError
from training.phases.neighbour_block import _low_rank, _NeighbourFit, initialize_neighbour_block
from training.phases.ridge_decoder import initialize_decoder
from training.recipes.recipe import NeighbourBlockConfig
from training.run import run_phase

CONFIG = NeighbourBlockConfig(num_images=12, rounds=2, attention_steps=60, learning_rate=3e-3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tokenizer(photos: Path) -> Tokenizer:
    """Its decoder is the linear readout of single tokens, and one block that does nothing yet."""
    torch.manual_seed(1)
    decoder = DecoderConfig(width=64, depth=2, num_heads=4, mlp_width=64, patch_size=8)
    found = Tokenizer(TINY.model_copy(update={"decoder": decoder, "fusion": None})).eval()
    initialize_decoder(found, list_samples([photos]), 0.0, generator())
    return found


def images(photos: Path) -> torch.Tensor:
    ((_, batch),) = evaluation_batches(list_samples([photos]), 32, 12)
    return batch.pixels(torch.device("cpu"))


def test_neighbours_improve_the_picture_and_its_seams(tokenizer: Tokenizer, photos: Path) -> None:
    wanted = images(photos)
    before = tokenizer.reconstruct(wanted)
    initialize_neighbour_block(tokenizer, list_samples([photos]), CONFIG, generator(), "float32")
    after = tokenizer.reconstruct(wanted)
    assert psnr(after, wanted).mean() > psnr(before, wanted).mean() + 0.3
    assert edge_ratio(after, 8).mean() < edge_ratio(before, 8).mean()


def test_each_head_attends_to_its_own_neighbour(tokenizer: Tokenizer, photos: Path) -> None:
    initialize_neighbour_block(tokenizer, list_samples([photos]), CONFIG, generator(), "float32")
    decoder = tokenizer.decoder
    hidden = decoder.hidden(tokenizer.tokens(images(photos)), 1)
    fit = _NeighbourFit(decoder, decoder.blocks[-1], hidden, torch.empty(0))  # type: ignore[arg-type]
    with torch.no_grad():
        weights = fit._logits(fit._normed(hidden)).softmax(dim=-1)
    wanted = fit._neighbours().expand(len(hidden), -1, -1)[..., None]
    assert weights.gather(-1, wanted).mean() > 0.5
    left = fit._neighbours()[0].view(decoder.grid, decoder.grid)
    assert (left[:, 1:] == left[:, :1] + torch.arange(decoder.grid - 1)).all()


def test_the_cut_to_a_heads_rank_is_the_best_in_its_norm() -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(6, 6).double()).R for _ in range(2))
    matrix = torch.randn(6, 6).double()
    out, value = _low_rank(left, matrix, right, 2)
    singular = torch.linalg.svdvals(left @ matrix @ right)
    error = torch.linalg.matrix_norm(left @ (matrix - out @ value) @ right)
    torch.testing.assert_close(error, singular[2:].square().sum().sqrt())


def test_recipe_appends_one_block_and_resumes(recipe_file: Path, tmp_path: Path) -> None:
    run_phase("phase2", recipe_file, ["num_steps=1"], tmp_path / "two")
    source = tmp_path / "two" / "checkpoint"
    block = "neighbour_block={num_images: 12, rounds: 1, attention_steps: 2}"
    overrides = [f"init={source}", block, "checkpoint_every_steps=1"]
    run_phase("phase3", recipe_file, [*overrides, "num_steps=1"], tmp_path / "run")
    run_phase("phase3", recipe_file, [*overrides, "num_steps=1"], tmp_path / "run", resume=True)
    grown = Tokenizer.load(tmp_path / "run" / "checkpoint")
    assert len(grown.decoder.blocks) == Tokenizer.load(source).config.decoder.depth + 1


@pytest.mark.parametrize(("phase", "heads"), [("phase1", 2), ("phase3", 8)])
def test_belongs_to_phase_3_and_needs_room_in_the_heads(
    recipe_file: Path, tmp_path: Path, phase: str, heads: int
) -> None:
    narrow = TINY.decoder.model_copy(update={"num_heads": heads})
    source = TINY.model_copy(update={"decoder": narrow, "fusion": TINY_FUSION})
    Tokenizer(source).save(tmp_path / "source")
    with pytest.raises(RecipeError, match="field 'neighbour_block'"):
        run_phase(phase, recipe_file, ["neighbour_block={}", f"init={tmp_path / 'source'}"], tmp_path / "run")
