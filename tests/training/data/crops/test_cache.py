"""The cache of frozen states: training with it is training without it, and it is refused where it is not."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from model.tokenizer import Tokenizer
from tests.training.conftest import LOG_ERROR, ROOT, encode_png, make_image
from tests.training.distributed.test_ranks import torchrun
from training.data.batches import PositionedDataset
from training.data.crops.cache import CropManifest, StateCache
from training.data.sources import list_samples
from training.errors import LatentsError, RecipeError
from training.latents.manifest import read_manifest_of
from training.latents.store import FolderStore
from training.run import run_phase

FIXED = ["data.crops_per_image=2"]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images a shard."""
    monkeypatch.setattr("training.data.crops.cache.SHARD_BYTES", 40_000)


@pytest.fixture
def with_cache(tmp_path: Path) -> list[str]:
    return [*FIXED, f"cache={{directory: {tmp_path / 'cache'}, dtype: float32}}"]


def read_manifest(folder: Path) -> CropManifest | None:
    return read_manifest_of(FolderStore(folder), CropManifest)


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:06d}.safetensors"


def losses(run: Path) -> list[dict[str, float]]:
    with (run / "train.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(Tokenizer.load(run / "checkpoint").state_dict())


def never_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the frozen parts ran although their states are cached")

    monkeypatch.setattr("training.data.crops.frozen_states.frozen_states", refuse)


@pytest.mark.usefixtures("exact", "small_shards")
@pytest.mark.parametrize("phase", ["phase1", "phase2", "phase3"])
def test_cached_training_is_uncached_training(
    recipe_file: Path, tmp_path: Path, with_cache: list[str], phase: str
) -> None:
    start = []
    if phase == "phase3":  # from a fused checkpoint
        run_phase("phase2", recipe_file, ["num_steps=1"], tmp_path / "fused")
        start = [f"init={tmp_path / 'fused' / 'checkpoint'}"]
    run_phase(phase, recipe_file, [*start, *FIXED], tmp_path / "plain")
    run_phase(phase, recipe_file, [*start, *with_cache], tmp_path / "cached")
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    assert len(manifest.shards) > 1
    assert manifest.identity.shape == ((4, 16, 32) if phase == "phase2" else (1, 16, 32))
    plain, cached = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    assert len(plain) == len(cached) == 6
    for before, after in zip(plain, cached, strict=True):
        assert after == pytest.approx(before, rel=LOG_ERROR)
    expected = weights(tmp_path / "plain")
    for name, tensor in weights(tmp_path / "cached").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)  # exported as float32


def test_a_second_run_reads_what_the_first_one_made(
    recipe_file: Path, tmp_path: Path, with_cache: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=2"], tmp_path / "one")
    never_encode(monkeypatch)
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=2"], tmp_path / "two")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_training_does_not_decode_cached_images(
    recipe_file: Path, tmp_path: Path, with_cache: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_phase("phase2", recipe_file, [*with_cache, "num_steps=1"], tmp_path / "one")

    def refuse(_: bytes) -> None:
        raise AssertionError("an image was decoded although its crops are cached")

    dataset = PositionedDataset(list_samples([recipe_photos(recipe_file)]), None, 0, 2, open_cache(tmp_path))
    monkeypatch.setattr("training.data.batches.decode_image", refuse)
    pixels, _, _, states = dataset[5]
    assert pixels.shape == (3, 32, 32)
    assert states.shape == (4, 16, 32)


def open_cache(folder: Path) -> StateCache:
    manifest = read_manifest(folder / "cache")
    assert manifest is not None
    return StateCache(folder / "cache", manifest)


def recipe_photos(recipe_file: Path) -> Path:
    return Path(yaml.safe_load(recipe_file.read_text())["data"]["train"][0])


def test_training_does_not_encode_cached_crops(
    recipe_file: Path, tmp_path: Path, with_cache: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=1"], tmp_path / "one")
    encoded = []
    tokens = Tokenizer.tokens
    monkeypatch.setattr(
        Tokenizer,
        "tokens",
        lambda self, images, *rest: encoded.append(len(images)) or tokens(self, images, *rest),
    )
    run_phase(
        "phase1", recipe_file, [*with_cache, "num_steps=2", "evaluate_every_steps=99"], tmp_path / "two"
    )
    assert encoded == [12]  # the validation at the end alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "seed is 0, not 1"),
        ("data.crops_per_image=3", "crops_per_image is 2, not 3"),
        ("data.flip=false", "flip is True, not False"),
        ("cache.dtype=float16", "dtype is float32, not float16"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    recipe_file: Path, tmp_path: Path, with_cache: list[str], change: str, message: str
) -> None:
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=1"], tmp_path / "one")
    with pytest.raises(LatentsError, match=rf"made with other settings \(.*{message}"):
        run_phase("phase1", recipe_file, [*with_cache, change, "num_steps=1"], tmp_path / "two")


def test_other_images_or_weights_are_refused(
    recipe_file: Path, photos: Path, encoder_checkpoint: Path, tmp_path: Path, with_cache: list[str]
) -> None:
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=1"], tmp_path / "one")
    tokenizer = Tokenizer.load(encoder_checkpoint)
    with torch.no_grad():
        tokenizer.encoder.class_token += 1
    tokenizer.save(tmp_path / "other")
    with pytest.raises(LatentsError, match="weights_sha256 is"):
        run_phase("phase1", recipe_file, [*with_cache, f"init={tmp_path / 'other'}"], tmp_path / "two")
    (photos / "00.png").write_bytes(encode_png(make_image(77)))
    with pytest.raises(LatentsError, match=r"the images of data\.train had"):
        run_phase("phase1", recipe_file, with_cache, tmp_path / "three")


@pytest.mark.usefixtures("exact", "small_shards")
def test_a_killed_build_goes_on_where_it_was(
    recipe_file: Path, tmp_path: Path, with_cache: list[str]
) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import training.data.crops.cache, training.data.crops.frozen_states as build\n"
        "from tests.training.conftest import in_float64\n"
        "from training.run import run_phase\n"
        "training.data.crops.cache.SHARD_BYTES = 40_000\n"
        "encode, calls = build._encode, []\n"
        "def dying(*args):\n"
        "    calls.append(args)\n"
        "    if len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return encode(*args)\n"
        "build._encode = dying\n"
        "with in_float64():\n"
        "    run_phase('phase1', Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(recipe_file), str(tmp_path / "run"), *with_cache],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    first = shard_file(tmp_path / "cache", 0)
    made_at = first.stat().st_mtime_ns
    assert not shard_file(tmp_path / "cache", 1).exists()
    run_phase("phase1", recipe_file, with_cache, tmp_path / "run")
    assert first.stat().st_mtime_ns == made_at
    assert not list((tmp_path / "cache").glob(".*.tmp-*"))
    run_phase("phase1", recipe_file, FIXED, tmp_path / "plain")
    for cached, plain in zip(losses(tmp_path / "run"), losses(tmp_path / "plain"), strict=True):
        assert cached == pytest.approx(plain, rel=LOG_ERROR)


def test_damage_is_found_when_it_is_read(recipe_file: Path, tmp_path: Path, with_cache: list[str]) -> None:
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=1"], tmp_path / "one")
    file = shard_file(tmp_path / "cache", 0)
    data = bytearray(file.read_bytes())
    data[-20_000] ^= 1  # within the states or pixels of an entry: what is small comes first
    file.write_bytes(data)
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    cache = StateCache(tmp_path / "cache", manifest)
    messages = []
    for entry in range(24):
        try:
            cache.read(*divmod(entry, 2))
        except LatentsError as exc:
            messages.append(str(exc))
    (message,) = messages  # of one entry alone
    assert re.search(r"latents-000000\.safetensors: entry \d+ is damaged", message)


def test_a_truncated_shard_is_made_again(recipe_file: Path, tmp_path: Path, with_cache: list[str]) -> None:
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=1"], tmp_path / "one")
    file = shard_file(tmp_path / "cache", 0)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=1"], tmp_path / "two")
    assert file.stat().st_size == len(whole)


def test_no_room_is_said_before_anything_is_computed(
    recipe_file: Path, tmp_path: Path, with_cache: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_encode(monkeypatch)
    monkeypatch.setattr(FolderStore, "free_bytes", lambda _: 1000)
    with pytest.raises(LatentsError, match=r"the cache needs 0\.0 more \(12 images x 2 crops x 0\.00 MiB\)"):
        run_phase("phase1", recipe_file, with_cache, tmp_path / "run")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.crops_per_image=null"], "field 'data.crops_per_image'"),
        (["train_encoder=true"], "field 'cache': train_encoder"),
    ],
)
def test_recipes_that_cannot_be_cached(
    recipe_file: Path, tmp_path: Path, with_cache: list[str], overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        run_phase("phase1", recipe_file, [*with_cache, *overrides], tmp_path / "run")


@pytest.mark.usefixtures("exact")
def test_broken_images_are_left_out_of_the_cache(
    recipe_file: Path, photos: Path, tmp_path: Path, with_cache: list[str]
) -> None:
    data = encode_png(make_image(99))
    (photos / "broken.png").write_bytes(data[: len(data) // 2])
    run_phase("phase1", recipe_file, [*with_cache, "num_steps=8"], tmp_path / "cached")
    run_phase("phase1", recipe_file, [*FIXED, "num_steps=8"], tmp_path / "plain")
    for cached, plain in zip(losses(tmp_path / "cached"), losses(tmp_path / "plain"), strict=True):
        assert cached == pytest.approx(plain, rel=LOG_ERROR)
    assert losses(tmp_path / "cached")[-1]["num_broken"] >= 2


def test_half_precision_stays_close(recipe_file: Path, tmp_path: Path, with_cache: list[str]) -> None:
    run_phase("phase2", recipe_file, [*with_cache, "cache.dtype=float16"], tmp_path / "cached")
    run_phase("phase2", recipe_file, FIXED, tmp_path / "plain")
    for cached, plain in zip(losses(tmp_path / "cached"), losses(tmp_path / "plain"), strict=True):
        assert cached["l1"] == pytest.approx(plain["l1"], rel=1e-2)


def test_recipe_file_takes_the_section(recipe_file: Path, tmp_path: Path) -> None:
    fields = yaml.safe_load(recipe_file.read_text())
    fields["data"]["crops_per_image"] = 1
    fields["cache"] = {"directory": str(tmp_path / "cache")}
    recipe_file.write_text(yaml.safe_dump(fields))
    run_phase("phase1", recipe_file, ["num_steps=1"], tmp_path / "run")
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    assert manifest.identity.dtype == "float16"


@pytest.mark.usefixtures("exact")
def test_two_ranks_fill_one_cache(recipe_file: Path, tmp_path: Path, with_cache: list[str]) -> None:
    plain = ["train", "phase1", "--config", str(recipe_file), "--output", str(tmp_path / "two")]
    overrides = [word for override in with_cache for word in ("--set", override)]
    script = (
        "import sys, training.data.crops.cache\n"
        "from cli.main import main\n"
        "from tests.training.conftest import in_float64\n"
        "training.data.crops.cache.SHARD_BYTES = 40_000\n"
        "with in_float64():\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "rank.py").write_text(script)
    result = torchrun(str(tmp_path / "rank.py"), *plain, *overrides)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    assert len(list((tmp_path / "cache").glob("latents-*"))) == len(manifest.shards) > 1
    run_phase("phase1", recipe_file, FIXED, tmp_path / "one")
    for cached, uncached in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert cached == pytest.approx(uncached, rel=LOG_ERROR)
