"""The fused operator against the float64 definition: natively on a GPU, in Triton's interpreter without.

Interpreted, the kernels' arithmetic is the same but for the order of sums; their speed and their use of
a GPU's resources are not seen.
"""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

from kernels import folded, fused, launches
from kernels.dispatch import MIN_FP8_CAPABILITY
from kernels.launches import FusedProblem, Gpu
from model.images.tensors import to_tensor
from model.networks.folding import fold_experts
from model.tokenizer import Tokenizer
from tests.conftest import relative_error

SAMPLES = Path(__file__).parents[2] / "samples"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of z_final with beta = 0.2. Observed, interpreted: 1.7e-7, 2.0e-3 and 2.4e-4. A GPU makes a float32
# product of three TF32 ones.
TOLERANCES = [
    (torch.float32, 1e-6 if DEVICE == "cpu" else 1e-5),
    (torch.bfloat16, 2.5e-3),
    (torch.float16, 3.5e-4),
]
TOLERANCE = dict(TOLERANCES)
each_dtype = pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)


@pytest.fixture
def build(fusion_case):
    """Builds a case on the device at hand."""
    return lambda **options: fusion_case(**{"device": DEVICE} | options)


def pack(case):
    return fused.pack_experts(fold_experts(case.weights, case.spec), case.device, case.dtype)


def fuse(case, packed=None):
    return fused.fuse_layers(case.states, packed or pack(case), case.spec)


def check(case, found=None, slack=1.0):
    """Right within the tolerance; in half precision also no worse than the definition run in it."""
    error = case.error(found or fuse(case))
    assert error <= slack * TOLERANCE[case.dtype]
    if case.dtype != torch.float32:
        assert error <= case.error(case.unfolded)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (64, torch.float32),
        (64, torch.bfloat16),
        (64, torch.float16),
        (192, torch.float32),
        (192, torch.bfloat16),
        (320, torch.float16),
        (768, torch.bfloat16),  # `test_full_size` has every dtype on a GPU; the interpreter is slow
    ],
)
def test_widths(build, width, dtype):
    case = build(width=width, hidden_width=2 * width, dtype=dtype)
    found = fuse(case)
    assert found.tokens.shape == (1, 9, width)
    assert found.tokens.dtype == dtype
    assert found.tokens.is_contiguous()
    assert found.router_weights.shape == (1, 9, 2)
    assert found.router_weights.dtype == torch.float32
    check(case, found)


@each_dtype
@pytest.mark.parametrize("num_tokens", [1, 7, 33, 65, 130])
def test_numbers_of_tokens(build, dtype, tolerance, num_tokens):
    check(build(num_tokens=num_tokens, dtype=dtype))


@pytest.mark.parametrize(("batch", "num_tokens"), [(2, 33), (5, 1), (3, 64)])
def test_several_images(build, batch, num_tokens):
    check(build(batch=batch, num_tokens=num_tokens, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("num_layers", "dtype"),
    [
        (1, torch.float32),
        (1, torch.bfloat16),
        (1, torch.float16),
        (12, torch.float32),
        (12, torch.bfloat16),
        (40, torch.bfloat16),
    ],
)
def test_numbers_of_layers(build, num_layers, dtype):
    check(build(num_layers=num_layers, dtype=dtype))


@pytest.mark.parametrize("hidden_width", [2, 24, 130, 1000])
def test_hidden_widths(build, hidden_width):
    case = build(width=192, hidden_width=hidden_width)
    packed = pack(case)
    assert packed.basis.shape[1] % launches.column_block(192, launches.MAX_COLUMNS) == 0
    check(case, fuse(case, packed))


@each_dtype
@pytest.mark.parametrize("routing", ["energy", "softmax"])
@pytest.mark.parametrize("correction", ["incremental", "replace"])
@pytest.mark.parametrize("router_input_norm", [True, False])
@pytest.mark.parametrize("has_shift", [True, False])
def test_options(build, dtype, tolerance, routing, correction, router_input_norm, has_shift):
    case = build(
        num_layers=3,
        dtype=dtype,
        routing=routing,
        correction=correction,
        router_input_norm=router_input_norm,
        has_shift=has_shift,
    )
    packed = pack(case)
    assert packed.has_shift == has_shift
    check(case, fuse(case, packed), slack=2 if correction == "replace" else 1)


@each_dtype
@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
def test_sizes_of_the_correction(build, dtype, tolerance, beta):
    check(build(beta=beta, dtype=dtype), slack=2)


@each_dtype
@pytest.mark.parametrize("outlier", [0, 1e3])
@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("spread", [0, 3])
def test_hard_inputs(build, dtype, tolerance, outlier, mean, spread):
    case = build(outlier=outlier, mean=mean, spread=spread, dtype=dtype)
    error = case.median_token_error(fuse(case))
    if dtype == torch.float32:  # raw tokens go through the product: of a mean of 100 some digits stay
        assert error <= 20 * tolerance
    else:
        assert error <= tolerance
        assert error <= case.median_token_error(case.unfolded) or spread  # which may overflow


@each_dtype
@pytest.mark.parametrize("width", [64, 192])
def test_statistics_of_tokens_far_from_zero(build, dtype, tolerance, width):
    case = build(width=width, mean=1e3, dtype=dtype)
    limit = 500 * tolerance if dtype == torch.float32 else case.router_error(case.unfolded)
    assert case.router_error(fuse(case)) <= limit


@each_dtype
@pytest.mark.parametrize("has_shift", [True, False])
def test_zero_variance_tokens(build, dtype, tolerance, has_shift):
    case = build(has_shift=has_shift, dtype=dtype)
    for state in case.states:
        state[:, 3] = 3.0
    found = fuse(case)
    assert found.tokens.isfinite().all()
    # LN_bb magnifies such a token's rounding errors a thousandfold.
    assert case.error(found) <= tolerance + 2e-2


@each_dtype
@pytest.mark.parametrize("routing", ["energy", "softmax"])
@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, 0.0, -2.0), (0.0, 0.0, 1e-30), (1e-20, 1.0, 0.0)])
def test_layers_without_weight(build, dtype, tolerance, routing, weights):
    """A token whose layers have no weight is dead: zero, not NaN. A layer without weight adds nothing."""
    case = build(num_layers=3, dtype=dtype, routing=routing)
    case.weights.router_weight.zero_()
    case.weights.router_bias.copy_(torch.tensor(weights))
    check(case)


@each_dtype
def test_tokens_that_vanish(build, dtype, tolerance):
    """Zeros in one layer, or in all: their scales are those of constant tokens."""
    case = build(num_layers=3, dtype=dtype, has_shift=False)
    case.states[1][:, 2] = 0
    for state in case.states:
        state[:, 4] = 0
    check(case)


@each_dtype
def test_router_of_tokens_with_a_large_outlier(build, dtype, tolerance):
    """The outlier's logit is large against the rest: the router keeps the digits that are left."""
    case = build(num_layers=3, width=192, num_tokens=40, outlier=1e4, seed=191, dtype=dtype)
    found = fuse(case)
    assert case.router_error(found) <= 1e-4
    check(case, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_of_tiny_numbers(build, dtype):
    case = build(dtype=dtype, num_tokens=40)
    case.weights.router_weight.mul_(1e-4)
    case.weights.router_bias.zero_()
    assert case.router_error(fuse(case)) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "gpu", "tile", "splits"),
    [
        (torch.bfloat16, Gpu(9, 1), (128, 256, 64), (1, 1)),
        (torch.bfloat16, Gpu(9, 4), (128, 256, 64), (1, 2)),
        (torch.bfloat16, Gpu(9, 128), (64, 128, 64), (2, 3)),
        (torch.float16, Gpu(8, 1), (128, 128, 32), (1, 1)),
        (torch.float16, Gpu(8, 128), (64, 128, 32), (2, 3)),
        (torch.float32, Gpu(9, 100), (64, 64, 32), (4, 3)),
        (torch.float32, Gpu(8, 1), (32, 64, 32), (1, 1)),
    ],
)
def test_tiles_and_splits(build, monkeypatch, dtype, gpu, tile, splits):
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < gpu.capability:
        pytest.skip("the tile is too large for this GPU")
    monkeypatch.setattr(launches, "SMALL_TILES", gpu.num_multiprocessors)
    monkeypatch.setattr(fused, "_gpu", lambda device: gpu)
    problem = FusedProblem(130, num_layers=3, width=256, basis_rows=256, dtype=dtype)
    plan = launches.plan_launches(problem, gpu)
    assert tuple(plan["combine"].constants[name] for name in ("BM", "BN", "BK")) == tile
    assert tuple(plan[name].constants["SPLITS"] for name in ("measure", "finish")) == splits
    check(build(num_layers=3, width=256, hidden_width=256, batch=2, num_tokens=65, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16},
        {"outlier": 1e4, "seed": 127},
        {"has_shift": False, "num_layers": 3, "batch": 2},
        {"hidden_width": 24, "routing": "softmax"},
        {"mean": 100, "router_input_norm": False},
    ],
)
def test_norms_in_fp8(build, options):
    """Observed: 1e-3 to 4.7e-3. The router does not change."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < MIN_FP8_CAPABILITY:
        pytest.skip("the GPU has no FP8")
    case = build(**{"width": 128, "hidden_width": 128, "num_tokens": 20, "dtype": torch.bfloat16} | options)
    experts = fold_experts(case.weights, case.spec)
    found = fuse(case, fused.pack_experts(experts, case.device, case.dtype, fp8_norms=True))
    assert relative_error(found.tokens, case.expected.tokens) <= 6e-3
    assert torch.equal(found.router_weights, fuse(case).router_weights)


def test_norms_in_fp8_of_a_photo():
    """On `mini` and a real photo: 5.6e-3 of z_final, where norms in bfloat16 give 2.2e-3."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < MIN_FP8_CAPABILITY:
        pytest.skip("the GPU has no FP8")
    tokenizer = Tokenizer.load("mini")
    fusion, side = tokenizer.fusion, tokenizer.config.image_size
    with Image.open(sorted(SAMPLES.glob("*.jpg"))[0]) as photo, torch.no_grad():
        picture = to_tensor(photo.convert("RGB").resize((side, side)))
        states = tokenizer.encoder(tokenizer.preprocess(picture[None]))[-fusion.config.num_layers :]
    states = [state[:, 100:164].to(DEVICE, torch.bfloat16) for state in states]
    experts = fold_experts(fusion.mixer.weights(), fusion.spec)
    exact = folded.fuse_layers(
        [state.double() for state in states], experts.to(DEVICE, torch.float64), fusion.spec
    )
    packed = fused.pack_experts(experts, DEVICE, torch.bfloat16, fp8_norms=True)
    found = fused.fuse_layers(states, packed, fusion.spec)
    assert relative_error(found.tokens, exact.tokens) <= 8e-3


@each_dtype
def test_batches_may_be_slices(build, dtype, tolerance):
    """Bit-equal to copies of one shape; of other shapes, whose products a BLAS may sum otherwise, nearly."""
    whole = build(batch=5, dtype=dtype)
    packed = pack(whole)
    slices = [state[::2, 1:] for state in whole.states]
    found = fused.fuse_layers(slices, packed, whole.spec)
    copied = fused.fuse_layers([state.contiguous() for state in slices], packed, whole.spec)
    for one, other, uncut in zip(found, copied, fuse(whole, packed), strict=True):
        assert torch.equal(one, other)
        assert relative_error(one, uncut[::2, 1:]) <= tolerance


@pytest.mark.parametrize("images", ["each its own", "one for all"])
def test_one_buffer_is_read_in_place(build, monkeypatch, images):
    """As the encoder writes it; of any batch stride, zero too. Bit-equal to copies of the same shape."""
    case = build(num_layers=3, batch=1 if images == "one for all" else 3, dtype=torch.bfloat16)
    packed = pack(case)
    buffer = torch.stack([torch.nn.functional.pad(state, (0, 0, 5, 0)) for state in case.states])
    states = [state[:, 5:] for state in buffer]
    if images == "one for all":
        states = [state.expand(3, -1, -1) for state in states]
    expected = fused.fuse_layers([state.contiguous() for state in states], packed, case.spec)

    def refuse(tensors):
        raise AssertionError("copied")

    monkeypatch.setattr(fused.torch, "stack", refuse)
    found = fused.fuse_layers(states, packed, case.spec)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@each_dtype
@pytest.mark.parametrize("has_shift", [True, False])
def test_every_output_is_written_and_nothing_beside_it(build, monkeypatch, dtype, tolerance, has_shift):
    case = build(num_layers=3, width=128, batch=2, num_tokens=33, dtype=dtype, has_shift=has_shift)
    packed = pack(case)
    empty, margin, buffers = torch.empty, 64, []

    def poisoned(*shape, **options):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        buffer = empty(margin + shape.numel() + margin, **options).fill_(float("nan"))
        buffer[:margin] = buffer[-margin:] = 123.0
        buffers.append(buffer)
        return buffer[margin:-margin].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(fused.torch, "empty", poisoned)
        found = fuse(case, packed)
    assert len(buffers) > 2  # the outputs, and scratch
    assert all(
        bool((part == 123).all()) for buffer in buffers for part in (buffer[:margin], buffer[-margin:])
    )
    assert found.tokens.isfinite().all()
    check(case, found)


def test_two_runs_are_bit_equal(build):
    case = build(num_layers=3, width=128, num_tokens=70, dtype=torch.bfloat16)
    packed = pack(case)
    for one, other in zip(fuse(case, packed), fuse(case, packed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES[:2])
def test_a_token_does_not_depend_on_its_batch(build, dtype, tolerance):
    case = build(batch=3, num_tokens=30, dtype=dtype)
    packed = pack(case)
    together = fuse(case, packed)
    for image in range(3):
        alone = fused.fuse_layers([state[image : image + 1] for state in case.states], packed, case.spec)
        difference = alone.tokens[0].double() - together.tokens[image].double()
        assert difference.norm() <= tolerance * together.tokens[image].double().norm()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # from the interpreter's numpy
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"routing": "softmax"}),
        (torch.bfloat16, {"router_input_norm": False}),
        (torch.bfloat16, {"correction": "replace", "has_shift": False}),
    ],
)
def test_non_finite_tokens_spoil_only_themselves(build, dtype, options):
    case = build(batch=2, dtype=dtype, **options)
    packed = pack(case)
    clean = fuse(case, packed)
    case.states[0][0, 3, 7] = float("nan")
    case.states[1][1, 5, 0] = float("inf")
    found = fuse(case, packed)
    spoilt = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    spoilt[0, 3] = spoilt[1, 5] = True
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one[~spoilt], other[~spoilt])
        assert not one[spoilt].isfinite().all(dim=-1).any()


@pytest.mark.parametrize("shape", [(0, 9, 64), (2, 0, 64)])
def test_no_tokens_give_no_tokens(build, shape):
    case = build()
    found = fused.fuse_layers([torch.zeros(shape, device=DEVICE)] * 2, pack(case), case.spec)
    assert found.tokens.shape == shape
    assert found.router_weights.shape == (*shape[:2], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z[:1], "got 1 hidden states, the fusion has 2 layers"),
        (lambda z: [s[..., :32] for s in z], r"shape \[2, 9, 32\], expected \[B, N, 64\]"),
        (lambda z: [s[0] for s in z], r"shape \[9, 64\], expected \[B, N, 64\]"),
        (lambda z: [z[0], z[1][:1]], "hidden state 1 has shape .*1, 9, 64.*, hidden state 0 has .*2, 9, 64"),
        (lambda z: [z[0], z[1].half()], "hidden state 1 has dtype torch.float16, .* 0 has torch.float32"),
        (lambda z: [z[0], z[1].to("meta")], "hidden state 1 has device meta, hidden state 0 has"),
        (lambda z: [s.to("meta") for s in z], "weights are torch.float32 on .* torch.float32 on meta"),
        (lambda z: [s.half() for s in z], "weights are torch.float32 on .* torch.float16 on"),
        (lambda z: [s.mT.contiguous().mT for s in z], "0 has strides .* channels must be contiguous"),
        (lambda z: [z[0].contiguous(), z[1].mT.contiguous().mT], "1 has strides .* must be contiguous"),
        (lambda z: [z[0], z[1].contiguous()], "1 has strides .* 0 has .* read all alike"),
    ],
)
def test_bad_input_is_named(build, change, message):
    case = build(batch=2)
    with pytest.raises(ValueError, match=message):
        fused.fuse_layers(change(case.states), pack(case), case.spec)


def test_float64_is_refused(build):
    case = build(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"take float32, bfloat16 and float16, not torch\.float64"):
        fuse(case)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 96}, "multiples of 64 up to 2048 as width, not 96"),
        ({"affine": "weight"}, "LN_bb without affine part"),
        ({"affine": "weight and bias"}, "LN_bb without affine part"),
        ({"num_layers": 65, "hidden_width": 4}, "up to 64 layers, not 65"),
    ],
)
def test_experts_that_cannot_be_packed_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        pack(build(**options))


def test_is_a_well_formed_operator(build):
    case = build()
    packed, spec = pack(case), case.spec
    scalars = (spec.routing, spec.router_input_norm, spec.correction, spec.beta)
    eps = (spec.energy_eps, spec.hidden_norm_eps, spec.norm_eps)
    operands = [getattr(packed, part.name) for part in fields(packed)]
    torch.library.opcheck(torch.ops.drorae.fuse_layers.default, (case.states, operands, *scalars, *eps))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_opaque_operator(build, backend):
    case = build(dtype=torch.bfloat16)
    packed = pack(case)

    @torch.compile(fullgraph=True, backend=backend)
    def doubled(states):
        return 2 * fused.fuse_layers(states, packed, case.spec).tokens

    assert torch.equal(doubled(case.states), 2 * fuse(case, packed).tokens)


FULL_SIZE = {"num_layers": 12, "width": 768, "hidden_width": 1536}


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (1, 256), (3, 77), (16, 256), (64, 256)])
def test_full_size(build, dtype, tolerance, batch, num_tokens):
    check(build(**FULL_SIZE, batch=batch, num_tokens=num_tokens, dtype=dtype))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"routing": "softmax"},
        {"correction": "replace"},
        {"router_input_norm": False},
        {"has_shift": False},
        {"hidden_width": 128},
        {"hidden_width": 3072},
        {"num_layers": 40},
        {"width": 1024},
        {"width": 2048},
        {"width": 320},
    ],
)
def test_full_size_options(build, dtype, tolerance, options):
    check(build(**FULL_SIZE | {"batch": 2, "num_tokens": 256, "dtype": dtype} | options))


@pytest.mark.gpu
@each_dtype
def test_full_size_confines_non_finite_tokens(build, dtype, tolerance):
    case = build(**FULL_SIZE, batch=8, num_tokens=256, dtype=dtype)
    packed = pack(case)
    clean = fuse(case, packed)
    case.states[4][3, 100, 5] = float("nan")
    spoilt = torch.zeros(8, 256, dtype=torch.bool, device=DEVICE)
    spoilt[3, 100] = True
    found = fuse(case, packed)
    assert torch.equal(found.tokens[~spoilt], clean.tokens[~spoilt])
    assert found.tokens[spoilt].isnan().all()


@pytest.mark.gpu
def test_replays_from_a_cuda_graph(build):
    case = build(**FULL_SIZE, batch=2, num_tokens=256, dtype=torch.bfloat16)
    packed = pack(case)
    expected = fuse(case, packed)  # also compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fuse(case, packed)
    captured.tokens.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.tokens, expected.tokens)
