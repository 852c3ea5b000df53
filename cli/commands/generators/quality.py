"""``drorae evaluate-generation``: quality of generated images beside real ones."""

import argparse
import json
from pathlib import Path
from typing import Any

from cli.errors import EXIT_OK, CommandError, UsageError
from cli.options import Subparsers, add_command, check_photos, positive_int

NUM_NEIGHBOURS_SHOWN = 12
DESCRIPTION = """\
Compare generated images with real ones: Frechet distance, precision and recall in EfficientNet-Lite0's
features, and FID, Inception score, precision and recall (ADM's definitions) where FID's weights are here.
With --train also the accuracy of a linear probe, trained on real photos, on the samples' classes (the folders
that `drorae generate` makes), and how near samples come to training images.
"""
EXAMPLES = """\
  drorae evaluate-generation samples/ --reference caltech12-256-val.tar --train caltech12-256-00*.tar
  drorae evaluate-generation samples/ --reference VIRTUAL_imagenet256_labeled.npz --output report/
  drorae evaluate-generation samples/ --reference val/ --npz samples.npz       for ADM's own evaluator
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "evaluate-generation", run, "quality of generated images", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="a folder, tar or npz of samples")
    parser.add_argument(
        "--reference", type=Path, nargs="+", required=True, metavar="DIR|TAR|NPZ", help="real images"
    )
    parser.add_argument(
        "--train", type=Path, nargs="+", default=[], metavar="DIR|TAR", help="labelled training images"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also write report.json and neighbours.png"
    )
    parser.add_argument("--npz", type=Path, metavar="FILE", help="also write the samples for ADM's evaluator")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="FID's Inception")
    parser.add_argument(
        "--image-size", type=positive_int, default=256, metavar="S", help="pixels a side (default 256)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="(default 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print JSON."""
    check_photos([arguments.samples, *arguments.reference, *arguments.train])
    if arguments.output is not None and arguments.output.is_file():
        raise UsageError(f"{arguments.output} is a file: --output names a directory")
    try:
        from training.distributed.device import resolve_device
        from training.evaluation.generation import GenerationQuality, GenerationSets, read_pictures, write_npz
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"evaluation needs the package {exc.name!r}: pip install 'drorae[training]'"
        ) from exc
    side, reference = arguments.image_size, arguments.reference
    sets = GenerationSets(
        samples=read_pictures("samples", [arguments.samples], side),
        reference=read_pictures("reference", reference, side),
        train=read_pictures("train", arguments.train, side) if arguments.train else None,
        train_paths=arguments.train,
        adm_file=reference[0] if reference[0].suffix == ".npz" else None,
    )
    quality = GenerationQuality(
        sets, resolve_device(arguments.device), arguments.batch_size, arguments.inception_weights
    )
    report = quality.measure()
    if arguments.npz is not None:
        write_npz(sets.samples, arguments.npz)
    if arguments.output is not None:
        _write(arguments.output, report, quality)
    print(json.dumps(report, indent=2))
    return EXIT_OK


def _write(folder: Path, report: dict[str, Any], quality: Any) -> None:
    from training.output.files import write_json
    from training.output.grids import save_image

    write_json(folder / "report.json", report)
    if quality.neighbours is not None:
        save_image(quality.neighbour_grid(NUM_NEIGHBOURS_SHOWN), folder / "neighbours.png")
