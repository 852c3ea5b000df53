"""RAE's stage-2 files in and out: a DiT^DH keeps its tensors' names, so only wrappers come off.

Also the folder that diffusers' pull request 13231 (``RAEDiT2DModel``) wants. The request is open, so its
layout may still change.

Shape legend: C latent channels, N tokens, D trunk width, E head width, P width of one attention head.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.directory import CONFIG_FILE, check_shapes, staged_directory
from model.errors import CheckpointError
from model.generator import Generator, GeneratorConfig, TrainedOn, default_shift
from model.interop.assembly import (
    check_finite,
    describe_source,
    naming,
    read_statistics,
    refuse_to_replace,
)
from model.interop.foreign_files import ForeignTensors, read_tensors
from model.networks.dit import rotary_tables

WEIGHTS_FILE = "stage2_model.pt"
STATISTICS_FILE = "stat.pt"
ROTARY = ("enc_feat_rope", "dec_feat_rope")
ROTARY_TOLERANCE = 1e-5
MLP_RATIO = 4.0
HEAD_DEPTH = 2  # of RAE's models, where equal widths do not tell trunk from head
PULL_REQUEST = "https://github.com/huggingface/diffusers/pull/13231"
DIFFUSERS_VERSION = "0.38.0.dev0"
_README = """\
# {name}

A DiT^DH exported by DRoRAE in the layout of diffusers' pull request 13231
({url}),
which was not merged when this was written. On its branch
`RAEDiT2DModel.from_pretrained(folder, subfolder="transformer")` loads it.

The velocity is that of `x_t = (1 - t) x + t e`. Latents are normalised per position by the statistics of the
autoencoder. RAE's time grid is `set_timesteps(sigmas=linspace(1, 0.001, K))` with the scheduler's shift;
`set_timesteps(K)` gives another one.
"""


@dataclass(frozen=True)
class ImportedGenerator:
    """A generator, where it came from (any JSON, without paths), and what its user should know."""

    generator: Generator
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()


def import_generator(
    path: str | Path, config: GeneratorConfig | None = None, statistics: str | Path | None = None
) -> Generator:
    """The generator in one of RAE's stage-2 files; see `import_rae_generator`."""
    found = None if statistics is None else Path(statistics)
    return import_rae_generator(Path(path), config, found).generator


def import_rae_generator(
    file: Path,
    config: GeneratorConfig | None = None,
    statistics: Path | None = None,
    name: str = "generator",
) -> ImportedGenerator:
    """A generator from RAE's ``stage2_model.pt``, or the same tensors as safetensors.

    The file holds the tensors bare, or wrapped; of averaged and raw weights the averaged ones are taken. The
    stored tables of positions and times are kept, and the rotary ones compared with their formula.

    Args:
        file: the weights.
        config: the architecture; by default read off the shapes.
        statistics: RAE's ``stat.pt`` of the latents; without it nothing can decode what is sampled.
        name: of the generator, where ``config`` gives none.

    Raises:
        CheckpointError: unreadable, or a tensor that is missing, unexpected, mis-shaped or not finite.
    """
    weights = read_tensors(file)
    check_finite(weights)
    with naming(weights.source):
        config = config or generator_config_from_state(weights.tensors, name)
    state = _with_rotary_tables(weights, config)
    expected = Generator.on_meta(config).shapes()["network"]
    check_shapes(file, {key: tensor.shape for key, tensor in state.items()}, expected)
    trained_on = TrainedOn(shift=default_shift(config.latent_shape))
    generator = Generator.from_network(config, state, file.parent, trained_on)
    notes = [f"{file}: {note}" for note in weights.notes]
    provenance = {"generator": describe_source("RAE stage 2", *weights.files, notes=weights.notes)}
    if statistics is not None:
        found = read_statistics(statistics, config.latent_shape)
        generator.set_statistics(found.mean, found.var)
        notes += found.notes
        provenance["statistics"] = describe_source("RAE", statistics, notes=found.notes)
    else:
        notes.append("without statistics (stat.pt) the latents cannot be decoded")
    return ImportedGenerator(generator, {"imported": provenance}, tuple(notes))


def generator_config_from_state(tensors: Mapping[str, Tensor], name: str) -> GeneratorConfig:
    """The architecture that the tensors' shapes tell.

    Raises:
        CheckpointError: a tensor that tells a size is missing or has other dimensions.
    """
    _, num_tokens, trunk = _shape(tensors, "pos_embed", 3)
    head, channels = _shape(tensors, "x_embedder.proj.weight", 4)[:2]
    num_rows = _shape(tensors, "y_embedder.embedding_table.weight", 2)[0]
    widths: list[int] = []
    while f"blocks.{len(widths)}.attn.proj.weight" in tensors:
        widths.append(_shape(tensors, f"blocks.{len(widths)}.attn.proj.weight", 2)[0])
    trunk_depth = len(widths) - HEAD_DEPTH if trunk == head else widths.count(trunk)
    heads = [
        width // max(1, _shape(tensors, f"{rotary}.freqs_cos", 2)[1])
        for width, rotary in zip((trunk, head), ROTARY, strict=True)
    ]
    try:
        return GeneratorConfig(
            name=name,
            num_classes=num_rows - 1,
            latent_channels=channels,
            grid=math.isqrt(num_tokens),
            trunk_width=trunk,
            trunk_depth=trunk_depth,
            trunk_heads=heads[0],
            head_width=head,
            head_depth=len(widths) - trunk_depth,
            head_heads=heads[1],
            mlp_ratio=MLP_RATIO,
        )
    except ValidationError as exc:
        message = exc.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"the tensors' shapes are not those of a DiT^DH: {message}") from exc


def export_rae(generator: Generator, path: Path, storage_dtype: torch.dtype = torch.float32) -> list[str]:
    """Write RAE's own files, ``stage2_model.pt`` and ``stat.pt``, complete or not at all.

    Returns:
        Names of the files.

    Raises:
        OSError: the disk is full, or the place taken or not writable; nothing half-written stays behind.
    """
    with staged_directory(path.absolute(), refuse_to_replace) as staging:
        torch.save(generator.stored_network(storage_dtype), staging / WEIGHTS_FILE)
        if generator.latent_mean is not None and generator.latent_var is not None:
            statistics = {"mean": generator.latent_mean.cpu(), "var": generator.latent_var.cpu()}
            torch.save(statistics, staging / STATISTICS_FILE)
        (staging / CONFIG_FILE).write_text(_rae_config(generator), encoding="utf-8")
        return sorted(file.name for file in staging.iterdir())


def export_diffusers_transformer(
    generator: Generator, path: Path, storage_dtype: torch.dtype = torch.float32
) -> list[str]:
    """Write the folder of diffusers' pull request 13231, without the autoencoder, complete or not at all.

    Returns:
        Names of the files.

    Raises:
        OSError: as for `export_rae`.
    """
    shift = generator.trained_on.shift or default_shift(generator.config.latent_shape)
    index = {
        "_class_name": "RAEDiTPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "transformer": ["diffusers", "RAEDiT2DModel"],
        "vae": ["diffusers", "AutoencoderRAE"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    if generator.trained_on.class_names:
        index["id2label"] = dict(enumerate(generator.trained_on.class_names))  # type: ignore[assignment]
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "shift": shift,
    }
    with staged_directory(path.absolute(), refuse_to_replace) as staging:
        for folder in ("transformer", "scheduler"):
            (staging / folder).mkdir()
        tensors = state_to_diffusers(generator.stored_network(storage_dtype))
        weights = staging / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        _write_json(staging / "model_index.json", index)
        _write_json(staging / "transformer" / "config.json", _transformer_config(generator.config))
        _write_json(staging / "scheduler" / "scheduler_config.json", scheduler)
        readme = _README.format(name=generator.config.name, url=PULL_REQUEST)
        (staging / "README.md").write_text(readme, encoding="utf-8")
        return sorted(str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file())


def state_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RAE's tensors by the names of ``RAEDiT2DModel``: q, k, v apart, SwiGLU's halves swapped."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, kind = name.rpartition(".")
        if head.endswith("attn.qkv"):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{head.removesuffix('qkv')}to_{part}.{kind}"] = third.contiguous()
        elif head.endswith("attn.proj"):
            renamed[f"{head.removesuffix('proj')}to_out.0.{kind}"] = tensor
        elif head.endswith("mlp.w12"):
            gate, value = tensor.chunk(2)
            renamed[f"{head.removesuffix('w12')}net.0.proj.{kind}"] = torch.cat([value, gate])
        elif head.endswith("mlp.w3"):
            renamed[f"{head.removesuffix('w3')}net.2.{kind}"] = tensor
        else:
            renamed[name] = tensor
    return renamed


def _transformer_config(config: GeneratorConfig) -> dict[str, Any]:
    return {
        "_class_name": "RAEDiT2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": config.grid,
        "patch_size": 1,
        "in_channels": config.latent_channels,
        "hidden_size": [config.trunk_width, config.head_width],
        "depth": [config.trunk_depth, config.head_depth],
        "num_heads": [config.trunk_heads, config.head_heads],
        "mlp_ratio": config.mlp_ratio,
        "class_dropout_prob": 0.1,  # for a null class, which every generator of ours has
        "num_classes": config.num_classes,
        "use_qknorm": False,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
        "wo_shift": False,
        "use_pos_embed": True,
    }


def _rae_config(generator: Generator) -> str:
    """The arguments of RAE's ``DiTwDDTHead``, which its files do not hold."""
    fields = _transformer_config(generator.config)
    kept = {name: value for name, value in fields.items() if not name.startswith("_")}
    kept["input_size"] = kept.pop("sample_size")
    return json.dumps(kept, indent=2) + "\n"


def _with_rotary_tables(weights: ForeignTensors, config: GeneratorConfig) -> dict[str, Tensor]:
    """The tensors with computed rotary tables, which those of the file must equal."""
    state = dict(weights.tensors)
    widths = (config.trunk_width // config.trunk_heads, config.head_width // config.head_heads)
    for part, width in zip(ROTARY, widths, strict=True):
        for wave, table in zip(("cos", "sin"), rotary_tables(width, config.grid), strict=True):
            name = f"{part}.freqs_{wave}"
            found = state.get(name)
            if found is not None and found.shape == table.shape:
                if not torch.allclose(found.float(), table, atol=ROTARY_TOLERANCE):
                    raise CheckpointError(f"{weights.source}: tensor {name!r} holds other rotary positions")
                state[name] = table
            elif found is None:
                state[name] = table
    return state


def _shape(tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"tensor {name!r} is missing: no DiT^DH")
    if tensors[name].ndim != ndim:
        raise CheckpointError(f"tensor {name!r} has {tensors[name].ndim} dimensions, expected {ndim}")
    return tuple(tensors[name].shape)


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
