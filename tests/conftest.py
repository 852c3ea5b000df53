"""What the whole suite shares: Triton without a GPU, the gpu marker, and random cases of the fusion.

Shape legend: B batch, N tokens, C width, H expert hidden width, L layers.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.operands import ExpertWeights, Fused, FusionSpec

# Without a GPU the kernels run in Triton's interpreter, which is chosen when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

NUM_PREFIX_TOKENS = 5  # a class token and four registers


# Files and folders that start processes, train, or interpret kernels: all their tests are marked ``slow``.
SLOW = (
    "cli/commands/test_serve.py",
    "cli/test_fusion_paths.py",
    "cli/test_import_export.py",
    "cli/test_streams.py",
    "client/test_many.py",
    "deploy/test_monitoring.py",
    "kernels/test_fused.py",
    "kernels/test_resources.py",
    "model/interop/test_from_diffusers.py",
    "model/interop/test_to_diffusers.py",
    "service/engine/test_engine.py",
    "service/pages/test_page.py",
    "service/photos/test_pool.py",
    "service/processes/fronts/test_fronts.py",
    "service/test_server.py",
    "service/test_start.py",
    "test_bundled.py",
    "training/data/crops",
    "training/data/test_workers.py",
    "training/distributed",
    "training/evaluation",
    "training/latents/on_ray",
    "training/latents/reading/test_datasets.py",
    "training/latents/storage/test_inputs.py",
    "training/latents/test_tokenize.py",
    "training/phases/test_reconstruction.py",
    "training/planning",
    "training/studies",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [Path(__file__).parent / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker("slow")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@dataclass(frozen=True)
class FusionCase:
    """One random fusion problem: weights in float64, hidden states as an encoder gives them."""

    num_layers: int = 2
    width: int = 64
    hidden_width: int = 96
    batch: int = 1
    num_tokens: int = 9
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    spec: FusionSpec = field(default_factory=FusionSpec)
    has_shift: bool = True
    affine: str = "none"
    """LN_bb's affine part: ``none``, ``weight`` or ``weight and bias``."""
    spread: float = 0.0
    """Rows and columns of the experts, and their gains, are scaled by ``10 ** uniform(-spread, spread)``."""
    outlier: float = 0.0
    """Added to one channel of every token."""
    mean: float = 0.0
    """Added to every channel of every token."""
    seed: int = 0

    @cached_property
    def weights(self) -> ExpertWeights:
        """Float64, on the CPU."""
        width, hidden, layers = self.width, self.hidden_width, range(self.num_layers)
        randn, scales = self._generator("weights")
        return ExpertWeights(
            up=[randn(hidden, width) / width**0.5 * scales(hidden, 1) * scales(1, width) for _ in layers],
            gain=[(1 + 0.3 * randn(hidden)) * scales(hidden) for _ in layers],
            shift=[0.3 * self.has_shift * randn(hidden) for _ in layers],
            down=[randn(width, hidden) / hidden**0.5 * scales(width, 1) * scales(1, hidden) for _ in layers],
            router_weight=randn(self.num_layers, self.num_layers * width) / (self.num_layers * width) ** 0.5,
            router_bias=randn(self.num_layers),
            norm_weight=None if self.affine == "none" else 1 + 0.3 * randn(width),
            norm_bias=0.5 * randn(width) if self.affine == "weight and bias" else None,
        )

    @cached_property
    def states(self) -> list[Tensor]:
        """z^(k), [B, N, C] each: views behind prefix tokens, which are NaN so that reading one shows."""
        randn, _ = self._generator("states")
        outlier_channel = self.seed % self.width
        states = []
        for layer in range(self.num_layers):
            tokens = (1 + layer) * randn(self.batch, NUM_PREFIX_TOKENS + self.num_tokens, self.width)
            tokens += self.mean
            tokens[..., outlier_channel] += self.outlier
            tokens[:, :NUM_PREFIX_TOKENS] = float("nan")
            states.append(tokens.to(device=self.device, dtype=self.dtype)[:, NUM_PREFIX_TOKENS:])
        return states

    @cached_property
    def expected(self) -> Fused:
        """The definition in float64, on the hidden states as they were rounded."""
        exact = [state.double() for state in self.states]
        return reference.fuse_layers(exact, self.cast_weights(torch.float64), self.spec)

    @cached_property
    def unfolded(self) -> Fused:
        """The definition in the hidden states' dtype."""
        return reference.fuse_layers(self.states, self.cast_weights(self.dtype), self.spec)

    def cast_weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The weights on the hidden states' device."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device=self.device, dtype=dtype)
            return value and [cast(part) for part in value]

        return replace(
            self.weights,
            **{part.name: cast(getattr(self.weights, part.name)) for part in fields(ExpertWeights)},
        )

    def error(self, found: Fused) -> float:
        """``|found - expected| / |expected|``, the larger of tokens' and router weights'."""
        return max(relative_error(f, e) for f, e in zip(found, self.expected, strict=True))

    def router_error(self, found: Fused) -> float:
        """``|found - expected| / |expected|`` of the router weights alone."""
        return relative_error(found.router_weights, self.expected.router_weights)

    def median_token_error(self, found: Fused) -> float:
        """The median over tokens of ``|found - expected| / |expected|``.

        A single token may have an error of any size: one whose layers cancel.
        """
        expected = self.expected.tokens
        difference = found.tokens.double() - expected
        return float((difference.norm(dim=-1) / expected.norm(dim=-1)).median())

    def _generator(self, purpose: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Normal deviates, and powers of ten by ``spread``; seeded by the case, alike on every device."""
        description = f"{replace(self, device='cpu')} {purpose}"
        generator = torch.Generator().manual_seed(zlib.crc32(description.encode()))

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def scales(*shape: int) -> Tensor:
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            return 10 ** (self.spread * (2 * uniform - 1))

        return randn, scales


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in float64; absolute where all that is expected is zeros."""
    difference = float((found.double() - expected.double()).norm())
    return difference / (float(expected.norm()) or 1.0)


@pytest.fixture(scope="session")
def fusion_case() -> Callable[..., FusionCase]:
    """Builds a case; keyword arguments are its fields, and those of its spec."""

    def build(**options: Any) -> FusionCase:
        own = {part.name for part in fields(FusionCase)}
        spec = FusionSpec(**{name: value for name, value in options.items() if name not in own})
        return FusionCase(spec=spec, **{name: value for name, value in options.items() if name in own})

    return build
