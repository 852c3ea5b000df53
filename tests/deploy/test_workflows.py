"""The workflows of GitHub, which no test can run: form, pins, and what they name of this project."""

import importlib.resources
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.checks.dockerfile import parse_dockerfile
from tests.deploy.test_compose import violations

WORKFLOWS = ("check", "image", "client")
PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


@pytest.fixture(scope="module")
def schema() -> Any:
    """The schema of workflows, as check-jsonschema carries it."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, which carries the schema, is missing")
    package = importlib.resources.files("check_jsonschema")
    file = package / "builtin_schemas/vendor/github-workflows.json"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def texts(root: Path) -> dict[str, str]:
    files = (root / ".github/workflows").iterdir()
    found = {file.stem: file.read_text(encoding="utf-8") for file in files}
    assert set(found) == set(WORKFLOWS)
    return found


@pytest.fixture(scope="module")
def workflows(texts: dict[str, str]) -> dict[str, Any]:
    """``on`` is a word of YAML 1.1; it is read as true."""
    read = {name: yaml.safe_load(text) for name, text in texts.items()}
    return {name: {"on": one.pop(True), **one} for name, one in read.items()}


def version(file: Path) -> str:
    return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_each_keeps_the_schema(workflows: dict[str, Any], schema: Any, name: str) -> None:
    assert violations(workflows[name], schema) == []


def test_the_schema_finds_mistakes(workflows: dict[str, Any], schema: Any) -> None:
    assert violations({**workflows["check"], "permission": {"contents": "read"}}, schema)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_content(texts: dict[str, str], name: str) -> None:
    used = re.findall(r"uses: (.+)", texts[name])
    assert used
    for action in used:
        assert PINNED.fullmatch(action) or (texts.keys() >= {Path(action).stem} and action.startswith("./"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_jobs_may_do_what_they_need_alone(workflows: dict[str, Any], name: str) -> None:
    assert workflows[name]["permissions"] == {"contents": "read"}
    more = {
        job: found["permissions"] for job, found in workflows[name]["jobs"].items() if "permissions" in found
    }
    assert (
        more
        == {
            "check": {},
            "image": {"image": {"contents": "read", "packages": "write"}},
            "client": {"publish": {"id-token": "write"}},
        }[name]
    )
    for job in workflows[name]["jobs"].values():
        for step in job.get("steps", []):
            assert "${{" not in step.get("run", "")  # what a tag is called is no part of a script
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_checks_are_those_of_a_developer(workflows: dict[str, Any], root: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (root / "Makefile").read_text(encoding="utf-8"), re.M))
    steps = workflows["check"]["jobs"]["check"]["steps"]
    asked = [step["run"].removeprefix("make ") for step in steps if step.get("run", "").startswith("make ")]
    assert asked == ["check", "portable", "test"]
    assert set(asked) <= targets


def test_both_images_are_built_with_their_contents(workflows: dict[str, Any], root: Path) -> None:
    job = workflows["image"]["jobs"]["image"]
    assert job["needs"] == "check"
    dockerfile = parse_dockerfile((root / "Dockerfile").read_text(encoding="utf-8"))
    targets = [one["target"] for one in job["strategy"]["matrix"]["include"]]
    assert set(targets) == {"cpu", "cuda"} <= {stage.name for stage in dockerfile.stages}
    build = job["steps"][-1]["with"]
    assert (build["sbom"], build["provenance"], build["push"]) == (True, "mode=max", True)
    given = {line.partition("=")[0] for line in build["build-args"].splitlines()}
    taken = {found.value.partition("=")[0] for stage in dockerfile.stages for found in stage.instructions}
    assert given <= taken


@pytest.mark.parametrize(("name", "prefix", "file"), [("image", "v", "."), ("client", "client-v", "client")])
def test_a_tag_that_is_not_the_version_is_refused(
    workflows: dict[str, Any], root: Path, name: str, prefix: str, file: str
) -> None:
    assert workflows[name]["on"]["push"]["tags"] == [f"{prefix}*.*.*"]
    steps = [step for job in workflows[name]["jobs"].values() for step in job.get("steps", [])]
    (command,) = [step["run"] for step in steps if step.get("name") == "The tag is the version"]
    own = version(root / file / "pyproject.toml")
    for tagged, status in ((own, 0), (f"{own}1", 1)):
        environment = {"GITHUB_REF_NAME": f"{prefix}{tagged}", "PATH": "/usr/bin:/bin"}
        result = subprocess.run(["bash", "-c", command], cwd=root, env=environment, check=False)
        assert result.returncode == status
