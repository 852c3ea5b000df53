"""``drorae info``: describes a checkpoint, after reading and verifying all of it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.errors import EXIT_OK, UsageError
from cli.options import Subparsers, add_command, add_settings, read_settings
from model.checkpoints.tokenizers import CheckpointInfo
from model.generator import Generator, find_generator
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from training.latents.manifest import Manifest

EXAMPLES = """\
  drorae info
  drorae info runs/phase3/checkpoint
  drorae info --json | python -m json.tool
  drorae info latents/                        the manifest of drorae tokenize's folder
"""
MAX_VALUE_CHARS = 100
PARTS = ("encoder", "fusion", "decoder", "statistics")  # the order of computation


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "info",
        run,
        "describe and verify a checkpoint, or describe a folder of latents",
        "Read a checkpoint, verify every file and tensor of it, and describe it; or show what the manifest\n"
        "of a folder of latents says. (`drorae tokenize --verify` verifies such a folder.)",
        EXAMPLES,
    )
    parser.add_argument(
        "positional",
        nargs="?",
        metavar="CHECKPOINT",
        help="as --checkpoint: a directory or a bundled name; or a folder of latents",
    )
    parser.add_argument("--json", action="store_true", help="everything, configuration included, as JSON")
    add_settings(parser, ("checkpoint",))


def run(arguments: argparse.Namespace) -> int:
    """Describe the checkpoint."""
    if arguments.positional is not None:
        if "setting_checkpoint" in arguments:
            raise UsageError("the checkpoint is named twice: as an argument and by --checkpoint")
        arguments.setting_checkpoint = arguments.positional
    source = read_settings(arguments).checkpoint
    manifest = _find_manifest(Path(source))
    if manifest is not None:
        facts = manifest.model_dump(mode="json")
        print(json.dumps(facts, indent=2) if arguments.json else format_table(describe_latents(manifest)))
        return EXIT_OK
    generator_path = find_generator(source)
    if generator_path is not None:
        facts = describe_generator(Generator.load(generator_path))
        text = json.dumps(facts, indent=2) if arguments.json else format_table(_as_table(facts))
        print(text)
        return EXIT_OK
    tokenizer = Tokenizer.load(source, fusion="reference")
    assert tokenizer.checkpoint is not None
    if arguments.json:
        print(
            json.dumps(describe_json(tokenizer, tokenizer.checkpoint), indent=2, allow_nan=False, default=str)
        )
    else:
        print(format_table(describe_table(tokenizer, tokenizer.checkpoint)))
    return EXIT_OK


def _find_manifest(folder: Path) -> "Manifest | None":
    """The manifest of a folder of latents, if that is what the folder is."""
    if not (folder / "manifest.json").is_file():
        return None
    from training.latents.manifest import read_manifest
    from training.latents.store import FolderStore

    return read_manifest(FolderStore(folder))


def describe_latents(manifest: "Manifest") -> list[tuple[str, str]]:
    """A folder of latents, as names and values."""
    identity, totals = manifest.identity, manifest.totals
    rows = [
        ("latents", f"{totals.images:,} of {identity.model}" + ("" if manifest.complete else ", incomplete")),
        ("broken images", f"{totals.broken:,}"),
        ("files", f"{len(manifest.shards):,}, {totals.bytes / 2**20:,.1f} MiB"),
        ("classes", f"{len(manifest.classes):,}" if manifest.classes else "not named"),
    ]
    rows += [(f"  {name}", _short(value)) for name, value in identity.model_dump(mode="json").items()]
    rows += [(f"  input {record.name}", f"{record.images:,} images") for record in manifest.inputs]
    return rows


def describe_generator(generator: Generator) -> dict[str, Any]:
    """Everything that is known of a generator."""
    assert generator.info is not None
    return {
        "name": generator.info.name,
        "path": str(generator.info.path),
        "sha256": generator.info.sha256,
        "num_parameters": sum(p.numel() for p in generator.network.parameters()),
        "has_statistics": generator.has_statistics,
        "config": generator.config.model_dump(mode="json"),
        "trained_on": generator.trained_on.model_dump(mode="json"),
        "provenance": generator.info.provenance,
    }


def _as_table(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("generator", facts["name"])]
    for name in ("path", "sha256", "num_parameters", "has_statistics"):
        rows.append((name.replace("_", " "), _short(facts[name])))
    for section in ("config", "trained_on", "provenance"):
        rows += [(f"  {name}", _short(value)) for name, value in facts[section].items()]
    return rows


def describe_json(tokenizer: Tokenizer, checkpoint: CheckpointInfo) -> dict[str, Any]:
    """Everything that is known of a checkpoint; sizes in bytes."""
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "format_version": checkpoint.format_version,
        "image_size": tokenizer.config.image_size,
        "latent_shape": list(tokenizer.config.latent_shape),
        "has_statistics": tokenizer.has_statistics,
        "fused_layers": list(tokenizer.config.fused_layers),
        "parts": {
            part: {
                "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
                "num_bytes": (checkpoint.path / f"{part}.safetensors").stat().st_size,
            }
            for part, tensors in tokenizer.parts().items()
        },
        "config": tokenizer.config.model_dump(mode="json"),
        "provenance": checkpoint.provenance,
    }


def describe_table(tokenizer: Tokenizer, checkpoint: CheckpointInfo) -> list[tuple[str, str]]:
    """A description for people, as names and values."""
    config, facts = tokenizer.config, describe_json(tokenizer, checkpoint)
    encoder, fusion, decoder = config.encoder, config.fusion, config.decoder
    channels, rows, columns = config.latent_shape
    layers = config.fused_layers
    rows_of_table = [
        ("checkpoint", checkpoint.name),
        ("path", str(checkpoint.path)),
        ("sha256", checkpoint.sha256),
        ("images", f"{config.image_size} x {config.image_size} pixels"),
        ("latents", f"{channels} x {rows} x {columns}, normalisable: {_yes(tokenizer.has_statistics)}"),
        (
            "encoder",
            f"width {encoder.width}, {encoder.depth} blocks, {encoder.num_heads} heads, "
            f"patch {encoder.patch_size} at {encoder.image_size} pixels, {encoder.num_registers} registers",
        ),
    ]
    if fusion is None:
        rows_of_table.append(("fusion", "none: the last layer alone"))
    else:
        hidden = f", hidden width {fusion.hidden_width}" if fusion.mixer == "experts" else ""
        rows_of_table.append(
            (
                "fusion",
                f"{fusion.mixer.replace('_', ' ')} over layers {layers[0]} to {layers[-1]}{hidden}, "
                f"{fusion.routing} routing, {fusion.correction} correction, beta {fusion.beta:g}",
            )
        )
    rows_of_table.append(
        (
            "decoder",
            f"width {decoder.width}, {decoder.depth} blocks, {decoder.num_heads} heads, "
            f"MLP {decoder.mlp_width}, patch {decoder.patch_size}",
        )
    )
    for part, size in sorted(facts["parts"].items(), key=lambda item: PARTS.index(item[0])):
        rows_of_table.append(
            (f"  {part}", f"{size['num_parameters']:,} numbers, {size['num_bytes'] / 2**20:.1f} MiB")
        )
    return rows_of_table + [(f"  {key}", _short(value)) for key, value in checkpoint.provenance.items()]


def format_table(table: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in table)
    return "\n".join(f"{name:{width}}  {value}" for name, value in table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 3]}..."
