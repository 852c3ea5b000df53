"""The model of the service against what queueing theory says, and its command."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.sizing import __main__ as sizing
from benchmarks.sizing.costs import FrontCosts, HostCosts
from benchmarks.sizing.simulation import BatchCost, Costs, Machine, Traffic, simulate

COSTS = Costs(
    request_s=1e-3, item_s=0.0, decode_s=4e-3, picture_s=0.0, batch=BatchCost(fixed_s=2e-3, item_s=1e-3)
)
FRONTED = replace(COSTS, front_request_s=6e-3)
GPU = Machine(num_cores=16, num_decoders=8, batch_size=8)
FRONTS = FrontCosts(request_s=1e-4, item_s=1e-5, front_request_s=1e-3, front_item_s=1e-4)
HOST = HostCosts(
    "a machine", "a commit", 1e-3, 1e-4, 3e-5, {"256x256": 2e-3}, {"png": 5e-3}, (1e-3, 6e-2), FRONTS
)


def test_alone_a_request_takes_the_sum_of_its_steps() -> None:
    outcome = simulate(GPU, COSTS, Traffic(clients=1), num_requests=20)
    assert outcome.p50_ms == pytest.approx(1 + 4 + 2 + 1)
    assert outcome.p99_ms == pytest.approx(outcome.p50_ms)
    many = simulate(GPU, COSTS, Traffic(clients=1, images_per_request=8), num_requests=20)
    assert many.p50_ms == pytest.approx(1 + 4 + 2 + 8)  # decoded side by side, one batch
    behind = replace(COSTS, front_request_s=3e-3)
    outcome = simulate(replace(GPU, num_fronts=2), behind, Traffic(clients=1), num_requests=20)
    assert outcome.p50_ms == pytest.approx(3 + 1 + 4 + 2 + 1)


@pytest.mark.parametrize(
    ("machine", "costs", "rate", "bottleneck"),
    [
        (GPU, COSTS, 8 / 10e-3, "engines"),  # a full batch after the other
        (GPU, replace(COSTS, request_s=2e-3), 500, "interpreter"),
        (replace(GPU, num_fronts=3), FRONTED, 500, "fronts"),
        (
            replace(GPU, num_fronts=9),
            replace(COSTS, request_s=2e-3, front_request_s=3e-3),
            500,
            "interpreter",
        ),
        (replace(GPU, num_decoders=2), COSTS, 500, "decoders"),
        (replace(GPU, num_cores=2), replace(COSTS, request_s=1e-4), 2 / 4.1e-3, "cores"),
        (replace(GPU, num_writers=2), replace(COSTS, picture_s=8e-3), 250, "writers"),
    ],
)
def test_under_load_the_slowest_step_decides(
    machine: Machine, costs: Costs, rate: float, bottleneck: str
) -> None:
    outcome = simulate(machine, costs, Traffic(clients=256), num_requests=2000)
    assert outcome.images_per_s == pytest.approx(rate, rel=0.06)
    assert outcome.busy[bottleneck] == pytest.approx(1, abs=0.06)
    assert all(share <= 1.02 for share in outcome.busy.values())


def test_engines_that_compute_share_the_cores_with_the_rest() -> None:
    machine = Machine(num_cores=2, num_decoders=2, num_engines=2, batch_size=8, computes=True)
    costs = Costs(1e-3, 0.0, 3e-3, 0.0, BatchCost(0.0, 20e-3), client_s=1e-3)
    outcome = simulate(machine, costs, Traffic(clients=64))
    assert outcome.images_per_s == pytest.approx(2 / 25e-3, rel=0.03)


def test_random_arrivals_wait_as_long_as_queueing_theory_says() -> None:
    """One server of constant service time (M/D/1), which works half of the time."""
    costs = Costs(0.0, 0.0, 10e-3, 0.0, BatchCost(0.0, 0.0))
    machine = Machine(num_cores=1, num_decoders=1)
    outcome = simulate(machine, costs, Traffic(requests_per_s=50), num_requests=10_000)
    assert outcome.images_per_s == pytest.approx(50, rel=0.03)
    assert outcome.busy["decoders"] == pytest.approx(0.5, abs=0.02)
    assert outcome.p50_ms == pytest.approx(10, abs=2.5)
    # P(wait > t) is about exp(-1.2564 t / service) times a constant near 1 at this load.
    assert outcome.p99_ms == pytest.approx(10 + 10 * math.log(100) / 1.2564 * 0.9, rel=0.15)


def test_a_run_is_the_same_each_time() -> None:
    traffic = Traffic(requests_per_s=300)
    assert simulate(GPU, COSTS, traffic) == simulate(GPU, COSTS, traffic)
    assert simulate(GPU, COSTS, traffic) != simulate(GPU, COSTS, traffic, seed=1)


def test_costs_are_read_as_they_were_saved_and_give_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "costs.json"
    host = replace(HOST, decode_s=dict.fromkeys(("256x256", "500x375", "1920x1440", "4000x3000"), 2e-3))
    replace(host, picture_s={"png": 5e-3, "jpeg": 1e-3}).save(file)
    flags = ["--costs", str(file), "--requests", "60", "--plot", str(tmp_path / "a.png"), "--fronts", "2"]
    assert sizing.main(["node", *flags]) == 0
    assert "encode, JPEG 256x256 to latents, 1 per request" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size
