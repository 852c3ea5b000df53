"""Random weights in the files that training reads, so that nothing has to be downloaded to time it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import TokenizerConfig
from model.networks.encoder import Encoder
from model.tokenizer import Tokenizer
from training.losses.adversarial import DINO_CONFIG
from training.losses.perceptual import Lpips

DINO_PARTS = {
    "norm_attention": "norm1",
    "norm_mlp": "norm2",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def write_weights(folder: Path, config: TokenizerConfig, seed: int) -> dict[str, Path]:
    """Files by name: ``phase1`` to ``phase3``, what each phase starts from; ``vgg``, ``lpips``, ``dino``."""
    torch.manual_seed(seed)
    found: dict[str, Path] = {}
    for name, fusion in (("plain", None), ("fused", config.fusion)):
        Tokenizer(config.model_copy(update={"fusion": fusion})).save(folder / name)
    found |= {"phase1": folder / "plain", "phase2": folder / "plain", "phase3": folder / "fused"}
    for name, state in (("vgg", _vgg()), ("lpips", _lpips_heads()), ("dino", _dino())):
        found[name] = folder / f"{name}.pth"
        torch.save(state, found[name])
    return found


def _vgg() -> dict[str, Tensor]:
    """As torchvision names them: convolutions, activations and pools numbered in one sequence."""
    state: dict[str, Tensor] = {}
    index = 0
    for number, stage in enumerate(Lpips(None, None).stages):
        index += number > 0
        for layer in stage.children():
            if isinstance(layer, nn.Conv2d):
                state |= {f"features.{index}.{name}": t for name, t in layer.state_dict().items()}
                index += 2
    return state


def _lpips_heads() -> dict[str, Tensor]:
    heads = Lpips(None, None).heads
    return {f"lin{n}.model.1.weight": head.get_parameter("weight").abs() for n, head in enumerate(heads)}


def _dino() -> dict[str, Tensor]:
    """As DINO's own files name them."""
    state = {}
    for name, tensor in Encoder(DINO_CONFIG).state_dict().items():
        renamed = {"class_token": "cls_token", "positions": "pos_embed"}.get(name, name)
        renamed = renamed.replace("patch_embed.", "patch_embed.proj.")
        for ours, theirs in DINO_PARTS.items():
            renamed = renamed.replace(f".{ours}.", f".{theirs}.")
        if "scale_" not in renamed and renamed != "register_tokens":
            state[renamed] = tensor
    return state
