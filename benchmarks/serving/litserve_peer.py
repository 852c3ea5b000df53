"""LitServe around the simulated device. Only imported in an environment that has it."""

from pathlib import Path

import litserve
import torch
from fastapi import Response
from torch import Tensor

from benchmarks.serving.simulated import MAX_BATCH, Body, ImageCode, SimulatedDevice
from model.config import TokenizerConfig


class EncodeAPI(litserve.LitAPI):
    """Decodes, batches, encodes and answers, in a worker process of LitServe's.

    Args:
        config: of the model.
        batch_ms: time of a batch on the device, milliseconds.
        lock_file: by which the workers share the device.
        batch_timeout_s: how long a batch waits to be filled, seconds; at 0 it takes the items that are there.
    """

    def __init__(
        self, config: TokenizerConfig, batch_ms: float, lock_file: Path, batch_timeout_s: float
    ) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=batch_timeout_s, api_path="/encode")
        self._config = config
        self._batch_ms = batch_ms
        self._lock_file = lock_file

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.code = ImageCode(self._config)
        self.simulated = SimulatedDevice(self._config, self._batch_ms, self._lock_file)

    def decode_request(self, request: Body) -> Tensor:
        return self.code.read(request)

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, x: Tensor) -> Tensor:
        return self.simulated.latents(len(x))

    def unbatch(self, output: Tensor) -> list[Tensor]:
        return list(output)

    def encode_response(self, output: Tensor) -> Response:
        return self.code.write(output)


def serve_litserve(api: EncodeAPI, port: int, workers: int, api_servers: int) -> None:
    """Serve until killed, with LitServe's fast queue, which hands answers over by ZeroMQ."""
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=workers, timeout=60, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=api_servers,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
