"""The service on Ray Serve: replicas of the unchanged application, one per GPU or CPU share.

    serve run deploy.ray_serve:app               # a cluster of this machine
    serve deploy deploy/ray_serve/config.yaml    # a cluster that runs

Settings are the variables ``DRORAE_*`` of the replicas. `deploy/README.md` has the rest.
"""

import asyncio
from typing import Any, cast

from ray import serve

from service.api.parts import Parts
from service.app import create_app
from service.engine.engine import Engine
from service.settings import Settings


@serve.deployment(
    max_ongoing_requests=10_000,  # the service itself refuses what would wait too long, with Retry-After
    health_check_period_s=5,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=40,  # above drain_timeout_s
)
@serve.ingress()
class Replica:
    """One process with a model."""

    def __init__(self) -> None:
        self._app = create_app(Settings())
        parts: Parts = self._app.state.parts
        self._engine = cast(Engine, parts.engine)  # its own, not another process's

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Wait while the model loads; raise once the engine failed, so that Serve replaces the replica."""
        while not await asyncio.to_thread(self._engine.wait_until_settled, 1.0):
            continue
        if self._engine.failure is not None:
            raise RuntimeError(self._engine.failure)


app = cast(Any, Replica).bind()
