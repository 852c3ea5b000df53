"""The fusion operator's implementations on one set of random weights, with what each one counts.

Shape legend: B batch, N patch tokens, P prefix tokens, C width, H expert hidden width, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import counts as counting
from benchmarks.cases.counts import FusionSize
from benchmarks.harness.runner import UnavailableError
from benchmarks.harness.timing import Call
from kernels import folded, reference
from kernels.dispatch import FusionProblem, Platform, obstacle
from kernels.operands import ExpertWeights, FoldedExperts, FusionSpec
from model.networks.folding import fold_experts

if TYPE_CHECKING:
    from kernels.fused import PackedExperts

NUM_PREFIX_TOKENS = 5  # a class token and four registers, which the encoder's views skip
GRAPH_WARMUP_CALLS = 3
SPEC = FusionSpec()

States = Sequence[Tensor]


@dataclass(frozen=True)
class Operands:
    """Random weights of one expert width; the forms that implementations read are made when asked for."""

    num_layers: int
    width: int
    hidden_width: int
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(repr=False)

    @cached_property
    def exact(self) -> ExpertWeights:
        """Float64 on the CPU. Every term of the operator is there: gains, shifts, weights of both signs."""
        layers = range(self.num_layers)
        width, hidden_width, num_inputs = self.width, self.hidden_width, self.num_layers * self.width
        return ExpertWeights(
            up=[self._normal(hidden_width, width) / width**0.5 for _ in layers],
            gain=[1 + 0.3 * self._normal(hidden_width) for _ in layers],
            shift=[0.3 * self._normal(hidden_width) for _ in layers],
            down=[self._normal(width, hidden_width) / hidden_width**0.5 for _ in layers],
            router_weight=self._normal(self.num_layers, num_inputs) / num_inputs**0.5,
            router_bias=self._normal(self.num_layers),
        )

    @cached_property
    def definition(self) -> ExpertWeights:
        return cast_weights(self.exact, self.device, self.dtype)

    @cached_property
    def folded(self) -> FoldedExperts:
        return self._folded_exact.to(self.device, self.dtype)

    @cached_property
    def packed(self) -> "PackedExperts":
        from kernels import fused  # triton is needed by this form alone

        return fused.pack_experts(self._folded_exact, self.device, self.dtype)

    @cached_property
    def packed_fp8(self) -> "PackedExperts":
        from kernels import fused

        return fused.pack_experts(self._folded_exact, self.device, self.dtype, fp8_norms=True)

    @cached_property
    def _folded_exact(self) -> FoldedExperts:
        return fold_experts(self.exact, SPEC)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).double()


@dataclass(frozen=True)
class Implementation:
    """One implementation: how it is made ready, and its operations and bytes."""

    build: Callable[[Operands, States], Call]
    operations: Callable[[FusionSize], int]
    moved_bytes: Callable[[FusionSize], int] | None
    """None where a compiler decides."""


def cast_weights(weights: ExpertWeights, device: torch.device | str, dtype: torch.dtype) -> ExpertWeights:
    """The same weights elsewhere, or of another dtype."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=dtype)
        return value and [cast(part) for part in value]

    return replace(weights, **{part.name: cast(getattr(weights, part.name)) for part in fields(weights)})


def random_states(operands: Operands, batch: int, tokens: int) -> list[Tensor]:
    """Hidden states as the encoder gives them: L views [B, N, C] of [B, P + N, C], behind prefix tokens."""
    seed = int(torch.randint(2**62, (), generator=operands.generator))
    generator = torch.Generator(operands.device).manual_seed(seed)
    shape = (batch, NUM_PREFIX_TOKENS + tokens, operands.width)
    return [
        torch.randn(shape, generator=generator, device=operands.device, dtype=operands.dtype)[
            :, NUM_PREFIX_TOKENS:
        ]
        for _ in range(operands.num_layers)
    ]


def why_unavailable(name: str, problem: FusionProblem, platform: Platform) -> str | None:
    """Why an implementation cannot run at any batch size; None where it can be tried."""
    if not name.startswith("fused"):
        return None
    if platform.is_interpreted:
        return "Triton's interpreter (TRITON_INTERPRET) is no implementation to time"
    return obstacle("triton_fp8" if "fp8" in name else "triton", problem, platform)


def _build_definition(operands: Operands, states: States) -> Call:
    weights = operands.definition
    return lambda: reference.fuse_layers(states, weights, SPEC).tokens


def _build_definition_compiled(operands: Operands, states: States) -> Call:
    compiled = torch.compile(reference.fuse_layers, dynamic=False, fullgraph=True)
    weights = operands.definition
    return lambda: compiled(states, weights, SPEC).tokens


def _build_folded(operands: Operands, states: States) -> Call:
    experts = operands.folded
    return lambda: folded.fuse_layers(states, experts, SPEC).tokens


def _build_fused(operands: Operands, states: States) -> Call:
    from kernels import fused

    fuse = partial(fused.fuse_layers, states, operands.packed, SPEC)
    return lambda: fuse().tokens


def _build_fused_fp8(operands: Operands, states: States) -> Call:
    from kernels import fused

    fuse = partial(fused.fuse_layers, states, operands.packed_fp8, SPEC)
    return lambda: fuse().tokens


def _build_fused_graph(operands: Operands, states: States) -> Call:
    """Replays of a CUDA graph: the kernels without the time that launching them takes."""
    if operands.device.type != "cuda":
        raise UnavailableError("CUDA graphs need a CUDA device")
    call = _build_fused(operands, states)
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARMUP_CALLS):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = call()
    tokens.fill_(float("nan"))  # a replay that does not write everything shows in the check

    def replay() -> Tensor:
        graph.replay()
        return tokens

    return replay


def sweep() -> "dict[str, Implementation]":
    """The graph of the fused kernels with other tiles, or with the layers split otherwise."""
    from kernels.launches import Split, Tile

    shapes = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 6)]
    shapes += [(128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (64, 256, 64, 4, 3), (64, 128, 64, 4, 4)]
    choices: dict[str, tuple[str, Any]] = {
        f"fused_{rows}x{columns}x{depth}_w{warps}_s{stages}": (
            "product_tile",
            Tile(rows, columns, depth, warps, stages),
        )
        for rows, columns, depth, warps, stages in shapes
    }
    choices |= {f"fused_split{number}": ("split_layers", Split(number, 0)) for number in (1, 2, 3, 4)}
    return {
        name: replace(IMPLEMENTATIONS["fused_graph"], build=partial(_build_with, *choice))
        for name, choice in choices.items()
    }


def _build_with(function: str, choice: Any, operands: Operands, states: States) -> Call:
    """A graph whose launches were planned with one function of `kernels.launches` giving a choice of ours."""
    from kernels import launches

    with mock.patch.object(launches, function, return_value=choice):
        return _build_fused_graph(operands, states)


IMPLEMENTATIONS = {
    "definition": Implementation(
        _build_definition, counting.definition_operations, counting.definition_bytes
    ),
    "definition_compiled": Implementation(_build_definition_compiled, counting.definition_operations, None),
    "folded": Implementation(_build_folded, counting.folded_executed_operations, counting.folded_bytes),
    "fused": Implementation(_build_fused, counting.fused_executed_operations, counting.fused_bytes),
    "fused_fp8": Implementation(_build_fused_fp8, counting.fused_executed_operations, counting.fused_bytes),
    "fused_graph": Implementation(
        _build_fused_graph, counting.fused_executed_operations, counting.fused_bytes
    ),
}
