"""Files of tensors that clients send: right ones are read, and no header does more than be refused."""

import io
import json
import math
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.codecs import tensors
from service.errors import LatentsError, MalformedError, ServiceError

RELAXED = settings(deadline=None)  # a busy machine is no failure
VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7
SIZES = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**63, 2**64])
SHAPES = st.lists(SIZES, max_size=70) | st.lists(st.integers(0, 3), max_size=5)
LEAVES = (
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "<f4"])
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return tensors.NPY_MAGIC + bytes(version) + length + text + data


def npy_header(shape: object, descr: object = "<f4", fortran_order: object = False) -> str:
    return repr({"descr": descr, "fortran_order": fortran_order, "shape": shape})


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, Any]:
    return {"latents": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def read_or_refusal(read: Any, *args: Any) -> torch.Tensor | ServiceError:
    """The tensor, or the error that the client is told."""
    try:
        result = read(*args)
    except (LatentsError, MalformedError) as exc:
        return exc
    return result[0] if isinstance(result, tuple) else result


class TestNpy:
    @pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f2"])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
    def test_what_numpy_writes(self, dtype: str, order: Any, version: tuple[int, int]) -> None:
        array = np.array(VALUES, dtype=dtype, order=order)
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=version)
        read = tensors.read_npy(buffer.getvalue())
        assert read.is_contiguous()
        np.testing.assert_array_equal(read.numpy(), array)

    def test_no_numbers_and_one(self) -> None:
        assert tensors.read_npy(npy(npy_header((0, 3, 4)))).shape == (0, 3, 4)
        assert tensors.read_npy(npy(npy_header(()), bytes(4))).shape == ()

    @pytest.mark.parametrize(
        "shape",
        [
            *((-1, -24), (2, -3, -4), (True, 24), (1,) * 65, (1,) * 9, (2.0, 12), ("24",), (None,), 24, "24"),
            *((2**63, 0), (0, 2**62, 2**62), (2**31, 2**31), (2**64 + 24,), ((24,),)),
        ],
    )
    def test_impossible_shapes(self, shape: object) -> None:
        with pytest.raises(LatentsError):
            tensors.read_npy(npy(npy_header(shape), VALUES.tobytes()))

    @pytest.mark.parametrize(
        "descr",
        [
            *(
                "|O",
                "<f8",
                "<i4",
                "|V4",
                "<U1",
                "f4,f4",
                "1000f4",
                "(2,)f4",
                "",
                "\ud800",
                "é",
                None,
                4,
                ["<f4"],
            ),
            *(
                [("a", "<f4")],
                ("<f4", (10**6, 10**6)),
                {"names": ["a"], "formats": ["<f4"], "offsets": [2**31]},
            ),
        ],
    )
    def test_other_types(self, descr: object) -> None:
        with pytest.raises(LatentsError, match="float16 and float32"):
            tensors.read_npy(npy(npy_header((24,), descr), VALUES.tobytes()))

    @pytest.mark.parametrize(
        "header",
        [
            *("-" * 900 + "1", "(" * 900, "[" * 190 + "]" * 190, "1" + "+1" * 400, "{1, 2}", "f'{1}'", "\0"),
            *(
                "{'descr': '<f4'}",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (24,), 'x': 1}",
                " " * 999,
            ),
            *("{'descr': '<f4', 'fortran_order': False, 'shape': (24L,)}", npy_header((24,)) + " " * 5000),
            "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 900 + "9" * 5000 + ",)}",
        ],
    )
    def test_damaged_headers(self, header: str) -> None:
        for version in ((1, 0), (2, 0), (3, 0)):
            with pytest.raises(MalformedError, match="header is damaged"):
                tensors.read_npy(npy(header, VALUES.tobytes(), version))

    def test_damaged_files(self) -> None:
        right = npy(npy_header((2, 3, 4)), VALUES.tobytes())
        for length in (*range(0, len(right) - 1, 3), len(right) - 1):
            with pytest.raises(MalformedError):
                tensors.read_npy(right[:length])
        for body in (right + b"\0", npy(npy_header((24,), fortran_order=1), VALUES.tobytes())):
            with pytest.raises(MalformedError):
                tensors.read_npy(body)
        with pytest.raises(MalformedError, match="version"):
            tensors.read_npy(npy(npy_header((24,)), VALUES.tobytes(), (9, 9)))
        with pytest.raises(MalformedError, match="header is damaged"):
            tensors.read_npy(tensors.NPY_MAGIC + b"\x02\0" + struct.pack("<I", 2**32 - 1) + b"{}")

    @RELAXED
    @given(shape=SHAPES.map(tuple), descr=st.sampled_from(["<f4", ">f2"]), fortran=st.booleans())
    @example(shape=(0, 2**48), descr="<f4", fortran=True)
    def test_any_shape(self, shape: tuple[int, ...], descr: str, fortran: bool) -> None:
        header = npy_header(shape, descr, fortran)
        length = math.prod(shape) * int(descr[-1]) if all(0 <= size <= 3 for size in shape) else 24
        result = read_or_refusal(tensors.read_npy, npy(header, bytes(min(length, 2000))))
        assert isinstance(result, ServiceError) or tuple(result.shape) == shape

    @RELAXED
    @given(
        header=ANYTHING
        | st.builds(
            lambda *args: dict(zip(("descr", "fortran_order", "shape"), args, strict=True)),
            ANYTHING,
            ANYTHING,
            ANYTHING,
        )
    )
    def test_any_literal(self, header: object) -> None:
        read_or_refusal(tensors.read_npy, npy(repr(header), bytes(24), (3, 0)))

    @RELAXED
    @given(header=st.binary(max_size=100), version=st.sampled_from([(1, 0), (2, 0), (3, 0)]))
    def test_any_bytes(self, header: bytes, version: tuple[int, int]) -> None:
        read_or_refusal(tensors.read_npy, npy(header, b"", version))


class TestSafetensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_what_the_library_writes(self, dtype: torch.dtype) -> None:
        latents = torch.from_numpy(VALUES).to(dtype)
        data = safetensors.torch.save({"latents": latents}, {"model": "é"})
        read, metadata = tensors.read_safetensors(data, "latents")
        assert torch.equal(read, latents)
        assert read.dtype == dtype
        assert metadata == {"model": "é"}

    def test_no_numbers_and_one(self) -> None:
        assert tensors.read_safetensors(safetensors_file(entry([0, 3], [0, 0])), "latents")[0].shape == (0, 3)
        assert (
            tensors.read_safetensors(safetensors_file(entry([], [0, 4]), bytes(4)), "latents")[0].shape == ()
        )

    @pytest.mark.parametrize(
        ("header", "error"),
        [
            (entry([-1, -24], [0, 96]), LatentsError),
            (entry([True, 24], [0, 96]), LatentsError),
            (entry([1] * 65, [0, 4]), LatentsError),
            (entry([2**62, 4], [0, 96]), LatentsError),
            (entry([0, 2**62, 2**62], [0, 0]), LatentsError),
            (entry([24.0], [0, 96]), LatentsError),
            (entry("24", [0, 96]), LatentsError),
            (entry([24], [0, 96], "F64"), LatentsError),
            (entry([24], [0, 96], "\ud800"), LatentsError),
            (entry([24], [0, 96], ["F32"]), LatentsError),
            (entry([24], [-96, 0]), MalformedError),
            (entry([24], [96, 0]), MalformedError),
            (entry([24], [0, 97]), MalformedError),
            (entry([24], [4, 100]), MalformedError),
            (entry([24], [False, 96]), MalformedError),
            (entry([24], [0, math.nan]), MalformedError),
            (entry([24], [0, 96, 96]), MalformedError),
            (entry([24], None), MalformedError),
            (entry([23], [0, 92]), MalformedError),
            (entry([25], [0, 100]), MalformedError),
            ({"latents": {"dtype": "F32", "shape": [24]}}, MalformedError),
            ({"latents": []}, MalformedError),
            ({"\ud800": {}}, LatentsError),
            ({"latents": {}, "more": 1}, LatentsError),
            ({**entry([24], [0, 96]), "__metadata__": {"a": 1}}, MalformedError),
            ({**entry([24], [0, 96]), "__metadata__": None}, MalformedError),
            (json.dumps(entry([24], [0, 96])).encode("utf-16-le"), MalformedError),
            (json.dumps(entry([24], [0, 96]))[:-1].encode() + b',"latents":{}}', MalformedError),
            (b'{"latents":{"dtype":"F32","shape":[24],"shape":[24],"data_offsets":[0,96]}}', MalformedError),
            (b'{"latents":' + b"[" * 40_000 + b"]" * 40_000 + b"}", MalformedError),
            (b'{"latents":' + b"9" * 6000 + b"}", MalformedError),
            (b'{"latents\xff":1}', MalformedError),
            (b"{" + b" " * 200_000 + b"}", MalformedError),
        ],
    )
    def test_refused(self, header: object, error: type[ServiceError]) -> None:
        with pytest.raises(error) as caught:
            tensors.read_safetensors(safetensors_file(header, VALUES.tobytes()), "latents")
        caught.value.detail.encode()

    @RELAXED
    @given(
        entry=ANYTHING
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "F64"]) | ANYTHING,
                "shape": SHAPES | ANYTHING,
                "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | ANYTHING,
            }
        ),
        metadata=st.none() | ANYTHING,
        length=st.integers(0, 64),
    )
    def test_any_entry(self, entry: object, metadata: object, length: int) -> None:
        header = {"latents": entry, **({} if metadata is None else {"__metadata__": metadata})}
        read_or_refusal(tensors.read_safetensors, safetensors_file(header, bytes(length)), "latents")

    @RELAXED
    @given(data=st.binary(max_size=100))
    def test_any_bytes(self, data: bytes) -> None:
        read_or_refusal(tensors.read_safetensors, data, "latents")
        read_or_refusal(tensors.read_safetensors, safetensors_file(b"{" + data), "latents")
