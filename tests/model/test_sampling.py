"""Samplers against closed forms: of Gaussian data every velocity, score and result is known."""

import math
from itertools import pairwise

import pytest
import torch

from model.errors import SamplingError
from model.generator import Generator, default_shift
from model.networks.dit import GeneratorConfig
from model.sampling import (
    Auto,
    ClassifierFree,
    ode_grid,
    sample_noise,
    sample_ode,
    sample_sde,
    sde_grid,
)
from tests.model.networks.test_dit import SMALL, randomized

RAE_SHIFT = math.sqrt(768 * 16 * 16 / 4096)


class GaussianData:
    """The exact velocity where each number of the data is N(mean, std^2) by itself."""

    def __init__(self, std, mean=0.0):
        self.std, self.mean, self.calls = std, mean, []

    def velocity(self, latents, time, labels):
        self.calls.append(float(time[0]))
        t = time.double()[:, None, None, None]
        a, var = 1 - t, (1 - t) ** 2 * self.std**2 + t**2
        centred = latents.double() - a * self.mean
        noise = t / var * centred
        data = self.mean + a * self.std**2 / var * centred
        return noise - data


class Calls:
    """Counts the velocities that a generator is asked for."""

    def __init__(self, monkeypatch, *generators):
        self.batches = {}
        for generator in generators:
            self.batches[generator] = []
            original = generator.velocity

            def counted(latents, time, labels, g=generator, f=original):
                self.batches[g].append((float(time[0]), labels.tolist()))
                return f(latents, time, labels)

            monkeypatch.setattr(generator, "velocity", counted)


def make_generator(seed=0, **changes):
    config = GeneratorConfig(**{**SMALL.model_dump(), **changes})
    generator = Generator(config)
    generator.network = randomized(config, seed)
    return generator.requires_grad_(False)


def spread(sample, std, num_points, **options):
    """Standard deviation of samples of N(0, std^2), from noise of exactly unit variance."""
    noise = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    labels = torch.zeros(2, dtype=torch.int64)
    result = sample(GaussianData(std), noise.double(), labels, num_points=num_points, **options)
    return float(result.square().mean().sqrt())


def test_the_grid_is_that_of_rae():
    grid = ode_grid(50, RAE_SHIFT)
    u = torch.linspace(1, 0.001, 50)
    assert torch.equal(grid, RAE_SHIFT * u / (1 + (RAE_SHIFT - 1) * u))
    assert grid.dtype == torch.float32
    assert float(grid[-2]) == pytest.approx(0.1315, abs=1e-4)
    assert float(grid[-1]) == pytest.approx(0.00689, abs=1e-5)
    assert torch.equal(ode_grid(50, RAE_SHIFT, final_step=True), torch.cat([grid, torch.zeros(1)]))


def test_the_default_shift_follows_the_latents_size():
    assert default_shift((768, 16, 16)) == pytest.approx(6.9282, abs=1e-4)
    assert default_shift((768, 32, 32)) == pytest.approx(13.856, abs=1e-3)
    assert default_shift((4, 8, 8)) == 1.0


@pytest.mark.parametrize("std", [0.3, 1.0])
@pytest.mark.parametrize("num_points", [50, 250])
def test_euler_on_gaussian_data_gives_the_exact_spread(std, num_points):
    """Every step is linear, so the result is a product; RAE's is known to about half a percent."""
    measured = {(0.3, 50): 0.246, (0.3, 250): 0.288, (1.0, 50): 0.931, (1.0, 250): 0.982}
    expected = 1.0
    u = [1 - 0.999 * k / (num_points - 1) for k in range(num_points)]
    times = [RAE_SHIFT * x / (1 + (RAE_SHIFT - 1) * x) for x in u]
    for t, after in pairwise(times):
        expected *= 1 - (t - after) * (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    found = spread(sample_ode, std, num_points, shift=RAE_SHIFT)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(measured[std, num_points], rel=5e-3)


def test_the_final_step_and_higher_orders_come_closer():
    euler = spread(sample_ode, 0.3, 250, shift=RAE_SHIFT)
    for method in ("midpoint", "heun"):
        found = spread(sample_ode, 0.3, 250, shift=RAE_SHIFT, method=method, final_step=True)
        assert abs(found - 0.3) < 0.002 < abs(euler - 0.3)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_methods_converge_with_their_order(method, order):
    options = {"shift": 1.0, "method": method, "final_step": True}
    errors = [abs(spread(sample_ode, 0.7, points, **options) - 0.7) for points in (81, 161)]
    assert math.log2(errors[0] / errors[1]) > order - 0.1


def test_rae_evaluates_one_velocity_less_than_points():
    data = GaussianData(1)
    noise, labels = torch.zeros(1, 768, 16, 16), torch.zeros(1, dtype=torch.int64)
    sample_ode(data, noise, labels, num_points=50)
    assert len(data.calls) == 49
    assert data.calls == ode_grid(50, RAE_SHIFT)[:-1].tolist()


@pytest.mark.parametrize(("std", "expected"), [(0.3, 0.289), (1.0, 0.984)])
def test_the_repaired_sde_gives_the_known_spread(std, expected):
    """The variance is followed exactly: every step is linear, and its noise independent."""
    # Sample 0 has one unit in the start, sample k in the noise of step k.
    impulses = torch.eye(250, dtype=torch.float64)
    responses = sample_sde(
        GaussianData(std),
        impulses[0].reshape(250, 1, 1, 1),
        torch.zeros(250, dtype=torch.int64),
        lambda step: impulses[step].reshape(250, 1, 1, 1),
        250,
        RAE_SHIFT,
    )
    assert float(responses.norm()) == pytest.approx(expected, rel=5e-3)


def test_the_repaired_sde_ends_where_its_last_step_begins():
    assert float(sde_grid(250, RAE_SHIFT)[-1]) == pytest.approx(0.04, abs=1e-6)


def test_samplers_find_the_mean():
    noise = sample_noise(0, range(4), (2, 3, 3)).double()
    labels = torch.zeros(4, dtype=torch.int64)
    data = GaussianData(std=0.01, mean=1.5)
    ode = sample_ode(data, noise, labels, num_points=100, final_step=True)
    sde = sample_sde(data, noise, labels, lambda k: sample_noise(0, range(4), (2, 3, 3), draw=k), 100)
    assert torch.allclose(ode.mean(), torch.tensor(1.5).double(), atol=0.02)
    assert torch.allclose(sde.mean(), torch.tensor(1.5).double(), atol=0.05)


def test_noise_belongs_to_the_sample():
    whole = sample_noise(7, range(6), (3, 2, 2))
    assert torch.equal(whole[4:], sample_noise(7, [4, 5], (3, 2, 2)))
    assert not torch.equal(whole, sample_noise(8, range(6), (3, 2, 2)))
    assert not torch.equal(whole, sample_noise(7, range(6), (3, 2, 2), draw=1))


@pytest.mark.parametrize("guidance", ["none", "free", "auto"])
def test_samples_do_not_depend_on_the_batch(guidance):
    generator, guide = make_generator(), make_generator(seed=3, trunk_depth=1)
    chosen = {"none": None, "free": ClassifierFree(2.0), "auto": Auto(guide, 1.5)}[guidance]
    noise, labels = sample_noise(0, range(5), SMALL.latent_shape), torch.tensor([0, 1, 2, 3, 4])
    whole = sample_ode(generator, noise, labels, 6, guidance=chosen)
    parts = [
        sample_ode(generator, noise[part], labels[part], 6, guidance=chosen)
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-4)


def test_guidance_evaluates_each_network_once_per_step(monkeypatch):
    generator, guide = make_generator(), make_generator(seed=3, trunk_depth=1)
    calls = Calls(monkeypatch, generator, guide)
    noise, labels = sample_noise(0, [0, 1], SMALL.latent_shape), torch.tensor([1, 2])
    sample_ode(generator, noise, labels, 5, guidance=Auto(guide, 1.5))
    assert [labels for _, labels in calls.batches[generator]] == [[1, 2]] * 4
    assert calls.batches[guide] == calls.batches[generator]
    calls.batches[generator].clear()
    sample_ode(generator, noise, labels, 5, guidance=ClassifierFree(2.0))
    assert [labels for _, labels in calls.batches[generator]] == [[1, 2, 5, 5]] * 4


def test_the_interval_is_inclusive_and_of_shifted_times(monkeypatch):
    generator, guide = make_generator(), make_generator(seed=3, trunk_depth=1)
    calls = Calls(monkeypatch, guide)
    grid = ode_grid(6, 3.0).tolist()
    noise, labels = sample_noise(0, [0], SMALL.latent_shape), torch.tensor([1])
    sample_ode(generator, noise, labels, 6, 3.0, Auto(guide, 1.5, (grid[3], grid[1])))
    assert [time for time, _ in calls.batches[guide]] == grid[1:4]


def test_guidance_is_the_formula():
    generator, guide = make_generator(), make_generator(seed=3, trunk_depth=1)
    noise, labels = sample_noise(0, [0, 1], SMALL.latent_shape), torch.tensor([1, 2])
    times, null = torch.ones(2), torch.full((2,), 5)
    strong, weak, free = (
        generator.velocity(noise, times, labels),
        guide.velocity(noise, times, labels),
        generator.velocity(noise, times, null),
    )
    size = float(ode_grid(2, 2.0)[1] - ode_grid(2, 2.0)[0])
    for guidance, expected in (
        (None, strong),
        (Auto(guide, 1.42), weak + 1.42 * (strong - weak)),
        (ClassifierFree(2.5), free + 2.5 * (strong - free)),
        (ClassifierFree(1.0), strong),
        (ClassifierFree(0.0), strong),  # off up to 1, as in RAE
        (Auto(guide, 2.0, (0.0, 0.5)), strong),
    ):
        found = sample_ode(generator, noise, labels, 2, 2.0, guidance)
        assert torch.allclose(found, noise + size * expected, atol=1e-4)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("kind", ["free", "auto"])
def test_impossible_scales_are_refused(scale, kind):
    with pytest.raises(SamplingError, match="scale"):
        ClassifierFree(scale) if kind == "free" else Auto(GaussianData(1), scale)


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.5), (math.nan, 1.0)])
def test_impossible_intervals_are_refused(interval):
    with pytest.raises(SamplingError, match="interval"):
        ClassifierFree(2.0, interval)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_points": 1}, "points"),
        ({"shift": 0.5}, "shift"),
        ({"shift": math.nan}, "shift"),
        ({"method": "dopri5"}, "dopri5"),
        ({"labels": torch.tensor([6])}, "labels"),
        ({"labels": torch.tensor([-1])}, "labels"),
        ({"labels": torch.tensor([0, 1])}, "labels"),
        ({"labels": torch.tensor([0.5])}, "labels"),
        ({"noise": torch.zeros(1, 12, 5, 4)}, "noise"),
        ({"guidance": "another shape"}, "latent_shape"),
        ({"guidance": "other classes"}, "num_classes"),
    ],
)
def test_bad_input_is_told(options, words):
    given = {"noise": torch.zeros(1, *SMALL.latent_shape), "labels": torch.tensor([0]), **options}
    if given.get("guidance") == "another shape":
        given["guidance"] = Auto(make_generator(latent_channels=16), 1.5)
    if given.get("guidance") == "other classes":
        given["guidance"] = Auto(make_generator(num_classes=7), 1.5)
    with pytest.raises(SamplingError, match=words):
        sample_ode(make_generator(), **given)
