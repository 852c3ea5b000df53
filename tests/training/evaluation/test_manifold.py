"""Figures of feature sets against their definitions, one pair at a time in float64."""

import math

import numpy as np
import pytest
import torch

from training.evaluation.manifold import Probe, inception_score, nearest, precision_recall


def adm_precision_recall(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """ADM's evaluator in words: a ball per vector, to its k-th neighbour; squared distances throughout."""

    def radii(vectors: np.ndarray) -> list[float]:
        return [sorted(float(((v - w) ** 2).sum()) for w in vectors)[k] for v in vectors]

    of_reference, of_samples = radii(reference), radii(samples)
    precise = [
        any(((s - r) ** 2).sum() <= radius for r, radius in zip(reference, of_reference, strict=True))
        for s in samples
    ]
    recalled = [
        any(((r - s) ** 2).sum() <= radius for s, radius in zip(samples, of_samples, strict=True))
        for r in reference
    ]
    return sum(precise) / len(precise), sum(recalled) / len(recalled)


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (0.7, 0.5), (0.3, 2.0), (5.0, 1.0)])
def test_precision_and_recall_are_those_of_adm(shift: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(40, 3))
    samples = shift + spread * rng.normal(size=(55, 3))
    found = precision_recall(torch.from_numpy(reference), torch.from_numpy(samples))
    assert found == pytest.approx(adm_precision_recall(reference, samples, k=3))


def test_precision_and_recall_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, samples = torch.randn(50, 4, generator=generator), torch.randn(60, 4, generator=generator)
    whole = precision_recall(reference, samples)
    monkeypatch.setattr("training.evaluation.manifold.BLOCK", 7)
    assert precision_recall(reference, samples) == pytest.approx(whole)


def test_sets_without_enough_neighbours_have_no_figure() -> None:
    assert precision_recall(torch.randn(3, 2), torch.randn(9, 2)) is None


def test_the_inception_score_follows_its_definition() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(37, 5))
    scores = []
    for start in range(0, 30, 3):  # ten splits of three; the rest is left out
        p = np.exp(logits[start : start + 3])
        p /= p.sum(axis=1, keepdims=True)
        scores.append(math.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    found = inception_score(torch.from_numpy(logits))
    assert found == pytest.approx((np.mean(scores), np.std(scores)))
    assert inception_score(torch.zeros(9, 5)) is None


def test_the_nearest_is_found() -> None:
    candidates = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    distances, numbers = nearest(torch.tensor([[3.0, 3.0], [9.0, 0.0], [0.0, 0.0]]), candidates)
    assert numbers.tolist() == [1, 2, 0]
    assert distances.tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_the_probe_learns_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(3, 20, generator=generator)
    labels = torch.arange(120) % 3
    features = centres[labels] + torch.randn(120, 20, generator=generator)
    probe = Probe(features[:90], labels[:90], 3)
    assert (probe.predict(features[90:]) == labels[90:]).float().mean() > 0.95
