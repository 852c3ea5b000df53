"""Linear probe: how much of the classes a frozen encoder's features hold.

``python -m training.studies.linear_probe --checkpoint DIR --train SHARD... --validation SHARD...``

Shape legend: B batch, C encoder width, F probe features (2 C, or C without a class token).
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kernels.reference import token_norm
from model.tokenizer import Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import list_samples
from training.errors import DataError

PROBE_EPOCHS = 40
PROBE_BATCH_SIZE = 256
FEATURE_BATCH_SIZE = 64


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies in [0, 1] on the validation images."""

    top1: float
    top5: float
    num_train: int
    num_validation: int
    num_classes: int
    image_size: int


@torch.no_grad()
def encoder_features(tokenizer: Tokenizer, paths: Sequence[Path], image_size: int) -> tuple[Tensor, Tensor]:
    """Class token, where there is one, and mean patch token of the normalised last layer.

    Args:
        tokenizer: gives the encoder.
        paths: labelled shards.
        image_size: encoder input side, pixels; a multiple of the patch size.

    Returns:
        Features [images, F] and labels [images].

    Raises:
        DataError: an image has no class.
    """
    config, decoder = tokenizer.config.encoder, tokenizer.decoder
    features, labels = [], []
    samples = list_samples(paths)
    with tqdm(total=len(samples), unit="image", desc="features") as bar:
        for _, batch in evaluation_batches(samples, image_size, FEATURE_BATCH_SIZE):
            if (batch.labels < 0).any():
                raise DataError("the linear probe needs a class (.cls) for every image")
            pixels = (batch.pixels(tokenizer.device) - decoder.pixel_mean) / decoder.pixel_std
            tokens = token_norm(tokenizer.encoder.hidden_states(pixels)[-1], config.layer_norm_eps)
            summaries = [tokens[:, config.num_prefix_tokens :].mean(dim=1)]
            if config.class_token:
                summaries.insert(0, tokens[:, 0])
            features.append(torch.cat(summaries, dim=1).float().cpu())
            labels.append(batch.labels)
            bar.update(len(batch.labels))
    return torch.cat(features), torch.cat(labels)


def linear_probe(
    tokenizer: Tokenizer, train: Sequence[Path], validation: Sequence[Path], image_size: int, seed: int = 0
) -> ProbeResult:
    """Train one linear layer on frozen, standardised features and score it."""
    features_BF, labels_B = encoder_features(tokenizer, train, image_size)
    held_out_BF, held_out_labels_B = encoder_features(tokenizer, validation, image_size)
    mean, std = features_BF.mean(dim=0), features_BF.std(dim=0) + 1e-6
    num_classes = int(labels_B.max()) + 1
    probe = _fit((features_BF - mean) / std, labels_B, num_classes, seed)
    with torch.no_grad():
        ranked = probe((held_out_BF - mean) / std).topk(5, dim=1).indices
    hits = ranked == held_out_labels_B[:, None]
    return ProbeResult(
        top1=hits[:, 0].float().mean().item(),
        top5=hits.any(dim=1).float().mean().item(),
        num_train=len(labels_B),
        num_validation=len(held_out_labels_B),
        num_classes=num_classes,
        image_size=image_size,
    )


def _fit(features_BF: Tensor, labels_B: Tensor, num_classes: int, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    probe = nn.Linear(features_BF.shape[1], num_classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBE_EPOCHS)
    for _ in range(PROBE_EPOCHS):
        for indices in torch.randperm(len(labels_B), generator=generator).split(PROBE_BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(probe(features_BF[indices]), labels_B[indices]).backward()
            optimizer.step()
        schedule.step()
    return probe


def main() -> None:
    """Command line of the probe; prints JSON."""
    parser = argparse.ArgumentParser(description="Linear-probe accuracy of a checkpoint's frozen encoder.")
    parser.add_argument("--checkpoint", required=True, help="tokenizer checkpoint")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="labelled shards")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="labelled shards")
    parser.add_argument(
        "--image-size", type=int, default=112, help="encoder input side, pixels (default 112)"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    tokenizer = Tokenizer.load(arguments.checkpoint)
    result = linear_probe(tokenizer, arguments.train, arguments.validation, arguments.image_size)
    text = json.dumps(result.__dict__, indent=2)
    print(text)  # noqa: T201 - the command's own output
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
