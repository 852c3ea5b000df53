"""Export to diffusers: a folder that ``AutoencoderRAE.from_pretrained`` loads, the fusion beside it.

diffusers and transformers are not needed to write it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.directory import staged_directory
from model.config import TokenizerConfig
from model.interop import drorae_fusion
from model.interop.assembly import refuse_to_replace
from model.interop.diffusers_config import (
    CLASS_NAME,
    DIFFUSERS_VERSION,
    FUSION_FORMAT,
    FUSION_STEM,
    WEIGHTS_STEM,
    AutoencoderRaeConfig,
    decoder_fields,
    encoder_fields,
    filler_tensors,
    statistics_to_diffusers,
)
from model.interop.rae_decoder_weights import decoder_state_to_diffusers
from model.interop.transformers_weights import TransformersRelease, encoder_state_to_transformers
from model.tokenizer import Tokenizer

README_FILE = "README.md"
_README = """\
# {name}

An image tokenizer exported by DRoRAE as diffusers' `{class_name}`.{origin}
Tensor names are those of transformers {release}. Images are {side} x {side}; latents are {shape},
{normalized}.

```python
from diffusers import {class_name}

autoencoder = {class_name}.from_pretrained(folder).eval()
latents = autoencoder.encode(images).latent       # images [B, 3, H, W] in [0, 1]: base latents
pictures = autoencoder.decode(latents).sample     # in [0, 1], not clamped
```
"""
_FUSION_README = """
The decoder was trained on enriched latents, fused over several layers of the encoder. They are made by the
fusion in `fusion.json` and `fusion.safetensors`, which `drorae_fusion.py` runs (put this folder on
`PYTHONPATH`, or copy the file). The statistics are theirs too: a generator works in this space, and
`autoencoder.decode` takes its latents as they are.

```python
from drorae_fusion import load_fusion

fusion = load_fusion(folder)
latents = fusion.encode(autoencoder, images)
```
"""
_METADATA = {"format": "pt"}  # transformers and diffusers ask for it


def export_diffusers(
    tokenizer: Tokenizer,
    path: str | Path,
    storage_dtype: torch.dtype = torch.float32,
    release: TransformersRelease = 5,
) -> list[str]:
    """Write a tokenizer as an ``AutoencoderRAE`` folder, complete or not at all.

    Its decoder and statistics are this tokenizer's, so that ``decode`` takes normalised latents of a
    generator as `Tokenizer.decode` does. Its ``encode`` gives the base latents; a fused tokenizer's fusion
    is written beside it, with `model.interop.drorae_fusion`, which makes enriched latents of the two.

    Args:
        tokenizer: the one to export.
        path: a directory that does not exist yet, or is empty.
        storage_dtype: type of the weights; statistics stay float32.
        release: of transformers, whose names of the encoder's tensors changed.

    Returns:
        Names of the files.

    Raises:
        CheckpointError: ``AutoencoderRAE`` has no such encoder or decoder; names the field.
        OSError: the disk is full, or the place taken or not writable; nothing half-written stays behind.
    """
    config = tokenizer.config
    fields = _config_fields(tokenizer)
    tensors = _tensors(tokenizer, storage_dtype, release)
    with staged_directory(Path(path).absolute(), refuse_to_replace) as staging:
        _write_json(staging / "config.json", fields)
        save_file(tensors, staging / f"{WEIGHTS_STEM}.safetensors", metadata=_METADATA)
        if tokenizer.fusion is not None:
            _write_json(staging / f"{FUSION_STEM}.json", _fusion_fields(config))
            fusion = _cast(tokenizer.fusion.state_dict(), storage_dtype)
            save_file(fusion, staging / f"{FUSION_STEM}.safetensors", metadata=_METADATA)
            loader = Path(drorae_fusion.__file__)
            shutil.copyfile(loader, staging / loader.name)
        (staging / README_FILE).write_text(_readme(tokenizer, release), encoding="utf-8")
        return sorted(file.name for file in staging.iterdir())


def _config_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json`` of the folder; ``from_pretrained`` takes the statistics' shapes from it."""
    config = tokenizer.config
    fields: dict[str, Any] = {
        **encoder_fields(config.encoder),
        **decoder_fields(config.decoder, config.encoder.grid),
        "image_size": config.image_size,
        "encoder_norm_mean": list(config.pixel_mean),
        "encoder_norm_std": list(config.pixel_std),
    }
    if tokenizer.has_statistics:
        mean, std = statistics_to_diffusers(tokenizer.latent_mean, tokenizer.latent_var)
        fields |= {"latents_mean": _shortest(mean), "latents_std": _shortest(std)}
    complete = AutoencoderRaeConfig.model_validate(fields).model_dump(mode="json")
    return {"_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION, **complete}


def _tensors(
    tokenizer: Tokenizer, storage_dtype: torch.dtype, release: TransformersRelease
) -> dict[str, Tensor]:
    config = tokenizer.config
    encoder = encoder_state_to_transformers(tokenizer.encoder.state_dict(), config.encoder, release)
    encoder |= filler_tensors(config.encoder, release)
    decoder = decoder_state_to_diffusers(tokenizer.decoder.state_dict(), config.decoder)
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    tensors |= {f"decoder.{name}": tensor for name, tensor in decoder.items()}
    mean, std = statistics_to_diffusers(tokenizer.latent_mean, tokenizer.latent_var)
    exact = {
        "encoder_mean": torch.tensor(config.pixel_mean).view(1, 3, 1, 1),
        "encoder_std": torch.tensor(config.pixel_std).view(1, 3, 1, 1),
        "_latents_mean": mean,
        "_latents_std": std,
    }
    return _cast(tensors, storage_dtype) | _cast(exact, torch.float32)


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in tensors.items()}


def _fusion_fields(config: TokenizerConfig) -> dict[str, Any]:
    assert config.fusion is not None
    return {
        "format": FUSION_FORMAT,
        "version": 1,
        "fusion": config.fusion.model_dump(mode="json"),
        "layer_norm_eps": config.encoder.layer_norm_eps,
        "num_prefix_tokens": config.encoder.num_prefix_tokens,
    }


def _shortest(values: Tensor) -> Any:
    """Nested lists of numbers that are these float32 values again when they are read."""
    if values.ndim == 0:
        return float(f"{values.item():.9g}")
    return [_shortest(part) for part in values]


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    indent = None if fields.get("latents_mean") else 2  # statistics by the line would be a book
    file.write_text(json.dumps(fields, indent=indent) + "\n", encoding="utf-8")


def _readme(tokenizer: Tokenizer, release: TransformersRelease) -> str:
    config, checkpoint = tokenizer.config, tokenizer.checkpoint
    channels, rows, columns = config.latent_shape
    origin = f" Checkpoint sha256 {checkpoint.sha256}." if checkpoint else ""
    normalized = (
        "normalised per position by the statistics in config.json"
        if tokenizer.has_statistics
        else "not normalised: the checkpoint has no statistics"
    )
    text = _README.format(
        name=config.name,
        class_name=CLASS_NAME,
        origin=origin,
        release=release,
        side=config.image_size,
        shape=f"{channels} x {rows} x {columns}",
        normalized=normalized,
    )
    return text if tokenizer.fusion is None else text + _FUSION_README
