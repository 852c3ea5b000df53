"""``drorae import``: other libraries' weights to a checkpoint."""

import argparse
from pathlib import Path

import torch

from cli import files
from cli.errors import EXIT_OK, UsageError
from cli.options import Subparsers, add_command
from model.interop.assembly import Imported
from model.interop.from_diffusers import import_autoencoder
from model.interop.from_rae import RaeSources, import_rae
from model.interop.rae_decoder_weights import RAE_DECODERS
from model.interop.rae_generator import import_rae_generator

DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """\
Make a checkpoint of published weights, without downloading anything or running a pickle's code:

  FOLDER                    a folder of diffusers' AutoencoderRAE (DINOv2, SigLIP 2 or MAE), statistics
                            included; of an exported folder also the fusion
  --encoder, --decoder      a transformers folder of DINOv2 (with registers or without), SigLIP 2 or MAE,
                            and RAE's decoder model.pt; --statistics adds RAE's stat.pt
  --generator               RAE's DiT^DH, stage2_model.pt; --statistics adds the stat.pt of its latents

A tokenizer's checkpoint is a plain RAE: it serves at once, and phase 2 of training adds a fusion to it.
"""
EXAMPLES = """\
  drorae import RAE-dinov2-wReg-base-ViTXL-n08/ --output rae-b
  drorae import --encoder dinov2-with-registers-base/ --decoder model.pt --statistics stat.pt --output rae-b
  drorae import --encoder dinov2-large/ --new-decoder xl --output phase0-l     # phase 1 trains the decoder
  drorae import --generator DiTDH-XL/stage2_model.pt --statistics stat.pt --output dit-dh-xl
  drorae info rae-b
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "import", run, "published weights to a checkpoint", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="an AutoencoderRAE folder")
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="a transformers encoder's folder")
    parser.add_argument(
        "--decoder", type=Path, metavar="FILE", help="RAE's decoder: model.pt or .safetensors"
    )
    parser.add_argument(
        "--new-decoder",
        choices=tuple(RAE_DECODERS),
        help="instead of --decoder: one of RAE's architectures with random weights, to be trained",
    )
    parser.add_argument("--generator", type=Path, metavar="FILE", help="RAE's stage2_model.pt")
    parser.add_argument(
        "--statistics", type=Path, metavar="FILE", help="RAE's stat.pt: mean and variance of the latents"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the checkpoint's directory, a new one"
    )
    parser.add_argument("--name", help="name of the checkpoint (default that of its directory)")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the images in pixels (default what the decoder and the statistics are for, or 256)",
    )
    parser.add_argument(
        "--decoder-heads",
        type=int,
        metavar="N",
        help="attention heads of a decoder whose width is none of RAE's",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the stored weights (default float32)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Import; nothing is written before all of it has been read and checked."""
    _check_sources(arguments)
    files.check_new_folder(arguments.output)
    name = (arguments.name or arguments.output.resolve().name)[:100]
    if arguments.generator is not None:
        return _import_generator(arguments, name)
    imported = _import(arguments, name)
    tokenizer = imported.tokenizer
    info = tokenizer.save(arguments.output, getattr(torch, arguments.dtype), imported.provenance)
    for note in imported.notes:
        print(f"note: {note}")
    channels, rows, columns = tokenizer.config.latent_shape
    statistics = "with" if tokenizer.has_statistics else "without"
    fusion = "no fusion" if tokenizer.fusion is None else "a fusion"
    print(
        f"{arguments.output}: {info.name}, images of {tokenizer.config.image_size} pixels, latents "
        f"{channels} x {rows} x {columns} {statistics} statistics, {fusion}; sha256 {info.sha256}"
    )
    return EXIT_OK


def _import_generator(arguments: argparse.Namespace, name: str) -> int:
    imported = import_rae_generator(arguments.generator, statistics=arguments.statistics, name=name)
    generator = imported.generator
    info = generator.save(arguments.output, getattr(torch, arguments.dtype), imported.provenance)
    for note in imported.notes:
        print(f"note: {note}")
    config = generator.config
    channels, rows, columns = config.latent_shape
    print(
        f"{arguments.output}: {info.name}, {config.num_classes} classes, latents "
        f"{channels} x {rows} x {columns}, trunk {config.trunk_depth} x {config.trunk_width}, "
        f"head {config.head_depth} x {config.head_width}; sha256 {info.sha256}"
    )
    return EXIT_OK


def _import(arguments: argparse.Namespace, name: str) -> Imported:
    if arguments.folder is not None:
        return import_autoencoder(arguments.folder, name, arguments.statistics)
    sources = RaeSources(
        encoder=arguments.encoder,
        decoder=arguments.decoder or RAE_DECODERS[arguments.new_decoder],
        statistics=arguments.statistics,
        image_size=arguments.image_size,
        num_heads=arguments.decoder_heads,
    )
    return import_rae(sources, name)


def _check_sources(arguments: argparse.Namespace) -> None:
    parts = ("encoder", "decoder", "new_decoder", "image_size", "decoder_heads")
    given = [f"--{name.replace('_', '-')}" for name in parts if getattr(arguments, name) is not None]
    if arguments.generator is not None and (given or arguments.folder is not None):
        raise UsageError(f"{given[0] if given else 'FOLDER'} does not go with --generator")
    if arguments.generator is not None:
        return
    if arguments.folder is not None and given:
        raise UsageError(f"{given[0]} does not go with FOLDER, which holds encoder and decoder")
    if arguments.folder is None and arguments.encoder is None:
        raise UsageError("no weights are named: give an AutoencoderRAE FOLDER, or --encoder with --decoder")
    if arguments.folder is None and (arguments.decoder is None) == (arguments.new_decoder is None):
        raise UsageError("--encoder needs one decoder: --decoder FILE, or --new-decoder b, l or xl")
    for option, least in (("image_size", 8), ("decoder_heads", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise UsageError(f"--{option.replace('_', '-')} {value}: expected at least {least}")
    for folder in (arguments.folder, arguments.encoder):
        if folder is not None and not folder.is_dir():
            what = "is a file, and a folder is expected" if folder.exists() else "there is no such folder"
            raise UsageError(f"{folder}: {what}")
