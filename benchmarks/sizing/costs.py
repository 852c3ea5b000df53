"""What each step costs: measured on the host, estimated for GPUs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness.provenance import ROOT
from benchmarks.sizing.simulation import BatchCost, Costs

HOST_COSTS = ROOT / "benchmarks" / "results" / "host_costs.json"

H100: Mapping[str, BatchCost] = {
    # dinov2-b in bfloat16. Estimates: 3.0 TFLOP of products at 650 TFLOP/s, attention, element-wise work and
    # the fusion are 7.5 to 8.0 ms per batch of 64; replaying a graph of one image takes 0.6 ms.
    "encode": BatchCost(0.5e-3, 0.117e-3),
    # 14.2 TFLOP of products for 64 images: 21 to 24 ms.
    "decode": BatchCost(0.6e-3, 0.34e-3),
}
"""Time of a batch on one H100. Nothing of it was measured."""


@dataclass(frozen=True)
class FrontCosts:
    """Costs of Python where there are several fronts, seconds of one core; see `Costs`."""

    request_s: float
    item_s: float
    front_request_s: float
    front_item_s: float


@dataclass(frozen=True)
class HostCosts:
    """Costs on the host, seconds of one core; see `Costs`.

    Attributes:
        machine, commit: where they were measured.
        request_s, item_s: of the interpreter, where one process does all.
        client_s: of the load generator, per request.
        decode_s: of a decoder, by the photo's size.
        picture_s: of a written picture, by its format.
        batch_s: [fixed, per item] of ``mini`` on one core, beside equal work on the other cores.
        behind_fronts: costs of several fronts and of the engine's process behind them.
    """

    machine: str
    commit: str
    request_s: float
    item_s: float
    client_s: float
    decode_s: dict[str, float]
    picture_s: dict[str, float]
    batch_s: tuple[float, float]
    behind_fronts: FrontCosts

    def costs(
        self, batch: BatchCost, photo: str = "", picture: str = "", client_s: float = 0.0, num_fronts: int = 1
    ) -> Costs:
        """Costs of a request.

        Args:
            batch: of the device.
            photo: size of the images that come as files; empty for tensors.
            picture: format of the answer; empty for tensors.
            client_s: of clients on the same machine, per request.
            num_fronts: processes that accept requests.
        """
        decode_s = self.decode_s[photo] if photo else 0.0
        picture_s = self.picture_s[picture] if picture else 0.0
        alone = {"request_s": self.request_s, "item_s": self.item_s}
        python = asdict(self.behind_fronts) if num_fronts > 1 else alone
        return Costs(decode_s=decode_s, picture_s=picture_s, batch=batch, client_s=client_s, **python)

    def save(self, file: Path) -> None:
        """Write them as JSON."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def load_host_costs(file: Path = HOST_COSTS) -> HostCosts:
    """Read what `HostCosts.save` wrote.

    Raises:
        OSError: there is no such file.
        ValueError, TypeError: it holds something else.
    """
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["batch_s"] = tuple(fields["batch_s"])
    fields["behind_fronts"] = FrontCosts(**fields["behind_fronts"])
    return HostCosts(**fields)
