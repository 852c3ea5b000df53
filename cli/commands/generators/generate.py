"""``drorae generate``: new images from a generator."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cli import files
from cli.errors import EXIT_OK, UsageError
from cli.latents import NAMES_ENTRY
from cli.options import Subparsers, add_command, positive_int, whole_number
from cli.samples import SampleFolder, SampleSource, SamplingOptions, sample_name
from model.config import PRESETS
from model.generator import Generator
from model.images.tensors import to_tensor
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from training.distributed.ranks import Ranks

Decode = Callable[[Tensor], Tensor]
KEY_VARIABLE = "DRORAE_API_KEY"
DEFAULT_COLUMNS = 4
LATENTS_SUFFIX = ".safetensors"
GUIDE_SCALE = 1.5
DESCRIPTION = """\
Draw samples from a generator and decode them. The output is a folder of pictures (CLASS/NUMBER.png), one
picture with a row per class, or a file of latents that `drorae decode` and the service take. A folder can be
added to: a command that was cut off goes on when it is given again, under torchrun on any number of ranks.
"""
EXAMPLES = """\
  drorae generate dit-dh-mini --points 12 --scale 5 --output grid.png
  drorae generate CHECKPOINT --classes sunflower watch --num 8 --output grid.png
  drorae generate CHECKPOINT --num 50000 --guide GUIDE --scale 1.5 --output samples/
  drorae generate CHECKPOINT --num 16 --output latents.safetensors
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "generate", run, "new images from a generator", DESCRIPTION, EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a generator: a directory or a bundled name")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="OUT", help="as above")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="names or numbers, which take turns (default: all)"
    )
    parser.add_argument(
        "--num", type=positive_int, metavar="N", help=f"samples in all (default: {DEFAULT_COLUMNS} per class)"
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="of the noise (default 0)")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="decodes the latents (default: the bundled one of its name)"
    )
    parser.add_argument(
        "--decode-at",
        metavar="URL",
        help=f"let a running service decode the latents (its key: {KEY_VARIABLE} in the environment)",
    )
    parser.add_argument(
        "--force", action="store_true", help="decode by another tokenizer than the generator was trained on"
    )
    parser.add_argument(
        "--format", choices=("png", "jpg", "webp"), default="png", help="of a folder's pictures (default png)"
    )
    _add_sampling(parser)
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="(default 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of products (default float32)"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler",
        choices=("euler", "midpoint", "heun", "sde", "gaussian"),
        default="euler",
        help="of the ODE, or of the SDE (default euler); gaussian: the noise itself, a baseline",
    )
    group.add_argument(
        "--points",
        type=positive_int,
        default=250,
        metavar="K",
        help="of the time grid (default 250; RAE: 50)",
    )
    group.add_argument(
        "--final-step",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the ODE go on from the grid's end to t = 0 (default; RAE does not)",
    )
    group.add_argument("--shift", type=float, metavar="S", help="of the times (default: the generator's)")
    group.add_argument("--guide", metavar="DIR", help="a weaker generator: AutoGuidance")
    group.add_argument(
        "--scale",
        type=float,
        metavar="W",
        help=f"of the guidance: with a guide AutoGuidance (default {GUIDE_SCALE}), else classifier-free "
        "(default 1: none)",
    )
    group.add_argument(
        "--interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar="T",
        help="times at which guidance is on; 1 is noise (default 0 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Generate; the ranks of torchrun share a folder out."""
    from training.distributed.ranks import process_group

    output: Path = arguments.output
    is_folder = not output.suffix
    if not is_folder:
        files.check_output_file(output, (*files.PICTURE_FORMATS, LATENTS_SUFFIX))
    with process_group(arguments.device) as ranks:
        if ranks.size > 1 and not is_folder:
            raise UsageError(f"{output}: several ranks share a folder out, not a file")
        job = _prepare(arguments)
        if is_folder:
            job.fill_folder(output, f".{arguments.format}", ranks)
        elif output.suffix == LATENTS_SUFFIX:
            job.write_latents(output)
        else:
            job.write_grid(output)
    return EXIT_OK


def _prepare(arguments: argparse.Namespace) -> "_Job":
    from training.distributed.device import resolve_device

    device, dtype = resolve_device(arguments.device), getattr(torch, arguments.dtype)
    generator = Generator.load(arguments.checkpoint, device, dtype)
    guide = Generator.load(arguments.guide, device, dtype) if arguments.guide else None
    if guide is not None and not arguments.force:
        generator.check_guide(guide)
    source = SampleSource(generator, guide, _read_options(arguments, generator))
    num = arguments.num or DEFAULT_COLUMNS * len(source.options.classes)
    if arguments.decode_at:
        return _Job(source, num, arguments.batch_size, _remote_decoder(arguments, generator), None)
    tokenizer = _load_tokenizer(arguments, generator, device)
    sha256 = tokenizer.checkpoint.sha256 if tokenizer.checkpoint else None
    return _Job(source, num, arguments.batch_size, tokenizer.decode, sha256)


def _read_options(arguments: argparse.Namespace, generator: Generator) -> SamplingOptions:
    classes = tuple(range(generator.config.num_classes))
    if arguments.classes is not None:
        classes = tuple(generator.class_indices(_class_words(arguments.classes, generator)))
    if not classes:
        raise UsageError("--classes names no class")
    default_scale = GUIDE_SCALE if arguments.guide else 1.0
    return SamplingOptions(
        classes,
        scale=default_scale if arguments.scale is None else arguments.scale,
        interval=tuple(arguments.interval),
        sampler=arguments.sampler,
        num_points=arguments.points,
        final_step=arguments.final_step,
        shift=arguments.shift,
        seed=arguments.seed,
    )


def _class_words(given: Sequence[str], generator: Generator) -> list[str]:
    """Names may hold commas themselves; else commas part them."""
    words: list[str] = []
    for item in given:
        parts = [item] if item in generator.trained_on.class_names else item.split(",")
        words += [part.strip() for part in parts if part.strip()]
    return words


def _load_tokenizer(arguments: argparse.Namespace, generator: Generator, device: torch.device) -> Tokenizer:
    name = arguments.tokenizer or generator.trained_on.tokenizer_name
    if name is None or (arguments.tokenizer is None and name not in PRESETS):
        raise UsageError(f"--tokenizer is missing: the generator was trained on the latents of {name!r}")
    tokenizer = Tokenizer.load(name, device, fusion="reference")  # decoding needs no fusion
    if not arguments.force:
        generator.check_tokenizer(tokenizer)
    return tokenizer


def _remote_decoder(arguments: argparse.Namespace, generator: Generator) -> Decode:
    from cli.remote import RemoteDecoder

    sha256 = None if arguments.force else generator.trained_on.tokenizer_sha256
    metadata = {"normalized": "false", **({"checkpoint_sha256": sha256} if sha256 else {})}
    return RemoteDecoder(arguments.decode_at, metadata, os.environ.get(KEY_VARIABLE))


@dataclass(frozen=True)
class _Job:
    """What is generated, and how it is decoded."""

    source: SampleSource
    num: int
    batch_size: int
    decode: Decode
    tokenizer_sha256: str | None

    def fill_folder(self, path: Path, suffix: str, ranks: "Ranks") -> None:
        """Write the samples that the folder lacks; this rank's share of them."""
        source = self.source
        folder = SampleFolder(path, self._names(), suffix)
        if ranks.is_main:
            folder.open({**source.identity(), "tokenizer_sha256": self.tokenizer_sha256})
        ranks.barrier()
        missing = [i for i in range(self.num) if not folder.file(i, source.label(i)).exists()]
        ranks.barrier()  # all have looked before any writes
        mine = missing[ranks.rank :: ranks.size]
        for indices in files.batches(mine, self.batch_size, "generate", "sample"):
            pictures = self.decode(source.latents(indices)).float().cpu()
            for index, pixels in zip(indices, pictures, strict=True):
                folder.write(index, source.label(index), pixels)
        ranks.barrier()
        if ranks.is_main:
            print(f"{path}: {self.num} samples, {len(missing)} of them new")

    def write_grid(self, path: Path) -> None:
        """One row of pictures per class."""
        from training.output.grids import reconstruction_grid

        classes = self.source.options.classes
        num = -(-self.num // len(classes)) * len(classes)  # rows are equally long
        pictures = self._collect(num, self.decode)
        rows = [pictures[row :: len(classes)] for row in range(len(classes))]
        grid = reconstruction_grid(rows, [self._names()[label] for label in classes])
        files.write_picture_file(path, to_tensor(grid))
        files.say(f"{path}: {num} samples of {len(classes)} classes", path)

    def write_latents(self, path: Path) -> None:
        """As `drorae encode` writes them, with names (CLASS/NUMBER) and labels in the metadata."""
        from service.codecs import tensors

        latents = self._collect(self.num, lambda latents: latents)
        names, labels = self._names(), [self.source.label(index) for index in range(self.num)]
        trained_on, info = self.source.generator.trained_on, self.source.generator.info
        metadata = {
            "model": trained_on.tokenizer_name,
            "checkpoint_sha256": trained_on.tokenizer_sha256,
            "normalized": "false",
            "latent": trained_on.latent,
            NAMES_ENTRY: json.dumps([sample_name(names[label], index) for index, label in enumerate(labels)]),
            "labels": json.dumps(labels),
            "generator": self.source.generator.config.name,
            "generator_sha256": info.sha256 if info else None,
        }
        known = {key: value for key, value in metadata.items() if value is not None}
        narrowed = tensors.narrow(latents, torch.float16)
        files.write_file(path, tensors.write_safetensors("latents", narrowed, known))
        files.say(f"{path}: latents {list(latents.shape)}, float16", path)

    def _collect(self, num: int, change: Decode) -> Tensor:
        return torch.cat(
            [
                change(self.source.latents(indices)).float().cpu()
                for indices in files.batches(range(num), self.batch_size, "generate", "sample")
            ]
        )

    def _names(self) -> list[str]:
        """Names of the classes, or their numbers."""
        generator = self.source.generator
        names = generator.trained_on.class_names
        return list(names) or [f"{number:04d}" for number in range(generator.config.num_classes)]
