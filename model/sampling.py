"""Sampling from a generator: the probability-flow ODE, its stochastic twin, and guidance.

Times run from 1 (noise) to 0 (data) on the path ``x_t = (1 - t) x + t e``, whose velocity is ``v = e - x``.
Grids are float32 and stay in memory, so that no step waits for the device.

Shape legend: B batch, C latent channels, h w latent grid, K points of a grid.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import SamplingError
from model.generator import Generator, GeneratorConfig, default_shift

Method = Literal["euler", "midpoint", "heun"]
FIRST_ODE_TIME = 0.001  # of RAE's grid before the shift; the time nearest to data
LAST_SDE_TIME = 0.04  # where the SDE ends, after the shift; one step of this size follows
PURPOSE = 11  # keeps these draws apart from training's


class VelocityModel(Protocol):
    """What is sampled from: a `Generator`, or anything that gives velocities as one does."""

    def velocity(self, latents: Tensor, time: Tensor, labels: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFree:
    """``v_null + scale (v_class - v_null)`` (arXiv 2207.12598) at times within the interval; on from 1 up."""

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_scale(self.scale, self.interval)


@dataclass(frozen=True)
class Auto:
    """``v_guide + scale (v - v_guide)`` (arXiv 2406.02507) at times within the interval.

    The guide is a weaker generator of the same latents and classes.
    """

    guide: VelocityModel
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_scale(self.scale, self.interval)


Guidance = ClassifierFree | Auto
_Velocity = Callable[[Tensor, float], Tensor]


def shift_times(times: Tensor, shift: float) -> Tensor:
    """``s t / (1 + (s - 1) t)``: a larger shift gives more noise."""
    return shift * times / (1 + (shift - 1) * times)


def ode_grid(num_points: int, shift: float, final_step: bool = False) -> Tensor:
    """RAE's grid, descending, [K] float32: K points make K - 1 steps, and ``final_step`` one more to 0."""
    grid = shift_times(torch.linspace(1, FIRST_ODE_TIME, num_points), shift)
    return torch.cat([grid, torch.zeros(1)]) if final_step else grid


def sde_grid(num_points: int, shift: float) -> Tensor:
    """RAE's grid with its end repaired, descending to 0.04 after the shift, [K] float32."""
    last = LAST_SDE_TIME / (shift - (shift - 1) * LAST_SDE_TIME)
    return shift_times(torch.linspace(1, last, num_points), shift)


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normal noise of numbered samples, [B, *shape] float32 on the CPU.

    Noise depends on (seed, index, draw) alone, so a sample depends neither on its batch nor on its rank.
    """
    generator = torch.Generator()
    rows = []
    for index in indices:
        numbers = np.random.default_rng((seed, PURPOSE, draw, index))
        generator.manual_seed(int(numbers.integers(2**62)))
        rows.append(torch.randn(*shape, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def sample_ode(
    generator: VelocityModel,
    noise: Tensor,
    labels: Tensor,
    num_points: int = 50,
    shift: float | None = None,
    guidance: Guidance | None = None,
    *,
    method: Method = "euler",
    final_step: bool = False,
    progress: bool = False,
) -> Tensor:
    """Follow the probability-flow ODE from noise to data.

    Args:
        generator: gives velocities.
        noise: [B, C, h, w], standard normal.
        labels: [B] int64 classes.
        num_points: points K of the grid; Euler evaluates K - 1 velocities.
        shift: time shift; by default that of the latents' size.
        guidance: none, `ClassifierFree` or `Auto`.
        method: ``euler``; ``midpoint`` and ``heun`` evaluate twice per step.
        final_step: go on from the grid's last time (0.0069 for RAE) to 0.
        progress: show a bar.

    Returns:
        Normalised latents [B, C, h, w] in the type of ``noise``.

    Raises:
        SamplingError: labels, a grid, a shift or guidance that cannot be; says which.
    """
    velocity = _guided(generator, noise, labels, guidance)
    shift = _checked_shift(shift, noise)
    if method not in get_args(Method):
        raise SamplingError(f"there is no method {method!r}: it is {', '.join(get_args(Method))}")
    grid = ode_grid(_checked_points(num_points), shift, final_step)
    latents = noise
    for start, end in _steps(grid, progress):
        latents = _ode_step(velocity, latents, float(start), float(end), float(end - start), method)
    return latents


def _ode_step(
    velocity: _Velocity, latents: Tensor, start: float, end: float, size: float, method: Method
) -> Tensor:
    slope = velocity(latents, start)
    if method == "midpoint":
        slope = velocity(latents + slope * (size / 2), start + size / 2)
    elif method == "heun":
        slope = (slope + velocity(latents + slope * size, end)) / 2
    return latents + size * slope


@torch.no_grad()
def sample_sde(
    generator: VelocityModel,
    noise: Tensor,
    labels: Tensor,
    draw: Callable[[int], Tensor],
    num_points: int = 250,
    shift: float | None = None,
    guidance: Guidance | None = None,
    *,
    progress: bool = False,
) -> Tensor:
    """Follow the reverse SDE with diffusion D(t) = t (Euler-Maruyama), and one mean step at the end.

    RAE's own grid ends at another time than its last step assumes; `sde_grid` makes them agree.

    Args:
        generator, noise, labels, shift, guidance, progress: as for `sample_ode`.
        draw: gives the noise of step k from 1 on, [B, C, h, w], such as `sample_noise` with ``draw=k``.
        num_points: points K of the grid, and velocities that are evaluated.

    Returns:
        Normalised latents [B, C, h, w] in the type of ``noise``.

    Raises:
        SamplingError: as for `sample_ode`.
    """
    velocity = _guided(generator, noise, labels, guidance)
    grid = sde_grid(_checked_points(num_points), _checked_shift(shift, noise))
    latents = noise
    for number, (start, end) in enumerate(_steps(grid, progress), start=1):
        time, size = float(start), float(start - end)
        mean = latents - size * _drift(velocity, latents, time)
        latents = mean + math.sqrt(2 * time * size) * draw(number).to(latents)
    time = float(grid[-1])
    return latents - time * _drift(velocity, latents, time)


def _drift(velocity: _Velocity, latents: Tensor, time: float) -> Tensor:
    """``v - t score``, where the score is ``-((1 - t) v + x) / t``."""
    speed = velocity(latents, time)
    return speed + (1 - time) * speed + latents


def _guided(generator: VelocityModel, noise: Tensor, labels: Tensor, guidance: Guidance | None) -> _Velocity:
    """Velocity of latents at a time, each network evaluated once."""
    if isinstance(generator, Generator):
        generator.check_inputs(noise, labels)
    labels = labels.to(noise.device)
    plain = partial(_velocity, generator, labels)
    if isinstance(guidance, ClassifierFree):
        return _classifier_free(generator, labels, guidance) if guidance.scale > 1 else plain
    if isinstance(guidance, Auto):
        _check_guide(generator, guidance.guide)
        return _auto(plain, partial(_velocity, guidance.guide, labels), guidance)
    return plain


def _classifier_free(generator: VelocityModel, labels: Tensor, guidance: ClassifierFree) -> _Velocity:
    config: GeneratorConfig | None = getattr(generator, "config", None)
    if config is None:
        raise SamplingError("classifier-free guidance needs a model with a configuration, for its null class")
    both = torch.cat([labels, torch.full_like(labels, config.num_classes)])

    def guided(latents: Tensor, time: float) -> Tensor:
        if not _is_within(guidance.interval, time):
            return _velocity(generator, labels, latents, time)
        with_class, without = _velocity(generator, both, torch.cat([latents, latents]), time).chunk(2)
        return without + guidance.scale * (with_class - without)

    return guided


def _auto(plain: _Velocity, weak: _Velocity, guidance: Auto) -> _Velocity:
    def guided(latents: Tensor, time: float) -> Tensor:
        strong = plain(latents, time)
        if not _is_within(guidance.interval, time):
            return strong
        other = weak(latents, time)
        return other + guidance.scale * (strong - other)

    return guided


def _is_within(interval: tuple[float, float], time: float) -> bool:
    return interval[0] <= time <= interval[1]


def _velocity(generator: VelocityModel, labels: Tensor, latents: Tensor, time: float) -> Tensor:
    times = torch.full((len(latents),), time, dtype=torch.float32, device=latents.device)
    return generator.velocity(latents, times, labels).to(latents.dtype)


def _steps(grid: Tensor, progress: bool) -> "tqdm[tuple[Tensor, Tensor]]":
    pairs = list(pairwise(grid))
    return tqdm(pairs, desc="sampling", unit="step", disable=not progress, leave=False)


def _check_guide(generator: VelocityModel, guide: VelocityModel) -> None:
    if not (isinstance(generator, Generator) and isinstance(guide, Generator)):
        return
    for what in ("latent_shape", "num_classes"):
        wanted, found = getattr(generator.config, what), getattr(guide.config, what)
        if wanted != found:
            raise SamplingError(
                f"the guide {guide.config.name!r} has {what} {found}, and {generator.config.name!r} has "
                f"{wanted}: a guide makes the same latents of the same classes"
            )


def _check_scale(scale: float, interval: tuple[float, float]) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise SamplingError(f"guidance scale {scale}: expected a finite number from 0")
    if not 0 <= interval[0] <= interval[1] <= 1:  # also where one is NaN
        raise SamplingError(f"guidance interval {interval}: expected two times from 0 to 1, in order")


def _checked_points(num_points: int) -> int:
    if num_points < 2:
        raise SamplingError(f"{num_points} points: a grid has at least 2")
    return num_points


def _checked_shift(shift: float | None, noise: Tensor) -> float:
    if shift is None:
        return default_shift(noise.shape[1:])
    if not (math.isfinite(shift) and shift >= 1):
        raise SamplingError(f"time shift {shift}: expected a finite number from 1")
    return shift
