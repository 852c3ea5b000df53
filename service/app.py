"""The ASGI application."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from model.tokenizer import Tokenizer
from service.engine import Engine, Load, load_tokenizer
from service.errors import install_handlers
from service.metrics import Metrics
from service.middleware import RequestMiddleware
from service.openapi import install_openapi
from service.pipeline import Pipeline
from service.routes import router, service_version
from service.settings import Settings

_DESCRIPTION = (
    "Image tokenizer: images to latents, enriched by fusing the layers of a frozen vision transformer, "
    "and back. "
    "Formats are chosen by `Accept` or `?format=`. Errors are problem documents (RFC 9457)."
)
_NAMED_ROUTES = ("/encode", "/decode", "/reconstruct", "/info", "/livez", "/readyz", "/metrics", "/docs")


def create_app(
    settings: Settings,
    tokenizer: Tokenizer | None = None,
    *,
    load: Load = load_tokenizer,
    on_failure: Callable[[], None] | None = None,
) -> FastAPI:
    """Build the application; the model loads in the background once the server starts it.

    Args:
        settings: everything that can be set.
        tokenizer: served instead of the checkpoint that the settings name.
        load: gives the tokenizer otherwise; called in the engine's thread.
        on_failure: called, in the engine's thread, when loading failed.
    """
    metrics = Metrics()
    engine = Engine(
        settings, metrics, load=load if tokenizer is None else lambda _: tokenizer, on_failure=on_failure
    )
    pipeline = Pipeline(settings, engine, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close, settings.drain_timeout_s)
        pipeline.close()

    app = FastAPI(
        title="DRoRAE",
        version=service_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours: service.metrics
    )
    app.state.pipeline = pipeline
    app.include_router(router)
    install_handlers(app)
    install_openapi(app)
    app.add_middleware(
        RequestMiddleware,
        request_timeout_s=settings.request_timeout_s,
        metrics=metrics,
        routes=_NAMED_ROUTES,
    )
    return app
