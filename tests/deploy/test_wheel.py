"""The wheel, installed into an environment of its own and used beside somebody's own code."""

import os
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.checks.context import BuildContext

pytestmark = pytest.mark.slow
OWN_PACKAGES = ("cli", "kernels", "model", "service", "training")


@pytest.fixture(scope="module")
def wheel(context: BuildContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what an image's build sees."""
    folder = tmp_path_factory.mktemp("wheel")
    context.copy_to(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, str(folder / "source")], cwd=folder, check=True, capture_output=True)
    (found,) = folder.glob("drorae-*.whl")
    return found


def test_it_carries_the_bundled_checkpoint(wheel: Path, context: BuildContext) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    suffixes = (".py", ".safetensors", ".json")
    assert {name for name in context.files() if name.endswith(suffixes) and "/" in name} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "deploy/")) for name in names)


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of an environment with the wheel and this one's libraries, but not its editable drorae."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (libraries,) = folder.glob("lib/python*/site-packages")
    # A plain line adds the folder without the .pth files inside it, one of which is the editable install.
    (libraries / "shared.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", str(wheel)], check=True, capture_output=True)
    command = [str(folder / "bin/python"), "-P", "-c", "import service; print(service.__file__)"]
    imported = subprocess.run(command, env={}, check=True, capture_output=True, text=True).stdout
    assert imported.startswith(str(libraries))
    return folder / "bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's folder, with packages that have our packages' names."""
    for name in OWN_PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('the project has its own {name}')\n")
    return tmp_path


@pytest.fixture
def environment() -> dict[str, str]:
    """Without this checkout, and without settings."""
    hidden = ("DRORAE_", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


@pytest.fixture
def served(
    programs: Path, project: Path, environment: dict[str, str], wait: Any, answered: Any
) -> Iterator[Any]:
    """Process and address of ``drorae serve``, started in the project's folder."""
    command = [programs / "drorae", "serve", "--port", "0", "--device", "cpu", "--batch-size", "1"]
    with subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split(" on ")[1].strip()
            wait("ready", lambda: answered(f"{url}/readyz"), 90)
            yield process, url
        finally:
            process.terminate()
            assert process.wait(60) == 0


def test_it_works_where_a_project_has_its_own_packages(
    served: Any, programs: Path, project: Path, environment: dict[str, str], photo: bytes
) -> None:
    process, url = served
    answer = httpx.post(f"{url}/encode?format=npy&exact=true", content=photo, timeout=60)
    assert answer.status_code == 200, answer.text
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    decoders = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    assert any(b"service.photos.process" in command for command in decoders)
    (project / "photo.jpg").write_bytes(photo)
    subprocess.run(
        [programs / "drorae", "encode", "photo.jpg", "-o", "latents.npy", "--device", "cpu"],
        cwd=project,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert (project / "latents.npy").read_bytes() == answer.content
    assert np.load(project / "latents.npy").shape == (1, 192, 16, 16)
