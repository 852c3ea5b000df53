"""One case of the fuzz: a whole HTTP request, made of a seed and a number alone."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote_plus

from benchmarks.faults.fuzz.bytes import mutate
from benchmarks.faults.fuzz.formats import ATTACKS
from benchmarks.probes.inputs import (
    BOUNDARY,
    FORMATS,
    Inputs,
    images_json,
    latents_npy,
    latents_safetensors,
    multipart,
)

MULTIPART = "multipart/form-data"
CONTENT_TYPES: Mapping[str, str] = {
    **{file_format.lower(): f"image/{file_format.lower()}" for file_format in FORMATS},
    "safetensors": "application/x-safetensors",
    "npy": "application/x-npy",
    "json latents": "application/json",
    "json images": "application/json",
    "multipart": f"{MULTIPART}; boundary={BOUNDARY}",
    "raw": "tensor/binary",
}
_WRONG_TYPES = (
    "",
    "application/octet-stream",
    "text/plain",
    "image/svg+xml",
    "image/*",
    "application/zip",
    "a",
    "/",
    ";;;=",
    "application/x-www-form-urlencoded",
    f"{MULTIPART}",
    f"{MULTIPART}; boundary=",
    f'{MULTIPART}; boundary="x',
    f"{MULTIPART}; boundary={'b' * 5_000}",
    f"{MULTIPART}; boundary=other",
    "application/json; charset=utf-16",
    "image/jpeg; " + "a=b; " * 500,
    "\xff\xfe",
    "multipart/mixed; boundary=" + BOUNDARY,
)
_ACCEPTS = (
    "*/*",
    "image/*",
    "image/png",
    "image/webp;q=0.5, image/jpeg",
    "application/json",
    "application/x-npy",
    "tensor/binary",
    "application/zip",
    "text/html",
    "*/*;q=0",
    "*/*;q=nan",
    "*/*;q=-1",
    "image/png;q=1e999",
    ",,,",
    "a/b," * 2_000,
    "",
    "*",
    "image/*;q=0.1, */*;q=x",
)
_VALUES: Mapping[str, tuple[str, ...]] = {
    "format": ("raw", "json", "npy", "safetensors", "png", "jpeg", "jpg", "webp", "zip", "gif", ""),
    "dtype": ("float16", "float32", "bfloat16", "uint8", "float64", "O"),
    "output_dtype": ("float16", "float32", "bfloat16", "uint8", "int8"),
    "latent": ("enriched", "base", "none"),
    "fit": ("crop", "pad", "stretch", "squash"),
    "range": ("signed", "unit", "0..1"),
    "normalize": ("true", "false", "1", "perhaps"),
    "output_type": ("pil", "pt", "np"),
    "image_format": ("png", "jpg", "bmp"),
    "partial_postprocess": ("true", "false", "2"),
    "do_scaling": ("false", "true", "x"),
    "scaling_factor": ("1", "1.0", "0", "NaN", "1e999", "-inf"),
    "shift_factor": ("0", "0.0", "1", "nan"),
    "height": ("64", "256", "0", "-1", "1e3", "9" * 5_000),
    "width": ("64", "256", "2147483648", "0x10"),
    "shape": ("1", "0", "-1", "2147483647", "2147483648", "x", "1.5", "9" * 400),
    "no_such_option": ("1", "\x00", "\ud800", "%"),
}
_RARE_HEADERS = (
    "Content-Encoding: gzip",
    "Content-Encoding: identity",
    "Expect: 100-continue",
    "Expect: x",
    "X-Request-ID: " + "x" * 300,
    "X-Request-ID: a\tb<script>",
    "X-Request-Timeout: NaN",
    "X-Request-Timeout: -1",
    "X-Request-Timeout: 1e999",
    "X-Request-Timeout: abc",
    "X-Request-Timeout: " + "9" * 5_000,
    "traceparent: 00-" + "0" * 32 + "-" + "0" * 16 + "-00",
    "traceparent: \xff",
    "Authorization: Bearer",
    "Authorization: Basic \xff",
    "Range: bytes=0-",
    "Upgrade: websocket",
    "Upgrade: h2c",
    "Cookie: " + "a=b;" * 999,
    "Content-Type: image/png",
    "X-A: " + "b" * 70_000,
    "X-Forwarded-For: ::1",
    "Origin: null",
    "TE: trailers",
)
_METHODS = ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW", "post", "")
_ROUTES = {True: ("/encode", "/encode", "/reconstruct"), False: ("/decode",)}
_LATENT_KINDS = ("safetensors", "npy", "json latents", "raw")


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        index: number of the case.
        route: path that it goes to.
        kind: of the body before its mutation.
        how: the mutation.
        message: all its bytes, head and body.
        framed: whether the head tells truly where the body ends; where it does not, no answer may be due.
    """

    index: int
    route: str
    kind: str
    how: str
    message: bytes
    framed: bool

    @property
    def is_head(self) -> bool:
        """Whether the answer has no body."""
        return self.message.startswith(b"HEAD ")


def make_case(inputs: Inputs, seed: int, index: int) -> Case:
    """Case ``index`` of a seed: always the same for the same inputs."""
    rng = random.Random(f"{seed}/{index}")
    kind = rng.choice(list(ATTACKS))
    body, how = _body(rng, inputs, kind)
    route = rng.choice(_ROUTES[kind not in _LATENT_KINDS])
    if kind == "raw" and rng.random() < 0.5:
        route = "/encode"
    if rng.random() < 0.04:
        route = rng.choice(
            ("/encode", "/decode", "/reconstruct", "/info", "/encode/", "/../x", "/%00", "/metrics")
        )
    method = rng.choice(_METHODS) if rng.random() < 0.02 else "POST"
    target = route + _query(rng, inputs, kind, len(body))
    headers = _headers(rng, kind)
    head = f"{method} {target} HTTP/1.1\r\n{headers}".encode("latin-1", "replace")
    message, framed, framing = _frame(rng, head, body)
    return Case(index, route, kind, f"{how}, {framing}", message, framed)


def good_body(rng: random.Random, inputs: Inputs, kind: str) -> bytes:
    """A body of a kind with nothing wrong in it."""
    files = [rng.choice(inputs.files[rng.choice(FORMATS)]) for _ in range(rng.randint(1, 3))]
    latents = inputs.latents[None].astype(rng.choice(("f2", "f4")))
    makers: Mapping[str, Callable[[], bytes]] = {
        "safetensors": lambda: latents_safetensors(latents),
        "npy": lambda: latents_npy(latents),
        "json latents": lambda: f'{{"latents": {inputs.latents.round(1).tolist()}}}'.encode(),
        "json images": lambda: images_json(files),
        "multipart": lambda: multipart(files),
        "raw": latents.tobytes,
    }
    maker = makers.get(kind)
    return maker() if maker else rng.choice(inputs.files[kind.upper()])


def _body(rng: random.Random, inputs: Inputs, kind: str) -> tuple[bytes, str]:
    draw = rng.random()
    if draw < 0.45:
        others = [good_body(rng, inputs, other) for other in rng.sample(list(ATTACKS), 2)]
        return mutate(rng, good_body(rng, inputs, kind), others)
    body = ATTACKS[kind](rng, inputs)
    if draw < 0.85:
        return body, "attack"
    if draw < 0.95:
        body, how = mutate(rng, body, [body, b""])
        return body, f"attack+{how}"
    return rng.choice((b"", rng.randbytes(rng.choice((1, 8, 1_000))), b"\0" * 100_000)), "rubbish"


def _query(rng: random.Random, inputs: Inputs, kind: str, num_bytes: int) -> str:
    pairs: list[tuple[str, str]] = []
    if kind == "raw" and rng.random() < 0.9:
        dtype = rng.choice(("float16", "float32", "uint8"))
        shape = rng.choice(
            (
                (1, *inputs.latents.shape),
                (1, 3, 32, 32),
                (3, 32, 32),
                (num_bytes,),
                (2**31 - 1,) * 8,
                (0, 3, 5),
            )
        )
        pairs += [("dtype", dtype), *(("shape", str(size)) for size in shape)]
    for name in rng.sample(list(_VALUES), rng.choice((0, 0, 0, 0, 0, 1, 1, 2, 3))):
        values = _VALUES[name]
        good = values[: 2 + (name == "fit")]
        pairs.append((name, rng.choice(good if rng.random() < 0.8 else values)))
    if pairs and rng.random() < 0.03:
        pairs.append(rng.choice(pairs))
    text = "&".join(f"{name}={quote_plus(value.encode('utf-8', 'surrogatepass'))}" for name, value in pairs)
    if rng.random() < 0.01:
        text += rng.choice(("&&&", "%", "%zz", "&=", "?" * 9, "&a=" + "b" * 60_000))
    return f"?{text}" if text else ""


def _headers(rng: random.Random, kind: str) -> str:
    lines = ["Host: service", "Connection: close"]
    draw = rng.random()
    if draw < 0.7:
        lines.append(f"Content-Type: {CONTENT_TYPES[kind]}")
    elif draw < 0.85:
        wrong = (*_WRONG_TYPES, *CONTENT_TYPES.values())
        lines.append(f"Content-Type: {rng.choice(wrong)}")
    if rng.random() < 0.12:
        lines.append(f"Accept: {rng.choice(_ACCEPTS)}")
    if rng.random() < 0.1:
        lines += rng.sample(_RARE_HEADERS, rng.choice((1, 1, 2)))
    return "".join(f"{line}\r\n" for line in lines)


def _frame(rng: random.Random, head: bytes, body: bytes) -> tuple[bytes, bool, str]:
    """The whole message, whether it is framed truly, and how it is framed."""
    draw = rng.random()
    if draw < 0.8:
        return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body, True, "sized"
    if draw < 0.92:
        return (
            head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(rng, body) + b"0\r\n\r\n",
            True,
            "chunked",
        )
    length = rng.choice(
        (
            "-1",
            "",
            "x",
            "0x10",
            "1e3",
            "+5",
            "5, 5",
            "9" * 30,
            f"{len(body) + 7}",
            f"{len(body) // 2}",
            "\xb2",
            "0",
        )
    )
    broken = (
        (head + f"Content-Length: {length}\r\n\r\n".encode("latin-1") + body, "wrong length"),
        (head + f"Content-Length: 5\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body, "two lengths"),
        (head + f"Content-Length: {len(body)}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body, "both"),
        (head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(rng, body), "chunks without an end"),
        (head + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n" + body, "endless chunk"),
        (head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body, "no chunk"),
        (
            head + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + _chunks(rng, body) + b"0\r\n\r\n",
            "coded chunks",
        ),
        (head + b"\r\n" + body, "unsized"),
        (head + b"X: a\0b\r\nContent-Length: 0\r\n\r\n", "zero in a header"),
        (head + b" folded\r\n\r\n", "folded header"),
        (head, "head without an end"),
        (body, "no head"),
    )
    message, how = rng.choice(broken)
    return message, False, how


def _chunks(rng: random.Random, body: bytes) -> bytes:
    size = rng.choice((1_000, 10_000, max(len(body), 1)))
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)
