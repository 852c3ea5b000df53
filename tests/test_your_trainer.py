"""The page about other trainers: every command and every piece of code, in order."""

import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.generator import Generator
from tests.training.latents.reading.lightning_dit import ImgLatentDataset

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/training/your-trainer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python|yaml)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
FEW_STEPS = "--set num_steps=1 --set batch_size=2 --set samples_per_class=0 --set device=cpu"

# WebDataset leaves it to the garbage collector to close its tars.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def lightning_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our loader by the description, under the name of LightningDiT's own module."""

    def load(data_dir: str, latent_norm: bool, latent_multiplier: float) -> ImgLatentDataset:
        assert (latent_norm, latent_multiplier) == (True, 1.0)
        return ImgLatentDataset(Path(data_dir))

    module = types.ModuleType("datasets.img_latent_dataset")
    module.ImgLatentDataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    monkeypatch.setitem(sys.modules, "datasets.img_latent_dataset", module)


def shell(script: str, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DRORAE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = script.replace("my-generator.yaml", f"my-generator.yaml {FEW_STEPS}")
    command = ["bash", "-c", f"set -e\n{script}"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


def blocks() -> Iterator[tuple[str, str]]:
    assert [kind for kind, _ in BLOCKS].count("python") >= 4
    return iter(BLOCKS)


@pytest.mark.usefixtures("lightning_dit")
def test_every_block_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    names: dict[str, object] = {}
    for kind, text in blocks():
        if kind == "sh":
            shell(text, tmp_path)
        elif kind == "yaml":
            (tmp_path / "my-generator.yaml").write_text(text)
        else:
            exec(compile(text, "your-trainer.md", "exec"), names)
    assert Generator.load(tmp_path / "runs/my-generator/checkpoint").trained_on.class_names == (
        "bridge",
        "citrus",
        "honeybee",
    )
    assert (tmp_path / "bridge.png").stat().st_size > 0
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["0000.png", "0001.png"]
