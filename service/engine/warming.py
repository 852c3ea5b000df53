"""Warming: how long a runner's batches take, and which sizes are fast enough."""

import math
import time
from collections.abc import Mapping

from model.tokenizer import Tokenizer
from service.engine.operations import OPERATIONS, RECONSTRUCT, BatchKey, Operation
from service.engine.runners import Runner

SLACK = 2.0
"""A batch counts as hung once it takes this many times its measured duration."""
_NUM_SAMPLES = 3
_MEASURE_S = 2.0


def measure(runner: Runner, tokenizer: Tokenizer) -> Mapping[Operation, float]:
    """Seconds that one batch of the largest bucket takes, by operation that the tokenizer can run."""
    return {
        operation: _best_s(runner, tokenizer, operation.usual, runner.buckets[-1], _MEASURE_S)
        for operation in OPERATIONS
        if operation.keys(tokenizer)
    }


def fast_buckets(runner: Runner, tokenizer: Tokenizer, limit_s: float) -> tuple[int, ...]:
    """Run the buckets, ascending: keeps the smallest, and those that take well below ``limit_s``."""
    key = RECONSTRUCT.usual  # encodes and decodes: nothing takes longer
    kept: list[int] = []
    for bucket in runner.buckets:
        batch_s = _best_s(runner, tokenizer, key, bucket, SLACK * limit_s, enough_s=limit_s / SLACK)
        if kept and batch_s * SLACK > limit_s:
            break
        kept.append(bucket)
    return tuple(kept)


def _best_s(
    runner: Runner,
    tokenizer: Tokenizer,
    key: BatchKey,
    num_items: int,
    budget_s: float,
    enough_s: float = 0.0,
) -> float:
    """Seconds that a batch takes: the best of several samples, since others may hold up any of them.

    Args:
        runner: its thread is this one.
        tokenizer: of the runner.
        key: kind of the batch.
        num_items: a bucket.
        budget_s: no further sample is begun after it.
        enough_s: nor once one was as good as this.
    """
    inputs = [key.operation.sample(tokenizer)] * num_items
    began_s, best_s = time.monotonic(), math.inf
    for _ in range(_NUM_SAMPLES):
        best_s = min(best_s, runner.launch(key, inputs).wait().device_s)
        if best_s <= enough_s or time.monotonic() - began_s > budget_s:
            break
    return best_s
