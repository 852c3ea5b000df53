"""Figures of feature vectors: precision and recall, Inception score, neighbours, a linear probe.

Shape legend: N, M numbers of images, D width of features, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_NEIGHBOURS = 3
NUM_SPLITS = 10
BLOCK = 4096
PROBE_ITERATIONS = 100
PROBE_DECAY = 1e-3


def precision_recall(
    reference: Tensor, samples: Tensor, num_neighbours: int = NUM_NEIGHBOURS
) -> tuple[float, float] | None:
    """Improved precision and recall (Kynkaanniemi et al. 2019) as ADM's evaluator computes them.

    Around every vector of a set is a ball that reaches to its k-th neighbour in the set. Precision is the
    share of samples in a ball of the reference, recall the share of the reference in a ball of the samples.
    Both depend on the sizes of the sets.

    Args:
        reference: [N, D].
        samples: [M, D].
        num_neighbours: k; the vector itself is not counted.

    Returns:
        Precision and recall, or None where a set has no k neighbours.
    """
    if min(len(reference), len(samples)) <= num_neighbours:
        return None
    reference, samples = reference.double(), samples.double()
    of_reference, of_samples = _radii(reference, num_neighbours), _radii(samples, num_neighbours)
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = 0
    for start in range(0, len(reference), BLOCK):
        part = slice(start, start + BLOCK)
        distances = _squared_distances(reference[part], samples)
        inside |= (distances <= of_reference[part, None]).any(dim=0)
        covered += int((distances <= of_samples[None]).any(dim=1).sum())
    return float(inside.double().mean()), covered / len(reference)


def nearest(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """For each of queries [M, D] the distance to the nearest candidate [N, D], and its number; both [M]."""
    distances, numbers = [], []
    for part in queries.double().split(BLOCK):
        found = _squared_distances(part, candidates.double()).min(dim=1)
        distances.append(found.values.clamp(min=0).sqrt())
        numbers.append(found.indices)
    return torch.cat(distances), torch.cat(numbers)


def inception_score(logits: Tensor, num_splits: int = NUM_SPLITS) -> tuple[float, float] | None:
    """``exp(E KL(p(y|x) | p(y)))`` of logits [N, K] in consecutive splits: their mean and deviation (ADM).

    None where a split would be empty.
    """
    size = len(logits) // num_splits
    if size == 0:
        return None
    scores = []
    for part in logits[: size * num_splits].double().split(size):
        log_p = F.log_softmax(part, dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0, keepdim=True).log())).sum(dim=1).mean()
        scores.append(divergence.exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


class Probe:
    """A linear classifier of standardised features, fitted by regularised maximum likelihood."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Fit to features [N, D] with labels [N]."""
        self.mean = features.double().mean(dim=0)
        self.std = features.double().std(dim=0) + 1e-6
        standard = self._standardise(features)
        width = features.shape[1]
        self.weight = torch.zeros(num_classes, width, dtype=torch.float64, device=features.device)
        self.bias = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        optimizer = torch.optim.LBFGS(parameters, max_iter=PROBE_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(standard @ self.weight.T + self.bias, labels)
            loss = loss + PROBE_DECAY * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Classes [M] of features [M, D]."""
        return (self._standardise(features) @ self.weight.T + self.bias).argmax(dim=1)

    def _standardise(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.std


def _radii(features: Tensor, num_neighbours: int) -> Tensor:
    """Squared distance of each vector to its k-th neighbour in its own set, [N]."""
    rows = [
        _squared_distances(part, features).kthvalue(num_neighbours + 1, dim=1).values
        for part in features.split(BLOCK)
    ]
    return torch.cat(rows)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """[N, M] of [N, D] and [M, D]."""
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)[None]
    return squares - 2 * first @ second.T
