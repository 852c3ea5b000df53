"""The ASGI application."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI

from model.tokenizer import Tokenizer
from service.api.openapi import install_openapi
from service.api.pipeline import Pipeline
from service.api.routes import operations, router, service_version
from service.engine.devices import load_tokenizer
from service.engine.engine import Engine, Load
from service.http.keys import ApiKeys
from service.http.middleware import (
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    CrossOriginMiddleware,
    GateMiddleware,
    RequestMiddleware,
)
from service.http.problems import install_handlers
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.spans import SpanExport
from service.telemetry.tracing import TRACEPARENT_HEADER, TRACESTATE_HEADER

_DESCRIPTION = (
    "Image tokenizer: images to latents, enriched by fusing the layers of a frozen vision transformer, "
    "and back. "
    "Formats are chosen by `Accept` or `?format=`. Errors are problem documents (RFC 9457)."
)
_LAST_BATCH_S = 0.3
_NAMED_ROUTES = ("/encode", "/decode", "/reconstruct", "/info", "/livez", "/readyz", "/metrics", "/docs")
_CORS_METHODS = ("GET", "HEAD", "POST")
_TRACE_HEADERS = (TRACEPARENT_HEADER, TRACESTATE_HEADER)
_CORS_ALLOWED = ("Authorization", "Content-Type", REQUEST_ID_HEADER, TIMEOUT_HEADER, *_TRACE_HEADERS)
_CORS_EXPOSED = ("shape", "dtype", REQUEST_ID_HEADER, "Server-Timing", "Retry-After", *_TRACE_HEADERS)


def create_app(
    settings: Settings,
    tokenizer: Tokenizer | None = None,
    *,
    load: Load = load_tokenizer,
    on_failure: Callable[[], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> FastAPI:
    """Build the application; the model loads in the background once the server starts it.

    Args:
        settings: everything that can be set.
        tokenizer: served instead of the checkpoint that the settings name.
        load: gives the tokenizer otherwise; called in the engine's thread.
        on_failure: called, in the engine's thread, when it failed, at loading or later.
        on_ready: called, in the engine's thread, when it begins to take work.

    Raises:
        StartError: unusable API keys, or traces without the extra that exports them.
    """
    metrics = Metrics()
    engine = Engine(
        settings,
        metrics,
        load=load if tokenizer is None else lambda _: tokenizer,
        on_failure=on_failure,
        on_ready=on_ready,
    )
    pipeline = Pipeline(settings, engine, metrics)
    keys = ApiKeys(settings)
    spans = SpanExport(settings.otlp_endpoint, service_version()) if settings.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(1)  # of the event loop's thread, whose few tensor operations are small
        engine.start()
        await pipeline.decoders.start()
        yield
        # Every request has been answered by now; a batch that nobody waits for may still run.
        await asyncio.gather(asyncio.to_thread(engine.close, _LAST_BATCH_S), pipeline.close())
        if spans is not None:
            await asyncio.to_thread(spans.close)

    app = FastAPI(
        title="DRoRAE",
        version=service_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours: service.telemetry
    )
    app.state.pipeline = pipeline
    app.router.routes += [*operations.routes, *router.routes]  # FastAPI's own inclusion costs each request
    install_handlers(app)
    install_openapi(app, keys_required=keys.required)
    _add_middleware(app, settings, pipeline, keys, spans)
    return app


def _add_middleware(
    app: FastAPI, settings: Settings, pipeline: Pipeline, keys: ApiKeys, spans: SpanExport | None
) -> None:
    """Each one goes around those before it."""
    app.add_middleware(
        GateMiddleware,
        keys=keys,
        max_request_timeout_s=settings.max_request_timeout_s,
        retry_after_s=settings.retry_after_s,
    )
    if settings.cors_origins:
        app.add_middleware(
            CrossOriginMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=_CORS_METHODS,
            allow_headers=_CORS_ALLOWED,
            expose_headers=_CORS_EXPOSED,
        )
    app.add_middleware(
        RequestMiddleware,
        request_timeout_s=settings.request_timeout_s,
        metrics=pipeline.metrics,
        routes=_NAMED_ROUTES,
        on_end=spans.add if spans is not None else None,
        is_closing=lambda: pipeline.engine.closing,
    )
