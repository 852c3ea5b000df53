"""The size of an image's layer of Python packages, computed from their wheels.

    python -m deploy.checks.sizes cpu --wheels /tmp/wheels
    python -m deploy.checks.sizes cuda --wheels /tmp/wheels    # some 3 GB to download

Wheels that the folder lacks are downloaded by pip, in the versions of the lock files. The base image is not
counted, nor is the C compiler of the CUDA image.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.checks.context import BuildContext

ROOT = Path(__file__).parents[2]
LOCK, CUDA_LOCK = ROOT / "requirements.lock", ROOT / "deploy/requirements-cuda.lock"
TARGETS = ("cpu", "cuda")
# The Dockerfile deletes these of torch, but for one program.
_REMOVED = ("torch/include/", "torch/test/", "torch/share/", "torch/bin/")
_KEPT = "torch/bin/torch_shm_manager"
_MB = 1e6
_NUM_SHOWN = 8


class Size(NamedTuple):
    """Of a package, bytes.

    Attributes:
        package: its name.
        download: of the wheel, about what a registry stores and a host pulls.
        installed: of its files, with their bytecode counted as large as the sources.
    """

    package: str
    download: int
    installed: int


def requirements(target: str) -> list[str]:
    """What the Dockerfile installs for a target, beside the project's own wheel."""
    pinned = list(_pinned(LOCK))
    if target == "cuda":
        return [*pinned, *_pinned(CUDA_LOCK)]
    return [line for line in pinned if not line.startswith("triton==")]


def size_of(wheel: Path) -> Size:
    """The size of a wheel and of what the image keeps of it."""
    installed = 0
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.filename.startswith(_REMOVED) and entry.filename != _KEPT:
                continue
            installed += entry.file_size * (2 if entry.filename.endswith(".py") else 1)
    return Size(wheel.name.partition("-")[0].replace("_", "-"), wheel.stat().st_size, installed)


def report(sizes: Sequence[Size]) -> str:
    """The largest packages, the rest, and the total, in MB."""
    ordered = sorted(sizes, key=lambda size: size.installed, reverse=True)
    rows = [*ordered[:_NUM_SHOWN], _sum(f"{len(ordered[_NUM_SHOWN:])} more", ordered[_NUM_SHOWN:])]
    lines = [f"{'MB':24}{'download':>10}{'installed':>10}"]
    for row in [*rows, _sum("all", ordered)]:
        lines.append(f"{row.package:24}{row.download / _MB:10.0f}{row.installed / _MB:10.0f}")
    return "\n".join(lines)


def fetch(target: str, folder: Path) -> None:
    """Download the wheels that the folder lacks, and build the project's own.

    Raises:
        subprocess.CalledProcessError: pip failed, and said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*command, *requirements(target)], check=True)
    with tempfile.TemporaryDirectory() as source:
        BuildContext(ROOT).copy_to(Path(source))
        own = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), source]
        subprocess.run(own, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the sizes of a target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of wheels, one per target in it")
    arguments = parser.parse_args(argv)
    folder = arguments.wheels / arguments.target
    try:
        fetch(arguments.target, folder)
    except subprocess.CalledProcessError:
        print("sizes: pip could not get the wheels; see above", file=sys.stderr)
        return 1
    print(report([size_of(wheel) for wheel in folder.glob("*.whl")]))
    return 0


def _pinned(lock: Path) -> Iterator[str]:
    lines = lock.read_text(encoding="utf-8").splitlines()
    return (line for line in lines if line and not line.startswith("#"))


def _sum(name: str, sizes: Sequence[Size]) -> Size:
    return Size(name, sum(size.download for size in sizes), sum(size.installed for size in sizes))


if __name__ == "__main__":
    sys.exit(main())
