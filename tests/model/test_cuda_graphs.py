"""Captures: buckets, and that encodes and decodes hold nothing that a CUDA graph cannot."""

import copy
import sys
import threading
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import EncoderConfig
from model.cuda_graphs import CapturedBuckets, bucket_for
from model.networks.linear import Linear
from model.tokenizer import Tokenizer

PATHS = ("reference", "folded", "triton")
# What waits for the device, makes shapes depend on data, or brings new host data in.
NOT_CAPTURABLE = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::item",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique",
}


class Recorder(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=PATHS)
def loaded(request, tiny_config, randomize, tmp_path_factory) -> Tokenizer:
    """As wide as the kernels need, and no larger: Triton's interpreter is slow."""
    config = tiny_config(hidden_width=64)
    sizes = config.encoder.model_dump() | {"width": 64}
    tokenizer = Tokenizer(config.model_copy(update={"encoder": EncoderConfig(**sizes)}))
    randomize(tokenizer)
    tokenizer.set_statistics(torch.zeros(64, 4, 4), torch.ones(64, 4, 4))
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tokenizer.save(path)
    loaded = Tokenizer.load(path, fusion=request.param)
    for part in loaded.modules():
        if isinstance(part, Linear):
            part._packed = None  # as on a GPU
    return loaded


def photo(seed: int = 0, side: int = 256) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_encode_and_decode_run_nothing_that_a_capture_forbids(loaded):
    with Recorder() as recorder:
        latents = loaded.latents(photo(side=64), normalize=True)
        with torch.no_grad():
            loaded.pixels(latents, normalize=True)
    assert "aten::addmm" in recorder.names or "aten::linear" in recorder.names
    assert recorder.names & NOT_CAPTURABLE == set()


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, of its dependencies
@pytest.mark.parametrize("loaded", ["folded"], indirect=True)
def test_compiled_blocks_give_the_same(loaded):
    """With the tracer alone, so bit for bit. All blocks of a kind share code, and all batches but of one."""
    images = photo(side=64).expand(4, -1, -1, -1)
    expected = [loaded.latents(images[:num]) for num in (4, 2, 1)]
    pixels = [loaded.pixels(latents) for latents in expected]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = copy.deepcopy(loaded).compile_blocks(backend="aot_eager")
    with torch.inference_mode():
        for num, latents, wanted in zip((4, 2, 1), expected, pixels, strict=True):
            assert torch.equal(compiled.latents(images[:num]), latents)
            assert torch.equal(compiled.pixels(latents), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert torch.equal(loaded.latents(images[:1]), expected[-1])  # the original is as it was


def test_recorder_notices_a_host_wait():
    with Recorder() as recorder:
        bool(photo().sum() > 0)
    assert recorder.names & NOT_CAPTURABLE


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, of its dependencies
def test_encode_traces_as_one_graph(loaded):
    with torch.no_grad():
        compiled = torch.compile(loaded.tokens, fullgraph=True, backend="eager")
        images = photo(side=64)
        torch.testing.assert_close(compiled(images), loaded.tokens(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_images", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_smallest_bucket_that_holds_the_batch(num_images, bucket):
    assert bucket_for(num_images, (1, 2, 4, 8)) == bucket


@pytest.mark.parametrize("num_images", [0, 9, -1])
def test_batch_that_fits_no_bucket(num_images):
    with pytest.raises(ValueError, match=rf"a batch of {num_images} items fits none of the buckets \[1, 8\]"):
        bucket_for(num_images, (1, 8))


def test_only_a_gpu_captures():
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, the example is on cpu"):
        CapturedBuckets(torch.neg, torch.zeros(1, 2), (1,))


def capture_encode(tokenizer: Tokenizer, buckets: tuple[int, ...]) -> CapturedBuckets:
    example = photo().expand(buckets[-1], -1, -1, -1).to(tokenizer.device, tokenizer.dtype)
    return CapturedBuckets(lambda images: tokenizer.latents(images, normalize=True), example, buckets)


@pytest.mark.gpu
@pytest.mark.parametrize("num_images", [1, 3, 4])
def test_captured_encode_equals_eager(num_images):
    tokenizer = Tokenizer.load("mini", device="cuda", dtype=torch.bfloat16)
    captured = capture_encode(tokenizer, (1, 4))
    for seed in range(3):  # fresh images each time: a replay must read what was copied in
        images = torch.cat([photo(seed + index) for index in range(num_images)])
        expected = tokenizer.encode(images, normalize=True)
        torch.testing.assert_close(captured(images), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
def test_captured_decode_equals_eager():
    tokenizer = Tokenizer.load("mini", device="cuda", dtype=torch.bfloat16)
    latents = tokenizer.encode(torch.cat([photo(0), photo(1)]))
    captured = CapturedBuckets(torch.inference_mode()(tokenizer.pixels), latents, (1, 2))
    torch.testing.assert_close(
        captured(latents.flip(0)), tokenizer.decode(latents.flip(0)), atol=5e-2, rtol=0
    )


@pytest.mark.gpu
def test_captured_results_outlive_the_next_call():
    captured = capture_encode(Tokenizer.load("mini", device="cuda", dtype=torch.bfloat16), (1, 2))
    first = captured(photo(0))
    copy = first.clone()
    captured(torch.cat([photo(1), photo(2)]))
    assert torch.equal(first, copy)


@pytest.mark.gpu
def test_captures_refuse_other_shapes():
    captured = capture_encode(Tokenizer.load("mini", device="cuda"), (1,))
    with pytest.raises(ValueError, match=r"expected \[B, 3, 256, 256\]"):
        captured(torch.rand(1, 3, 224, 224))
    with pytest.raises(ValueError, match="fits none of the buckets"):
        captured(torch.rand(2, 3, 256, 256))
    with pytest.raises(ValueError, match="the largest of"):
        CapturedBuckets(torch.neg, torch.zeros(3, device="cuda"), (1, 2))


class FakeExample:
    """A batch that says it is on a GPU."""

    device = torch.device("cuda:0")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, items: slice) -> "FakeExample":
        return self

    def clone(self) -> "FakeExample":
        return self


def test_one_capture_at_a_time(monkeypatch):
    """Warm-up included, whatever the device; and what other threads do meanwhile does not spoil it."""
    modes, inside, overlaps = [], [], []

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def graph(captured, pool, stream, capture_error_mode):
        assert isinstance(stream, Stream), "of this device, not the first capture's"
        modes.append(capture_error_mode)
        yield

    for name, stub in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "graph_pool_handle": object,
        "CUDAGraph": object,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    both_run = threading.Barrier(2)

    def function(batch):
        name = threading.current_thread().name
        inside.append(name)
        overlaps.append(len(set(inside)) > 1)
        time.sleep(0)  # lets the other thread run
        inside.remove(name)

    def capture():
        both_run.wait(60)
        for _ in range(20):
            CapturedBuckets(function, FakeExample(), (1, 2))

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=capture) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(switch_s)
    assert not any(overlaps)
    assert set(modes) == {"thread_local"}
