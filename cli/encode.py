"""``drorae encode``: photos to a file of latents, just as the service answers them.

Shape legend: N photos, C h w one latent, S image side.
"""

import argparse
from pathlib import Path

import torch

from cli import files
from cli.errors import EXIT_OK, UsageError
from cli.options import MODEL_FIELDS, Subparsers, add_command, add_settings, read_settings
from service.answers import Origin, latents_answer
from service.devices import load_tokenizer
from service.negotiation import NPY, SAFETENSORS
from service.schemas import EncodeOptions

MEDIA_TYPES = {".safetensors": SAFETENSORS, ".npy": NPY}
EXAMPLES = """\
  drorae encode photo.jpg -o latents.safetensors
  drorae encode photos/ one-more.png -o latents.npy --dtype float32
  drorae encode photo.jpg -o base.safetensors --latent base

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
        "A .safetensors file also carries which checkpoint made it; a .npy file is the bare numbers.",
        EXAMPLES,
    )
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IN", help="photos, or folders of photos")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="a .safetensors or .npy file"
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
    """Encode; a photo that cannot be read ends it, since the numbering would shift."""
    settings = read_settings(arguments)
    output: Path = arguments.output
    files.check_output_file(output, tuple(MEDIA_TYPES))
    media_type = MEDIA_TYPES[output.suffix.lower()]
    if arguments.dtype == "bfloat16" and media_type == NPY:
        raise UsageError(f"{output}: the .npy format has no bfloat16; use --dtype float32 or .safetensors")
    photos = _expand(arguments.inputs)
    tokenizer = load_tokenizer(settings)
    rules = files.image_rules(settings, tokenizer.config.image_size, arguments.fit)
    encoded = []
    for batch in files.batches(photos, settings.batch_size, "encode"):
        images_N3SS = torch.stack([files.read_photo(path, rules) for path in batch])
        latents_NChw = tokenizer.encode(images_N3SS, arguments.latent, arguments.normalize)
        encoded.append(latents_NChw.float().cpu())
    options = EncodeOptions(dtype=arguments.dtype, latent=arguments.latent, normalize=arguments.normalize)
    answer = latents_answer(torch.cat(encoded), media_type, options, Origin.of(tokenizer))
    files.write_file(output, bytes(answer.body))
    shape = [len(photos), *tokenizer.config.latent_shape]
    print(f"{output}: {arguments.latent} latents {shape}, {arguments.dtype}")
    return EXIT_OK


def _expand(inputs: list[Path]) -> list[Path]:
    photos = []
    for path in inputs:
        if not path.exists():
            raise UsageError(f"{path}: No such file or directory")
        photos += files.find_photos(path) if path.is_dir() else [path]
    return photos
