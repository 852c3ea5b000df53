"""``drorae encode``: photos to a file of latents, just as the service answers them.

Shape legend: N photos, C h w one latent, S image side.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from cli import files
from cli.errors import UsageError
from cli.latents import NAMES_ENTRY
from cli.options import MODEL_FIELDS, Subparsers, add_command, add_settings, read_settings
from service.codecs.answers import Origin, latents_answer
from service.codecs.media_types import NPY, SAFETENSORS
from service.codecs.schemas import EncodeOptions
from service.engine.devices import load_tokenizer

MEDIA_TYPES = {".safetensors": SAFETENSORS, ".npy": NPY}
EXAMPLES = """\
  drorae encode photo.jpg -o latents.safetensors
  drorae encode photos/ one-more.png -o latents.npy --dtype float32
  drorae encode photo.jpg -o base.safetensors --latent base
  curl -s https://example.com/photo.jpg | drorae encode - -o - > latents.safetensors

The file can be decoded with `drorae decode`, or sent to /decode of a service of the same checkpoint.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "encode",
        run,
        "photos to a file of latents",
        "Encode photos into one tensor [N, C, h, w], in the order given; a folder's photos by name.\n"
        "A .safetensors file also carries which checkpoint made it and, of several photos, their names;\n"
        "a .npy file is the bare numbers.\n"
        "A photo that cannot be read is named and left out of the tensor; the exit status is then 3.",
        EXAMPLES,
    )
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="IN", help="photos, folders or tars of them; - for stdin"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors or .npy file; - for safetensors on stdout",
    )
    files.add_image_options(parser)
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="normalise per position by the checkpoint's statistics (drorae info says if it has any)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="type of the numbers (default float16)",
    )
    add_settings(parser, MODEL_FIELDS)


def run(arguments: argparse.Namespace) -> int:
    """Encode; 3 when some photos could not be read."""
    from cli import photos  # with training's listing, which serving does not need

    settings = read_settings(arguments)
    output: Path = arguments.output
    files.check_output_file(output, tuple(MEDIA_TYPES))
    media_type = SAFETENSORS if output == files.STANDARD_STREAM else MEDIA_TYPES[output.suffix.lower()]
    if arguments.dtype == "bfloat16" and media_type == NPY:
        raise UsageError(f"{output}: the .npy format has no bfloat16; use --dtype float32 or .safetensors")
    samples = photos.expand_inputs(arguments.inputs)
    tokenizer = load_tokenizer(settings)
    rules = files.image_rules(settings, tokenizer.config.image_size, arguments.fit)
    has_several = len(arguments.inputs) > 1 or photos.is_collection(arguments.inputs[0])
    reader = photos.PhotoReader(rules, has_several)
    encoded: list[Tensor] = []
    names: list[str] = []
    for read, images_B3SS in reader.batches(samples, settings.batch_size, "encode"):
        names += (photos.short_name(sample) for sample in read)
        latents_BChw = tokenizer.encode(images_B3SS, arguments.latent, arguments.normalize)
        encoded.append(latents_BChw.float().cpu())
    latents_NChw = torch.cat(encoded)
    options = EncodeOptions(dtype=arguments.dtype, latent=arguments.latent, normalize=arguments.normalize)
    keys = {NAMES_ENTRY: json.dumps(names)} if has_several else None
    answer = latents_answer(latents_NChw, media_type, options, Origin.of(tokenizer), keys)
    files.write_file(output, answer.content)
    skipped = f", {reader.num_broken} photos skipped" if reader.num_broken else ""
    shape = list(latents_NChw.shape)
    files.say(f"{output}: {arguments.latent} latents {shape}, {arguments.dtype}{skipped}", output)
    return reader.status
