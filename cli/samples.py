"""Numbered samples of a generator: what makes each one, and the folder that they are collected in.

Sample i has the class ``classes[i % len(classes)]`` and noise of its own, so that it is the same whichever
batch, rank or attempt makes it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cli import files
from cli.errors import UsageError
from model.errors import LatentError
from model.generator import Generator
from model.sampling import Auto, ClassifierFree, Guidance, Method, sample_noise, sample_ode, sample_sde

SAMPLES_FILE = "samples.json"
SamplerName = Literal["euler", "midpoint", "heun", "sde", "gaussian"]


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn.

    Attributes:
        classes: labels, in turn.
        scale: of the guidance; up to 1 there is none without a guide.
        interval: times at which it is on.
        sampler: a method of the ODE, ``sde``, or ``gaussian``: the noise itself, which has the latents'
            statistics and nothing else; the baseline that a generator must beat.
        num_points: of the time grid.
        final_step: whether the ODE goes on from the grid's end to data.
        shift: of the times; None for the generator's.
        seed: of the noise.
    """

    classes: tuple[int, ...]
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    sampler: SamplerName = "euler"
    num_points: int = 250
    final_step: bool = True
    shift: float | None = None
    seed: int = 0


class SampleSource:
    """Makes the samples of given numbers."""

    def __init__(self, generator: Generator, guide: Generator | None, options: SamplingOptions) -> None:
        """Check that the parts go together.

        Raises:
            LatentError: the generator has no statistics, so nothing can decode its latents.
            SamplingError: a scale or interval that cannot be.
        """
        if not generator.has_statistics:
            raise LatentError(
                f"generator {generator.config.name!r} has no latent statistics, so its latents cannot be "
                "decoded: import them with it (stat.pt)"
            )
        self.generator = generator
        self.options = options
        self.shift = options.shift or generator.trained_on.shift
        self.guidance: Guidance | None = None
        if guide is not None:
            self.guidance = Auto(guide, options.scale, options.interval)
        elif options.scale != 1:
            self.guidance = ClassifierFree(options.scale, options.interval)

    def identity(self) -> dict[str, Any]:
        """What decides a sample of a given number; plain values."""
        guide = self.guidance.guide if isinstance(self.guidance, Auto) else None
        return {
            "generator_sha256": _sha256(self.generator),
            "guide_sha256": _sha256(guide) if isinstance(guide, Generator) else None,
            "class_names": list(self.generator.trained_on.class_names),
            **asdict(self.options),
            "shift": self.shift,
        }

    def label(self, index: int) -> int:
        """The class of a sample."""
        return self.options.classes[index % len(self.options.classes)]

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Raw latents [B, C, h, w] float32 of numbered samples, on the generator's device."""
        options, shape = self.options, self.generator.config.latent_shape
        noise = sample_noise(options.seed, indices, shape).to(self.generator.device)
        labels = torch.tensor([self.label(index) for index in indices], device=self.generator.device)
        if options.sampler == "gaussian":
            normalized = noise
        elif options.sampler == "sde":
            normalized = sample_sde(
                self.generator,
                noise,
                labels,
                lambda step: sample_noise(options.seed, indices, shape, draw=step),
                options.num_points,
                self.shift,
                self.guidance,
            )
        else:
            method: Method = options.sampler
            normalized = sample_ode(
                self.generator,
                noise,
                labels,
                options.num_points,
                self.shift,
                self.guidance,
                method=method,
                final_step=options.final_step,
            )
        return self.generator.denormalize_latents(normalized)


class SampleFolder:
    """A folder of pictures, ``CLASS/NUMBER.png``, that can be added to.

    ``samples.json`` says what made them; a folder of others is refused.
    """

    def __init__(self, path: Path, names: Sequence[str], suffix: str) -> None:
        self.path = path
        self.names = [name.replace("/", "_") for name in names]
        self.suffix = suffix

    def open(self, identity: Mapping[str, Any]) -> None:
        """Begin, or go on with what is there.

        Raises:
            UsageError: the folder holds something else, or samples of another kind; says which.
            CommandError: it cannot be written to.
        """
        files.make_folder(self.path)
        file = self.path / SAMPLES_FILE
        identity = json.loads(json.dumps(identity))
        if file.exists():
            found = _read_identity(file)
            changed = sorted(name for name in {*identity, *found} if identity.get(name) != found.get(name))
            if changed:
                raise UsageError(
                    f"{self.path} holds samples with another {', '.join(changed)}: name another folder"
                )
        elif any(self.path.iterdir()):
            raise UsageError(f"{self.path} holds something and no {SAMPLES_FILE}: name another folder")
        else:
            files.write_file(file, (json.dumps(identity, indent=2) + "\n").encode())

    def file(self, index: int, label: int) -> Path:
        """Where a sample goes."""
        return self.path / f"{sample_name(self.names[label], index)}{self.suffix}"

    def write(self, index: int, label: int, pixels: Tensor) -> None:
        """Write one picture, [3, S, S] in [0, 1], whole or not at all."""
        file = self.file(index, label)
        files.make_folder(file.parent)
        files.write_picture_file(file, pixels)


def sample_name(class_name: str, index: int) -> str:
    """``CLASS/NUMBER``, as folders and files of latents name a sample."""
    return f"{class_name}/{index:06d}"


def _sha256(generator: Generator) -> str | None:
    return generator.info.sha256 if generator.info else None


def _read_identity(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"{file}: not readable, so nothing is added to its folder") from exc
    if not isinstance(found, dict):
        raise UsageError(f"{file}: not readable, so nothing is added to its folder")
    return found
