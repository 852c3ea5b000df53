"""What a Dockerfile says: its stages and their instructions, with arguments substituted as a builder does.

It reads what this project's Dockerfile uses, and refuses the rest rather than skip it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Instructions that change the image's metadata alone, and those that a replay has to carry out.
METADATA = frozenset({"CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL"})
ACTIONS = frozenset({"ARG", "COPY", "ENV", "RUN", "USER", "WORKDIR"})

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_PAIR = re.compile(r"(\w[\w.]*)=(\"(?:[^\"\\]|\\.)*\"|\S*)")


class DockerfileError(ValueError):
    """The file says something that is not understood here."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, continuation lines joined.

    Attributes:
        keyword: in capitals.
        value: the rest, as written.
        line: where it begins, from 1.
    """

    keyword: str
    value: str
    line: int


@dataclass
class Stage:
    """A stage: ``FROM base AS name`` and what follows."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, keyword: str) -> str | None:
        """The value of the last instruction of a kind, which is the one that counts."""
        values = [found.value for found in self.instructions if found.keyword == keyword]
        return values[-1] if values else None


@dataclass
class Dockerfile:
    """Arguments before the first ``FROM``, and the stages in order."""

    arguments: dict[str, str]
    stages: list[Stage]

    def stage(self, name: str) -> Stage:
        """A stage by its name.

        Raises:
            DockerfileError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise DockerfileError(f"no stage is called {name!r}")

    def lineage(self, name: str) -> list[Stage]:
        """The stage and those it is built from, the oldest first."""
        stage = self.stage(name)
        names = {other.name for other in self.stages}
        return [*(self.lineage(stage.base) if stage.base in names else []), stage]

    def external_base(self, name: str) -> str:
        """The image that a stage begins with in the end."""
        return self.lineage(name)[0].base

    def needed(self, target: str) -> list[str]:
        """Names of the stages that a target is made of, in the file's order, itself the last."""
        wanted: set[str] = set()
        pending = [target]
        while pending:
            lineage = self.lineage(pending.pop())
            for stage in lineage:
                if stage.name not in wanted:
                    wanted.add(stage.name)
                    pending += [copy.source_stage for copy in copies(stage) if copy.source_stage]
        return [stage.name for stage in self.stages if stage.name in wanted]


@dataclass(frozen=True)
class Copy:
    """A ``COPY``: from the context, or from another stage."""

    sources: tuple[str, ...]
    target: str
    source_stage: str = ""


def parse_dockerfile(text: str) -> Dockerfile:
    """Read a Dockerfile.

    Raises:
        DockerfileError: an instruction that is not known here.
    """
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            base, _, name = instruction.value.partition(" AS ")
            stages.append(Stage(substitute(base.strip(), arguments), name.strip() or str(len(stages))))
        elif not stages:
            if instruction.keyword != "ARG":
                raise DockerfileError(f"line {instruction.line}: {instruction.keyword} before FROM")
            arguments.update(assignments(instruction.value))
        elif instruction.keyword in METADATA | ACTIONS:
            stages[-1].instructions.append(instruction)
        else:
            raise DockerfileError(f"line {instruction.line}: {instruction.keyword} is not known here")
    return Dockerfile(arguments, stages)


def substitute(text: str, values: Mapping[str, str]) -> str:
    """``$NAME`` and ``${NAME}`` replaced; what is not known becomes empty, as a builder has it."""
    return _VARIABLE.sub(lambda match: values.get(match[1] or match[2], ""), text)


def assignments(value: str) -> dict[str, str]:
    """The pairs of an ``ENV``, ``LABEL`` or ``ARG``; an ARG without default has none."""
    return {name: text.strip('"') for name, text in _PAIR.findall(value)}


def copies(stage: Stage) -> list[Copy]:
    """The stage's ``COPY`` instructions."""
    return [copy_of(found) for found in stage.instructions if found.keyword == "COPY"]


def copy_of(instruction: Instruction) -> Copy:
    """What a ``COPY`` copies.

    Raises:
        DockerfileError: it has a flag other than ``--from``.
    """
    words = instruction.value.split()
    flags = [word for word in words if word.startswith("--")]
    paths = [word for word in words if not word.startswith("--")]
    unknown = [flag for flag in flags if not flag.startswith("--from=")]
    if unknown or len(paths) < 2:
        raise DockerfileError(f"line {instruction.line}: COPY {instruction.value}")
    source_stage = flags[0].removeprefix("--from=") if flags else ""
    return Copy(tuple(paths[:-1]), paths[-1], source_stage)


def exec_form(value: str | None) -> list[str]:
    """The words of an ``ENTRYPOINT``, or of a ``HEALTHCHECK``'s command, in exec form.

    Raises:
        DockerfileError: it is in shell form, or missing.
    """
    text = (value or "").partition("CMD ")[2] if "CMD [" in (value or "") else value or ""
    try:
        words = json.loads(text)
    except json.JSONDecodeError as exc:
        raise DockerfileError(f"not in exec form: {text}") from exc
    return [str(word) for word in words]


def _instructions(text: str) -> list[Instruction]:
    found = []
    pending, begin = "", 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        begin = begin or number
        if line.endswith("\\"):
            pending += line[:-1]
            continue
        keyword, _, value = (pending + line).partition(" ")
        found.append(Instruction(keyword.upper(), value.strip(), begin))
        pending, begin = "", 0
    if pending:
        raise DockerfileError(f"line {begin}: the last instruction does not end")
    return found
