"""Other ways to serve the simulated device: LitServe, and FastAPI handlers as one writes them first.

``python -m benchmarks.serving.peers litserve|sync|async`` serves ``POST /encode``: an image file in, the
latent's raw float16 bytes out. Device and image code are those of our service.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Response

from benchmarks.serving.simulated import Body, ImageCode, SimulatedDevice, add_device_flag
from model.config import TokenizerConfig
from model.tokenizer import Tokenizer
from service.settings import Settings


def serve_naively(kind: str, config: TokenizerConfig, device: SimulatedDevice) -> None:
    """One handler that decodes, encodes one image and answers: ``sync`` in FastAPI's threads, or not."""
    code = ImageCode(config)
    app = FastAPI()

    def encode(body: Body) -> Response:
        pixels = code.read(body)
        return code.write(device.latents(len(pixels[None]))[0])

    async def encode_on_loop(body: Body) -> Response:
        return encode(body)

    app.post("/encode", response_model=None)(encode if kind == "sync" else encode_on_loop)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    uvicorn.run(app, port=announce(kind), log_level="warning", access_log=False)


def announce(name: str) -> int:
    """Choose a free port and say the address, as `benchmarks.harness.service` expects."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    print(f"{name} on http://127.0.0.1:{port}", flush=True)
    return port


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.peers", description=__doc__)
    parser.add_argument("kind", choices=("litserve", "sync", "async"))
    parser.add_argument("--python", help="interpreter that has the peer, as in --python=PATH")
    parser.add_argument("--lock-file", type=Path, help="what LitServe's workers share the device by")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--batch-timeout-s", type=float, default=0.0)
    add_device_flag(parser)
    arguments = parser.parse_args(argv)
    own = list(sys.argv[1:] if argv is None else argv)
    if arguments.python:
        own = [part for part in own if not part.startswith("--python")]
        os.execv(arguments.python, [arguments.python, "-m", "benchmarks.serving.peers", *own])
    config = Tokenizer.load(Settings().checkpoint).config
    if arguments.kind == "litserve":
        from benchmarks.serving.litserve_peer import EncodeAPI, serve_litserve  # where it is installed

        api = EncodeAPI(config, arguments.device_ms, arguments.lock_file, arguments.batch_timeout_s)
        serve_litserve(api, announce("litserve"), arguments.workers, arguments.api_servers)
    else:
        serve_naively(arguments.kind, config, SimulatedDevice(config, arguments.device_ms))
    return 0


if __name__ == "__main__":
    sys.exit(main())
