"""The architecture: who may import whom, and the habits of every file. One test lists all violations at once.

A room is a folder of a package, or a file beside its folders. In a table a name may import whatever stands
right of it on its own line; a name that no line has is a violation too.
"""

import ast
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from tests.conftest import SLOW

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 399
MAX_FOLDER_ENTRIES = 14

PACKAGES = """
cli -> service, training -> model -> kernels
benchmarks -> service, training -> model -> kernels
benchmarks -> drorae_client
deploy -> service, drorae_client
"""
# Folders of packages that are not at the root: distributions of their own.
HOMES = {"drorae_client": "client"}
ROOMS = {
    "kernels": """
        resources, fused -> launches -> device_code
        fused, folded -> reference -> operands
        folded -> packed
        resources, fused -> dispatch
    """,
    "model": """
        interop, sampling -> generator -> tokenizer -> checkpoints, networks, images -> config, errors
        generator -> spelling
        cuda_graphs, process
    """,
    "service": """
        __main__ -> server -> app -> api -> codecs -> codecs/json, photos -> telemetry -> settings, errors
        app, server, api -> http -> telemetry
        app, server, api -> engine -> telemetry
        server -> processes/fronts -> engine, processes, telemetry -> settings, errors
        app -> pages -> codecs
        http, engine -> settings, errors
        __main__, app, api, photos -> processes
    """,
    "training": """
        run -> studies, planning -> phases -> data/crops, latents/reading -> latents -> evaluation -> data
        run, studies, planning, phases, evaluation -> losses
        latents/on_ray -> latents -> latents/storage -> data -> errors
        run, studies, planning, phases, data/crops, latents/reading -> distributed, recipes, output -> errors
        latents, evaluation, data, losses -> distributed, recipes, output -> errors
    """,
    "cli": """
        main -> parser -> commands -> hub, photos -> files, options -> errors
        parser -> commands/generators -> remote, samples, latents -> files, options -> errors
        parser -> commands/latents -> photos, latents -> files, options -> errors
    """,
    "benchmarks": """
        latents, sizing -> serving -> faults -> faults/fuzz -> probes -> harness
        fusion, tokenizer, training -> cases -> harness
    """,
    "drorae_client": """
        __main__ -> command -> client, async_client -> connections -> attempts -> wire -> errors
        __init__ -> client, async_client -> many -> wire -> errors
    """,
    "deploy": """
        checks, ray_serve -> clients
    """,
}
# Files of these rooms do not import one another.
SEPARATE = {"cli/commands", "cli/commands/generators", "cli/commands/latents"}
# Which packages and rooms may import a library that says something of its user.
LIBRARIES = {
    "fastapi": "benchmarks",
    "starlette": "service/app service/server service/api service/http service/pages benchmarks",
    "uvicorn": "service/server service/http benchmarks",
    "httptools": "service/http",
    "cykooz_resizer": "model/images",
    "httpx": "cli/remote drorae_client benchmarks",
    "opentelemetry": "service/telemetry",
    "prometheus_client": "service/telemetry service/api benchmarks",
    "huggingface_hub httpx2": "cli/hub",
    "triton": "kernels benchmarks",
    "ray": "training/latents/on_ray deploy/ray_serve",
    "fsspec upath": "training/latents/storage",
    "tensorboard": "training/output",
    "matplotlib": "training/output training/studies benchmarks",
}
# Violations that are being removed. An entry that is none any more fails the test, so the list only shrinks.
PENDING: set[str] = set()


def test_the_sources_keep_to_the_architecture():
    found = set(violations(ROOT))
    new, gone = sorted(found - PENDING), sorted(PENDING - found)
    assert not new, "\n".join(["violations:", *new])
    assert not gone, "\n".join(["no violations any more, so take them out of PENDING:", *gone])


def test_what_is_marked_slow_is_there():
    assert [name for name in SLOW if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.parametrize(
    ("files", "violation"),
    [
        ({"model/tokenizer.py": "import service.app"}, "model/tokenizer.py: model may not import service"),
        ({"service/engine/engine.py": "def f(): from service.api import x"}, "engine may not import api"),
        ({"model/config.py": "from model import errors"}, "model/config.py: config may not import errors"),
        ({"model/new.py": ""}, "model: no line of ROOMS has new"),
        ({"cli/hub/a.py": "import cli.hub.b", "cli/hub/b.py": "import cli.hub.a"}, "import circle"),
        ({"cli/commands/a.py": "import cli.commands.b", "cli/commands/b.py": ""}, "keep apart"),
        ({"service/engine/engine.py": "import fastapi.routing"}, "service/engine may not import fastapi"),
        ({"model/config.py": "from . import errors"}, "model/config.py:1: relative import"),
        ({"model/config.py": "from os import *"}, "model/config.py:1: star import"),
        ({"model/config.py": "try: ...\nexcept: ..."}, "model/config.py:2: bare except"),
        ({"model/config.py": "import sys\nsys.path.append('')"}, "model/config.py:2: sys.path"),
        ({"tests/test_x.py": "import sys\nsys.path.append('')"}, "tests/test_x.py:2: sys.path"),
        ({"model/config.py": "\n" * 400}, "model/config.py: 400 lines"),
        ({f"cli/hub/{letter}.py": "" for letter in "abcdefghijklmno"}, "cli/hub: 15 entries"),
        ({"cli/hub/a.py": "", "cli/hub/a_report.py": ""}, "cli/hub: a, a_report"),
        ({"tests/cli/nowhere/test_x.py": ""}, "tests/cli/nowhere: mirrors no folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_sees_its_violation(tmp_path, files, violation):
    for package in ROOMS:
        (tmp_path / package).mkdir()
    (tmp_path / "tests").mkdir()
    for name, text in {"model/errors.py": "", "service/app.py": "", "service/api/x.py": "", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert any(violation in found for found in violations(tmp_path))


def violations(root: Path) -> Iterator[str]:
    """All violations below a folder that has the packages, each as one line."""
    trees = {
        str(file.relative_to(home_of(top, root))): parse(file)
        for top in ROOMS
        for file in (home_of(top, root) / top).rglob("*.py")
    }
    tests = {str(file.relative_to(root)): parse(file) for file in (root / "tests").rglob("*.py")}
    imports = {name: set(imported(tree)) for name, tree in trees.items()}
    graph = {
        name: {file for target in names if (file := file_of(target, trees))}
        for name, names in imports.items()
    }
    yield from wrong_edges(graph)
    yield from unplaced_rooms(trees)
    yield from circles(graph)
    yield from wrong_libraries(imports)
    for name, tree in trees.items():
        yield from bad_habits(name, tree)
        num_lines = len((home_of(name, root) / name).read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            yield f"{name}: {num_lines} lines"
    for name, tree in tests.items():
        yield from (line for line in bad_habits(name, tree) if "sys.path" in line)
    for folder in {Path(name).parent for name in trees}:
        yield from crowded(home_of(str(folder), root), folder)
    for folder in {Path(name).parent.relative_to("tests") for name in tests}:
        if not (root / folder).is_dir():
            yield f"tests/{folder}: mirrors no folder of the sources"


def home_of(name: str, root: Path) -> Path:
    """The folder that holds a file's package."""
    return root / HOMES.get(package_of(name), "")


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that is imported, inside functions too; of ``from a import b`` it is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def file_of(target: str, trees: dict[str, ast.Module]) -> str:
    """The file that an import reads: a module, a package, or where the name is defined; "" for others'."""
    path = target.replace(".", "/")
    parent = path.rpartition("/")[0]
    candidates = (f"{path}.py", f"{path}/__init__.py", f"{parent}.py", f"{parent}/__init__.py")
    return next((candidate for candidate in candidates if candidate in trees), "")


def room_of(name: str) -> str:
    """Of a file: ``api`` of ``service/api/routes.py``, ``app`` of ``service/app.py``."""
    path = Path(name).relative_to(Path(name).parts[0])
    return str(path.with_suffix("")) if len(path.parts) == 1 else str(path.parent)


def package_of(name: str) -> str:
    return name.partition("/")[0]


def allowed(table: str) -> dict[str, set[str]]:
    """A table as edges: each name with those that it may import."""
    edges: dict[str, set[str]] = {}
    for line in table.strip().splitlines():
        groups = [[name.strip() for name in group.split(",")] for group in line.split("->")]
        for index, group in enumerate(groups):
            for name in group:
                edges.setdefault(name, set()).update(*groups[index + 1 :])
    return edges


def wrong_edges(graph: dict[str, set[str]]) -> Iterator[str]:
    packages, rooms = allowed(PACKAGES), {package: allowed(table) for package, table in ROOMS.items()}
    for name, targets in graph.items():
        package, room = package_of(name), room_of(name)
        for target in targets - {name}:
            other, other_room = package_of(target), room_of(target)
            if package != other:
                if other not in packages[package]:
                    yield f"{name}: {package} may not import {other}"
            elif room != other_room and other_room not in {*rooms[package].get(room, ()), "__init__"}:
                yield f"{name}: {room} may not import {other_room}"
            elif room == other_room and f"{package}/{room}" in SEPARATE:
                yield f"{name}: files of {package}/{room} keep apart, and this imports {target}"


def unplaced_rooms(trees: dict[str, ast.Module]) -> Iterator[str]:
    for package, table in ROOMS.items():
        there = {room_of(name) for name in trees if package_of(name) == package} - {"__init__"}
        yield from (f"{package}: no line of ROOMS has {room}" for room in sorted(there - set(allowed(table))))


def circles(graph: dict[str, set[str]]) -> Iterator[str]:
    reached = {name: reachable(name, graph) for name in graph}
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    yield from (f"import circle: {', '.join(sorted(circle))}" for circle in found if circle)


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Files that importing one brings along; the file itself only where a circle leads back to it."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def wrong_libraries(imports: dict[str, set[str]]) -> Iterator[str]:
    homes = {library: places.split() for names, places in LIBRARIES.items() for library in names.split()}
    for name, targets in imports.items():
        room = f"{package_of(name)}/{room_of(name)}"
        for library in {target.partition(".")[0] for target in targets} & set(homes):
            if not any(f"{room}/".startswith(f"{home}/") for home in homes[library]):
                yield f"{name}: {room} may not import {library}"


def bad_habits(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(level=level) if level:
                yield f"{name}:{node.lineno}: relative import"
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                yield f"{name}:{node.lineno}: star import"
            case ast.ExceptHandler(type=None):
                yield f"{name}:{node.lineno}: bare except"
            case ast.Attribute(value=ast.Name(id="sys"), attr="path"):
                yield f"{name}:{node.lineno}: sys.path"


def crowded(root: Path, folder: Path) -> Iterator[str]:
    """More in a folder than a glance takes in, or names that differ by a suffix alone."""
    entries = [
        entry for entry in (root / folder).iterdir() if not entry.name.startswith((".", "__pycache__"))
    ]
    if len(entries) > MAX_FOLDER_ENTRIES:
        yield f"{folder}: {len(entries)} entries"
    modules = {entry.stem for entry in entries if entry.suffix == ".py" or entry.is_dir()}
    for short, long in permutations(sorted(modules), 2):
        if long.startswith(short):
            yield f"{folder}: {short}, {long} differ by a suffix"
