"""Attacks that know a format: sizes that lie, bombs of a header alone, structures that bite their tail."""

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.probes.inputs import BOUNDARY, Inputs, latents_npy, multipart

Attack = Callable[[random.Random, Inputs], bytes]

_SIDES = (0, 1, 2, 255, 6_000, 16_383, 65_535, 65_536, 1_000_000, 2**31 - 1, 2**31, 2**32 - 1)
_HUGE = (
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e-999",
    "9" * 400,
    "-" + "9" * 5_000,
    "0." + "1" * 9_000,
)
_NOT_NUMBERS = ("null", "true", '"1"', "[]", "{}", '""', '"\\ud800"', "[[]]", "[1]", '{"a": 1}')
_DEPTHS = (2, 10, 63, 127, 129, 1_000, 100_000)
_NPY_SHAPES = (
    "(-1,)",
    "(0,)",
    "()",
    "(1, 0, 2)",
    "(2**62, 2**62)",
    "(4611686018427387904, 4611686018427387904)",
    "(1.5,)",
    "(True,)",
    "('a',)",
    "None",
    "[1, 2]",
    "(1,) * 9999",
    f"({'1, ' * 70})",
    "(9" + "9" * 400 + ",)",
)
_NPY_DTYPES = (
    "'|O'",
    "'<f8'",
    "'<c8'",
    "'|V4'",
    "'|S0'",
    "'<U0'",
    "'<M8[ns]'",
    "[('a', '<f4')]",
    "[('a', '<f4', (2, 3))]",
    "'<f4,<f4'",
    "'float128'",
    "None",
    "3",
    "'<f2'",
    "'>f4'",
    "'|b1'",
    "'(2,)f4'",
    "'no such dtype'",
)
_SAFETENSORS_FIELDS: Mapping[str, list[Any]] = {
    "dtype": ["F64", "I64", "BOOL", "F8_E4M3", "f32", 3, None, ["F32"], "C64", "F4"],
    "shape": [[-1], [0, 4], [2**63], [2**32, 2**32], [1.5], "x", None, [[1]], [], [True], [2**64]],
    "data_offsets": [[0, 2**63], [9, 0], [-1, 5], [8, 16], [0], None, [0, 1, 2], [2**64, 0], "ab"],
}


def _side(rng: random.Random) -> int:
    return rng.choice(_SIDES)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rng: random.Random, inputs: Inputs) -> bytes:
    """A PNG with true checksums whose header lies, and whose chunks may be bombs."""
    depth, colour = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 5))
    header = struct.pack(">IIBBBBB", _side(rng), _side(rng), depth, colour, 0, 0, rng.choice((0, 1, 2)))
    zeros = zlib.compress(bytes(rng.choice((10, 1 << 20, 1 << 24))))
    extras = (
        b"",
        _png_chunk(b"zTXt", b"a\0\0" + zeros),
        _png_chunk(b"iCCP", b"a\0\0" + zeros),
        _png_chunk(b"iTXt", b"a\0\1\0\0\0" + zeros),
        _png_chunk(b"PLTE", rng.randbytes(rng.choice((0, 3, 5, 768, 771)))),
        _png_chunk(b"acTL", struct.pack(">II", _side(rng), 0)) + _png_chunk(b"fcTL", rng.randbytes(26)),
        _png_chunk(b"eXIf", rng.randbytes(64)),
        _png_chunk(b"tRNS", rng.randbytes(rng.choice((0, 1, 6, 256)))),
        _png_chunk(b"tEXt", b"a\0" + b"b" * 70_000) * 3,
    )
    data = rng.choice((b"", _png_chunk(b"IDAT", zeros), _png_chunk(b"IDAT", rng.randbytes(64))))
    end = rng.choice((b"", _png_chunk(b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + rng.choice(extras) + data + end


def jpeg(rng: random.Random, inputs: Inputs) -> bytes:
    """A JPEG whose frame header says another size, or with segments that lie."""
    data = bytearray(rng.choice(inputs.files["JPEG"]))
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    match rng.randrange(4):
        case 0:
            data[at + 5 : at + 9] = struct.pack(">HH", _side(rng) & 0xFFFF, _side(rng) & 0xFFFF)
        case 1:
            data[at + 9] = rng.choice((0, 1, 2, 4, 255))  # components
        case 2:
            exif = b"Exif\0\0" + rng.choice((b"II*\0", b"MM\0*")) + rng.randbytes(rng.choice((0, 4, 60)))
            data[2:2] = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        case _:
            data[2:2] = (
                b"\xff\xe2" + struct.pack(">H", 18) + b"ICC_PROFILE\0" + bytes((rng.randrange(3), 255))
            )
    return bytes(data)


def webp(rng: random.Random, inputs: Inputs) -> bytes:
    """A WebP whose canvas is another than its picture, or of frames that lie."""
    width, height = (_side(rng) & 0xFFFFFF for _ in range(2))
    canvas = (
        bytes((rng.choice((0, 2, 0x10, 0x3E)), 0, 0, 0))
        + width.to_bytes(3, "little")
        + height.to_bytes(3, "little")
    )
    parts = b"VP8X" + struct.pack("<I", rng.choice((10, 10, 10, 0, _side(rng)))) + canvas
    if rng.random() < 0.5:
        parts += b"ANIM" + struct.pack("<IIH", 6, 0, 0)
        parts += (b"ANMF" + struct.pack("<I", 16) + rng.randbytes(16)) * rng.choice((1, 3, 2_000))
    parts += rng.choice(inputs.files["WEBP"])[12 : rng.choice((12, 40, 1 << 20))]
    return b"RIFF" + struct.pack("<I", rng.choice((len(parts) + 4, _side(rng)))) + b"WEBP" + parts


def gif(rng: random.Random, inputs: Inputs) -> bytes:
    """A GIF with a screen and frames of any size, and many of them."""
    sides = [_side(rng) & 0xFFFF for _ in range(2)]
    screen = struct.pack("<HHBBB", *sides, rng.choice((0, 0x80, 0xF7)), 0, 0) + bytes(6)
    frame = (
        b"," + struct.pack("<HHHHB", *(_side(rng) & 0xFFFF for _ in range(4)), 0) + b"\x02\x02\x44\x01\x00"
    )
    comment = b"!\xfe" + b"\xff" + b"c" * 255 + b"\0"
    return b"GIF89a" + screen + comment * rng.choice((0, 300)) + frame * rng.choice((1, 1, 3_000)) + b";"


def bmp(rng: random.Random, inputs: Inputs) -> bytes:
    """A BMP whose header lies on size, depth, compression, masks and palette."""
    size = [rng.choice((-1, 1)) * (_side(rng) & 0x7FFFFFFF) for _ in range(2)]
    bits, compression = rng.choice((0, 1, 4, 8, 16, 24, 32, 64)), rng.choice((0, 1, 2, 3, 4, 5, 99))
    colours = rng.choice((0, 2, 256, 2**31 - 1))
    length = rng.choice((40, 12, 64, 108, 124, 0, 2**31))
    header = struct.pack("<IiiHHIIiiII", length, *size, 1, bits, compression, 0, 0, 0, colours, 0)
    file = struct.pack("<IHHI", _side(rng), 0, 0, rng.choice((54, 0, 2**31)))
    return b"BM" + file + header + rng.randbytes(rng.choice((0, 16, 1 << 12)))


def tiff(rng: random.Random, inputs: Inputs) -> bytes:
    """A TIFF with a directory that lies: sizes, counts, offsets, tiles, and a next page that is itself."""
    order = rng.choice("<>")
    tags = [
        (256, rng.choice((3, 4)), 1, _side(rng)),
        (257, rng.choice((3, 4)), 1, _side(rng)),
        (258, 3, rng.choice((1, 3, 2**30)), rng.choice((8, 16, 32, 0))),
        (259, 3, 1, rng.choice((1, 2, 5, 6, 7, 8, 32773, 34925, 50000, 9))),
        (262, 3, 1, rng.choice((0, 1, 2, 3, 5, 6, 8, 77))),
        (273, 4, rng.choice((1, 2**28)), rng.choice((8, 0, 2**31))),
        (277, 3, 1, rng.choice((1, 3, 4, 65535))),
        (278, 4, 1, _side(rng)),
        (279, 4, 1, _side(rng)),
        *rng.choice(([], [(322, 4, 1, _side(rng)), (323, 4, 1, _side(rng)), (324, 4, 1, 8)])),
        (339, 3, 1, rng.choice((1, 3, 4))),
    ]
    directory = struct.pack(order + "H", rng.choice((len(tags), len(tags), 65535)))
    for tag, kind, count, value in tags:
        kept = value & 0xFFFF if kind == 3 and order == "<" else value
        directory += struct.pack(order + "HHII", tag, kind, count, kept & 0xFFFFFFFF)
    directory += struct.pack(order + "I", rng.choice((0, 8, 2**31)))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", rng.choice((8, 8, 8, 0, 4)))
    return head + directory + rng.randbytes(rng.choice((0, 64, 4096)))


def safetensors(rng: random.Random, inputs: Inputs) -> bytes:
    """A safetensors file whose header lies: lengths, shapes, offsets, types, depth, double names."""
    shape = list(inputs.latents.shape)
    num_bytes = inputs.latents.nbytes
    entry = {"dtype": "F32", "shape": [1, *shape], "data_offsets": [0, num_bytes]}
    spoiled = dict(entry)
    field = rng.choice(list(entry))
    spoiled[field] = rng.choice(_SAFETENSORS_FIELDS[field])
    good, bad = json.dumps(entry), json.dumps(spoiled)
    header = rng.choice(
        (
            f'{{"latents": {bad}}}',
            f'{{"latents": {good}, "latents": {bad}}}',
            f'{{"latents": {good}, "more": {bad}}}',
            f'{{"__metadata__": {rng.choice(_NOT_NUMBERS)}, "latents": {good}}}',
            f'{{"__metadata__": {{"normalized": "maybe", "checkpoint_sha256": "0"}}, "latents": {good}}}',
            f'{{"latents": {rng.choice(_NOT_NUMBERS + _HUGE)}}}',
            f'{{"latents": {"[" * rng.choice(_DEPTHS)}',
            f'{{"latents": {_nested(rng, "1")}}}',
            f'{{"\\ud800": {good}}}',
            "{}",
            f'{{"latents": {good}}}' + " " * rng.choice((0, 7, 200_000)),
        )
    ).encode()
    length = rng.choice((len(header),) * 4 + (0, 1, len(header) + 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + header + _numbers(rng, inputs).tobytes()


def npy(rng: random.Random, inputs: Inputs) -> bytes:
    """A ``.npy`` file whose header lies, or is no header, or whose numbers are none."""
    if rng.random() < 0.3:
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are wanted
            return latents_npy(_numbers(rng, inputs).astype(rng.choice(("f2", "f4", "f8", "i4", "u1", "c8"))))
    shape = rng.choice((str(inputs.latents.shape), *_NPY_SHAPES))
    dtype = rng.choice(("'<f4'", *_NPY_DTYPES))
    fortran = rng.choice(("False", "True", "None", "'x'", "2"))
    text = rng.choice(
        (
            f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, }}",
            f"{{'descr': {dtype}, 'shape': {shape}}}",
            f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, 'more': 1}}",
            "(" * rng.choice(_DEPTHS),
            "-" * rng.choice(_DEPTHS) + "1",
            f"{{'shape': {'[' * 90}{']' * 90}}}",
            "__import__('os')",
            f"{{'a': {'9' * 9_000}}}",
            "{**{}}",
            "\0",
        )
    ).encode()
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (0, 0), (255, 255)))
    length = rng.choice((len(text),) * 4 + (0, 65535, len(text) + 5))
    packed = struct.pack("<H", length & 0xFFFF) if version[0] <= 1 else struct.pack("<I", length)
    return b"\x93NUMPY" + bytes(version) + packed + text + inputs.latents.tobytes()


def json_latents(rng: random.Random, inputs: Inputs) -> bytes:
    """JSON latents: wrong nesting, numbers beyond any type, double keys, text that is not UTF-8."""
    good = json.dumps(np.round(inputs.latents, 1).tolist())
    bad = rng.choice(_HUGE + _NOT_NUMBERS)
    spoiled = good.replace(good[1:].lstrip("[").partition(",")[0], bad, 1)
    text = rng.choice(
        (
            f'{{"latents": {spoiled}}}',
            f'{{"latents": [{bad}]}}',
            f'{{"latents": {good}, "latents": {bad}}}',
            f'{{"latents": {good}, "normalized": {bad}}}',
            f'{{"latents": {good}, "shape": [{bad}], "model": {bad}}}',
            f'{{"latents": {good}, "checkpoint_sha256": "{"0" * 64}"}}',
            f'{{"latents": {_nested(rng, "1.5")}}}',
            f'{{"latents": [[1, 2], [3]], "extra": {bad}}}',
            f'{{"latents": {"[" * rng.choice(_DEPTHS)}',
        )
    )
    return _as_text(rng, text)


def json_images(rng: random.Random, inputs: Inputs) -> bytes:
    """JSON images: no base64, no list, too many, double keys, depth."""
    file = rng.choice(inputs.files[rng.choice(("JPEG", "PNG"))])
    good = base64.b64encode(file).decode()
    bad = rng.choice(
        _HUGE + _NOT_NUMBERS + ('"===="', '"A"', '"data:image/png;base64,AAAA"', '"http://127.0.0.1/"')
    )
    text = rng.choice(
        (
            f'{{"images": [{bad}]}}',
            f'{{"images": {bad}}}',
            f'{{"images": ["{good}", {bad}]}}',
            f'{{"images": ["{good}"], "images": [{bad}]}}',
            f'{{"images": ["{good[: rng.randrange(len(good))]}"]}}',
            '{"images": [' + '"", ' * 100 + '""]}',
            f'{{"images": {_nested(rng, json.dumps(good[:100]))}}}',
            f'{{"image": ["{good}"]}}',
            f'["{good}"]',
            bad,
        )
    )
    return _as_text(rng, text)


def form(rng: random.Random, inputs: Inputs) -> bytes:
    """Multipart: nested, empty, nameless, endless headers, too many parts, delimiters that nearly fit."""
    file = rng.choice(inputs.files["JPEG"])
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
    end = f"\r\n--{BOUNDARY}--\r\n".encode()
    inner = multipart([file], "inner")
    nested = (
        f'{head}name="images"\r\nContent-Type: multipart/mixed; boundary=inner\r\n\r\n'.encode() + inner + end
    )
    return rng.choice(
        (
            lambda: multipart([b""]),
            lambda: multipart([file, b"", file]),
            lambda: multipart([file], name=rng.choice(("image", "", "images[]", "im\x00ages", "x" * 70_000))),
            lambda: multipart([b"x"] * rng.choice((64, 65, 5_000))),
            lambda: multipart([file])[: -rng.choice((2, 4, 6, 40))],
            lambda: multipart([file], boundary=rng.choice(("other", BOUNDARY + "x", BOUNDARY[:-1], ""))),
            lambda: nested,
            lambda: f'{head}filename="x"\r\n\r\n'.encode() + file + end,
            lambda: (head + 'name="images"\r\n' + "X-A: b\r\n" * 20_000 + "\r\n").encode() + file + end,
            lambda: (head + 'name="images"\r\nX: ' + "y" * 200_000 + "\r\n\r\n").encode() + file + end,
            lambda: (head + "name*=utf-8''im%61ges\r\n\r\n").encode() + file + end,
            lambda: (
                (head + 'name="images"\r\nContent-Transfer-Encoding: base64\r\n\r\n').encode()
                + base64.b64encode(file)
                + end
            ),
            lambda: multipart([file]).replace(b"\r\n", b"\n"),
            lambda: multipart([file]) + multipart([file]),
            lambda: b"preamble\r\n" + multipart([file]) + b"epilogue",
            lambda: end.lstrip(),
            lambda: b"-" * rng.choice((1, 2, 1_000)),
        )
    )()


def raw(rng: random.Random, inputs: Inputs) -> bytes:
    """Numbers without a header: latents or pixels, some of them not finite."""
    if rng.random() < 0.5:
        with np.errstate(over="ignore"):  # infinities are wanted
            return _numbers(rng, inputs).astype(rng.choice(("f2", "f4"))).tobytes()
    pixels = np.frombuffer(rng.randbytes(3 * 32 * 32), np.uint8)
    return rng.choice(
        (pixels.tobytes(), (pixels / 255).astype("f2").tobytes(), pixels.astype("f4").tobytes())
    )


ATTACKS: Mapping[str, Attack] = {
    "jpeg": jpeg,
    "png": png,
    "webp": webp,
    "gif": gif,
    "bmp": bmp,
    "tiff": tiff,
    "safetensors": safetensors,
    "npy": npy,
    "json latents": json_latents,
    "json images": json_images,
    "multipart": form,
    "raw": raw,
}
"""By the kind of body."""


def _numbers(rng: random.Random, inputs: Inputs) -> np.ndarray:
    """Latents [1, C, h, w] float32, a few of them strange."""
    numbers = inputs.latents[None].copy()
    strange = rng.choice((0.0, np.nan, np.inf, -np.inf, 3e38, 1e-45, 65_504.0, 1e30))
    numbers.reshape(-1)[:: rng.choice((1, 7, 10**6))] = strange
    return numbers


def _nested(rng: random.Random, core: str) -> str:
    depth = rng.choice(_DEPTHS)
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + core + closing * depth


def _as_text(rng: random.Random, text: str) -> bytes:
    """The text's bytes, now and then in another encoding, with a mark, white space or rubbish behind."""
    encoding = rng.choice(("utf-8",) * 6 + ("utf-16", "utf-8-sig"))
    before, after = rng.choice((("", ""),) * 4 + ((" " * 1000, "\n"), ("", "x"), ("", "\0"), ("\ufeff", "")))
    return (before + text + after).encode(encoding)
