"""Latents to pictures by a running service, as a generator elsewhere would do it."""

import time
from collections.abc import Mapping

import httpx
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cli.errors import CommandError
from service.codecs import tensors
from service.codecs.media_types import SAFETENSORS

TIMEOUT_S = 120.0
MAX_WAIT_S = 120.0
BUSY = (429, 503)


class RemoteDecoder:
    """Decodes at ``URL/decode``; waits where the service asks to come again.

    Args:
        url: of the service.
        metadata: of the latents, such as the tokenizer's sha256, which the service compares with its own.
        key: bearer key, where the service wants one.
    """

    def __init__(self, url: str, metadata: Mapping[str, str], key: str | None = None) -> None:
        self.url = url.rstrip("/") + "/decode"
        self.metadata = dict(metadata)
        self.headers = {"Accept": SAFETENSORS, "Content-Type": SAFETENSORS}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [0, 1] of raw latents [B, C, h, w].

        Raises:
            CommandError: the service is not there or refuses; says what it said.
        """
        narrowed = tensors.narrow(latents.float().cpu(), torch.float16)
        body = tensors.write_safetensors("latents", narrowed, self.metadata)
        started = time.monotonic()
        while True:
            try:
                answer = httpx.post(self.url, content=body, headers=self.headers, timeout=TIMEOUT_S)
            except (httpx.HTTPError, httpx.InvalidURL) as exc:
                raise CommandError(f"{self.url}: {exc or type(exc).__name__}") from exc
            wait_s = _wait_s(answer)
            if wait_s is None or time.monotonic() - started + wait_s > MAX_WAIT_S:
                break
            time.sleep(wait_s)
        if answer.status_code != 200:
            raise CommandError(f"{self.url}: status {answer.status_code}: {_detail(answer)}")
        try:
            return load(answer.content)["images"].float() / 255
        except (SafetensorError, KeyError) as exc:
            raise CommandError(f"{self.url}: the answer holds no pictures") from exc


def _wait_s(answer: httpx.Response) -> float | None:
    """How long a busy service asks to wait, seconds."""
    if answer.status_code not in BUSY:
        return None
    asked = answer.headers.get("Retry-After", "1")
    return float(asked) if asked.isdecimal() else 1.0


def _detail(answer: httpx.Response) -> str:
    try:
        document = answer.json()
    except ValueError:
        return "no service of this kind answers there"
    detail = document.get("detail") if isinstance(document, dict) else None
    return detail if isinstance(detail, str) else "no service of this kind answers there"
