"""Quality of generated images: distances between feature distributions, and what a classifier sees.

Figures in EfficientNet-Lite0's features are always there and are named so. FID, Inception score, precision
and recall as ADM defines them need FID's Inception weights.

Shape legend: B batch, N images, D width of features, S image side.
"""

import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.data.classes import Classes, find_classes
from training.data.passes import default_workers, read_batches
from training.data.sources import Sample, list_samples
from training.errors import DataError, WeightsError
from training.evaluation.feature_networks import EfficientNetFeatures, InceptionFeatures
from training.evaluation.frechet import bias_note, frechet_distance
from training.evaluation.manifold import Probe, inception_score, nearest, precision_recall
from training.evaluation.moments import FeatureMoments
from training.output.grids import reconstruction_grid

logger = logging.getLogger(__name__)

LITE = "efficientnet_lite0"
ADM_PICTURES, ADM_MEAN, ADM_COVARIANCE = "arr_0", "mu", "sigma"  # arrays of ADM's npz files


@dataclass(frozen=True)
class Pictures:
    """One of the sets: images of a listing, fitted to ``side``, or an array of bytes [N, S, S, 3]."""

    name: str
    side: int
    samples: Sequence[Sample] = ()
    array: "np.ndarray[Any, np.dtype[np.uint8]] | None" = None

    def __len__(self) -> int:
        return len(self.samples) if self.array is None else len(self.array)

    def batches(self, size: int, num_workers: int) -> Iterator[Tensor]:
        """Images [B, 3, S, S] uint8, in order."""
        if self.array is not None:
            for start in range(0, len(self.array), size):
                yield torch.from_numpy(self.array[start : start + size].copy()).permute(0, 3, 1, 2)
            return
        for chunk, kept, batch in read_batches(
            self.samples, range(len(self.samples)), self.side, size, num_workers
        ):
            if batch is None or len(kept) != len(chunk):
                broken = next(p for p in chunk if batch is None or p not in kept)
                sample = self.samples[broken]
                raise DataError(f"{sample.key} in {sample.file}: cannot be decoded")
            yield batch.images


def read_pictures(name: str, paths: Sequence[Path], side: int) -> Pictures:
    """A set from folders and tars, or from one of ADM's npz files.

    Raises:
        DataError: nothing there, or the npz holds no pictures.
    """
    if len(paths) == 1 and paths[0].suffix == ".npz":
        array = read_npz(paths[0], ADM_PICTURES)
        if array is None or array.ndim != 4 or array.dtype != np.uint8 or array.shape[-1] != 3:
            raise DataError(f"{paths[0]}: holds no array {ADM_PICTURES!r} of bytes [N, S, S, 3]")
        return Pictures(name, side, array=array)
    return Pictures(name, side, list_samples(paths))


def read_npz(file: Path, name: str) -> "np.ndarray[Any, Any] | None":
    """One array of an npz file; None where it has none of that name.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays.get(name)
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        raise DataError(f"{file}: not a readable npz file: {exc}") from exc


def write_npz(pictures: Pictures, file: Path, size: int = 64) -> None:
    """The pictures as ADM's own evaluator reads them: ``arr_0``, bytes [N, S, S, 3]."""
    batches = [batch.permute(0, 2, 3, 1).numpy() for batch in pictures.batches(size, 0)]
    with file.open("wb") as stream:
        np.savez(stream, arr_0=np.concatenate(batches))


@dataclass(frozen=True)
class GenerationSets:
    """What is compared.

    Attributes:
        samples: generated images.
        reference: real images that were not trained on, or ADM's reference batch.
        train: labelled images of the training; for the probe and the neighbours.
        adm_file: ADM's reference file, whose ``mu`` and ``sigma`` FID is measured against.
    """

    samples: Pictures
    reference: Pictures
    train: Pictures | None = None
    train_paths: Sequence[Path] = ()
    adm_file: Path | None = None


class GenerationQuality:
    """Measures the sets.

    Args:
        sets: the images.
        device: where the networks run.
        batch_size: images at once.
        inception: FID's weights; by default those in torch hub's cache. Without them its figures are left
            out, with the reason.
    """

    def __init__(
        self, sets: GenerationSets, device: torch.device, batch_size: int, inception: Path | None = None
    ) -> None:
        self.sets = sets
        self.device = device
        self.batch_size = batch_size
        self.lite = EfficientNetFeatures(device)
        self.inception: InceptionFeatures | None = None
        self.skipped: dict[str, str] = {}
        try:
            self.inception = InceptionFeatures(inception, device, with_logits=True)
        except WeightsError as exc:
            if inception is not None:
                raise
            self.skipped["inception"] = str(exc)
        self.neighbours: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """All figures, by name; plain values.

        Raises:
            DataError: an image that cannot be read, or labels that are missing.
        """
        samples, reference = self.sets.samples, self.sets.reference
        found = self._lite_features(samples)
        real = self._lite_features(reference)
        report: dict[str, Any] = {
            "num_samples": len(samples),
            "num_reference": len(reference),
            f"frechet_{LITE}": frechet_distance(_moments(real), _moments(found)),
            **_manifold(real, found, f"_{LITE}"),
        }
        if self.inception is not None:
            report |= self._inception_figures(self.inception)
        if self.sets.train is not None:
            report |= self._training_figures(self.sets.train, found, real)
        note = bias_note(min(len(samples), len(reference)), found.shape[1])
        return {**report, "note": note, "skipped": self.skipped}

    def neighbour_grid(self, count: int) -> Any:
        """Samples spread over the set, above the training images nearest to them."""
        assert self.neighbours is not None
        assert self.sets.train is not None
        distances, numbers = self.neighbours
        chosen = [index * len(numbers) // count for index in range(min(count, len(numbers)))]
        rows = [
            _pick(self.sets.samples, chosen),
            _pick(self.sets.train, [int(numbers[index]) for index in chosen]),
        ]
        captions = [[f"{float(distances[index]):.1f}" for index in chosen]]
        return reconstruction_grid(rows, ["samples", "nearest training images"], [(), *captions])

    def _lite_features(self, pictures: Pictures) -> Tensor:
        return torch.cat([self.lite.features(images) for images in self._images(pictures)])

    def _inception_figures(self, network: InceptionFeatures) -> dict[str, Any]:
        pairs = [network.outputs(images) for images in self._images(self.sets.samples)]
        found = torch.cat([features for features, _ in pairs])
        score = inception_score(torch.cat([logits for _, logits in pairs]))
        real = torch.cat([network.features(images) for images in self._images(self.sets.reference)])
        moments = _adm_moments(self.sets.adm_file) or _moments(real)
        return {
            "fid": frechet_distance(moments, _moments(found)),
            "fid_reference": "mu and sigma of the file" if self.sets.adm_file else "the reference images",
            "inception_score": None if score is None else score[0],
            "inception_score_deviation": None if score is None else score[1],
            **_manifold(real, found, ""),
        }

    def _training_figures(self, train: Pictures, found: Tensor, real: Tensor) -> dict[str, Any]:
        """The probe's accuracy, and how near samples are to training images beside how near real ones are."""
        trained = self._lite_features(train)
        classes = find_classes(train.samples, self.sets.train_paths)
        labels = _labels(classes, train.samples).to(self.device)
        with torch.enable_grad():
            probe = Probe(trained, labels, classes.count)
        self.neighbours = nearest(found, trained)
        of_samples, of_real = self.neighbours[0], nearest(real, trained)[0]
        figures: dict[str, Any] = {
            "nearest_training_distance": float(of_samples.median()),
            "nearest_training_distance_of_reference": float(of_real.median()),
        }
        for name, pictures, features in (
            ("samples", self.sets.samples, found),
            ("reference", self.sets.reference, real),
        ):
            if pictures.array is None:
                wanted = _labels(_by_folder(classes), pictures.samples).to(self.device)
                hits = (probe.predict(features) == wanted).double()
                figures[f"probe_accuracy_of_{name}"] = float(hits.mean())
                figures[f"probe_accuracy_of_{name}_by_class"] = _by_class(hits, wanted, classes)
        return figures

    def _images(self, pictures: Pictures) -> Iterator[Tensor]:
        batches = pictures.batches(self.batch_size, default_workers(self.device))
        with tqdm(total=len(pictures), unit="image", desc=pictures.name) as bar:
            for images in batches:
                yield images.to(self.device)
                bar.update(len(images))


def _moments(features: Tensor) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    moments.update(features.cpu())
    return moments


def _adm_moments(file: Path | None) -> FeatureMoments | None:
    if file is None:
        return None
    mean, covariance = read_npz(file, ADM_MEAN), read_npz(file, ADM_COVARIANCE)
    if mean is None or covariance is None:
        return None
    moments = FeatureMoments(len(mean))
    moments.count = 2  # the covariance is given: its sum of squares over count - 1
    moments.mean = torch.from_numpy(mean).double()
    moments.second = torch.from_numpy(covariance).double()
    return moments


def _manifold(reference: Tensor, samples: Tensor, suffix: str) -> dict[str, float | None]:
    both = precision_recall(reference, samples) or (None, None)
    return {f"precision{suffix}": both[0], f"recall{suffix}": both[1]}


def _labels(classes: Classes, samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([sample.label for sample in classes.label(samples)])


def _by_folder(classes: Classes) -> Classes:
    """The same classes for a folder of samples, where a name's slash is an underscore."""
    return Classes(tuple(name.replace("/", "_") for name in classes.names), classes.count, by_folder=None)


def _by_class(hits: Tensor, labels: Tensor, classes: Classes) -> dict[str, float]:
    return {
        classes.names[label] if classes.names else str(label): float(hits[labels == label].mean())
        for label in labels.unique().tolist()
    }


def _pick(pictures: Pictures, numbers: Sequence[int]) -> Tensor:
    """Some of the images, [B, 3, S, S] in [0, 1]."""
    if pictures.array is not None:
        return torch.from_numpy(pictures.array[list(numbers)]).permute(0, 3, 1, 2).float() / 255
    some = Pictures(pictures.name, pictures.side, [pictures.samples[number] for number in numbers])
    return torch.cat(list(some.batches(len(numbers), 0))).float() / 255
