"""FID's Inception, where torch-fidelity (the evaluation extra) is installed."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.errors import WeightsError
from training.evaluation.feature_networks import INCEPTION_WIDTH, InceptionFeatures
from training.evaluation.frechet import frechet_distance
from training.evaluation.moments import FeatureMoments

CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the network's form with random weights."""
    fidelity = pytest.importorskip("torch_fidelity", reason="needs the extra drorae[evaluation]")
    file = tmp_path / "inception.pth"
    torch.save({}, file)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        name = "inception-v3-compat"
        network = fidelity.FeatureExtractorInceptionV3(
            name, ["2048"], feature_extractor_weights_path=str(file)
        )
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), file)
    return file


class Pictures(torch.utils.data.Dataset[Tensor]):
    """uint8 pictures, as torch-fidelity takes them."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


def test_rfid_is_torch_fidelitys(weights: Path) -> None:
    import torch_fidelity

    generator = torch.Generator().manual_seed(1)
    first = torch.randint(0, 256, (24, 3, 64, 64), generator=generator, dtype=torch.uint8)
    second = (first * 0.7 + 40).to(torch.uint8)
    network = InceptionFeatures(weights, CPU, hashlib.sha256(weights.read_bytes()).hexdigest())
    sides = []
    for pictures in (first, second):
        sides.append(FeatureMoments(INCEPTION_WIDTH))
        for batch in pictures.split(8):
            sides[-1].update(network.features(batch))
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(first),
        input2=Pictures(second),
        fid=True,
        cuda=False,
        batch_size=8,
        cache=False,
        verbose=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
    )
    assert frechet_distance(*sides) == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)


def test_other_weights_are_no_rfid(weights: Path) -> None:
    with pytest.raises(WeightsError, match="truncated, or another network"):
        InceptionFeatures(weights, CPU)
