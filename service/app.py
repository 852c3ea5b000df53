"""The ASGI application."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from model.tokenizer import Tokenizer
from service.api.endpoints import ENDPOINTS
from service.api.openapi import describe
from service.api.parts import Parts
from service.api.routes import service_version
from service.api.view import EngineView
from service.codecs.media_types import JSON
from service.engine.devices import load_tokenizer
from service.engine.engine import Engine, Load
from service.http.keys import ApiKeys
from service.http.middleware import (
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    CrossOriginMiddleware,
    GateMiddleware,
    RequestMiddleware,
    ShortcutMiddleware,
)
from service.http.problems import answer_http_exception
from service.pages.routes import DOCS_PATH, PAGE_PATH, page_routes
from service.processes.tally import Tally
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import TRACE_HEADERS, Tracing, find_tracing

_LAST_BATCH_S = 0.3
_CORS_METHODS = ("GET", "HEAD", "POST")
_CORS_ALLOWED = ("Authorization", "Content-Type", REQUEST_ID_HEADER, TIMEOUT_HEADER, *TRACE_HEADERS)
_CORS_EXPOSED = ("shape", "dtype", REQUEST_ID_HEADER, "Server-Timing", "Retry-After", *TRACE_HEADERS)


def create_app(
    settings: Settings,
    tokenizer: Tokenizer | None = None,
    *,
    load: Load = load_tokenizer,
    on_failure: Callable[[], None] | None = None,
    on_ready: Callable[[], None] | None = None,
    engine: EngineView | None = None,
    tally: Tally | None = None,
) -> Starlette:
    """Build the application; the model loads in the background once the server starts it.

    Args:
        settings: everything that can be set.
        tokenizer: served instead of the checkpoint that the settings name.
        load: gives the tokenizer otherwise; called in the engine's thread.
        on_failure: called, in the engine's thread, when it failed, at loading or later.
        on_ready: called, in the engine's thread, when it begins to take work.
        engine: of another process; by default one is made here, of all the above.
        tally: where all processes in front of that engine count; by default this one counts alone.

    Raises:
        StartError: unusable API keys, or traces without the extra that exports them.
    """
    metrics = Metrics()
    engine = engine or Engine(
        settings,
        metrics,
        load=load if tokenizer is None else lambda _: tokenizer,
        on_failure=on_failure,
        on_ready=on_ready,
    )
    parts = Parts(settings, engine, metrics, tally)
    keys = ApiKeys(settings)
    tracing = find_tracing(settings.otlp_endpoint, service_version())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        torch.set_num_threads(1)  # of the event loop's thread, whose few tensor operations are small
        engine.start()
        await parts.decoders.start()
        yield
        # Every request has been answered by now; a batch that nobody waits for may still run.
        await asyncio.gather(asyncio.to_thread(engine.close, _LAST_BATCH_S), parts.close())
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = Starlette(
        routes=_routes(keys.required, settings.page == "on"),
        middleware=_middleware(settings, parts, keys, tracing),
        exception_handlers={HTTPException: answer_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.parts = parts
    return app


def _routes(keys_required: bool, with_page: bool) -> list[BaseRoute]:
    document = functools.cache(lambda: json.dumps(describe(service_version(), keys_required)))

    async def openapi(request: Request) -> Response:
        return Response(document(), media_type=JSON)

    return [
        *(Route(endpoint.path, endpoint.handler, methods=[endpoint.method]) for endpoint in ENDPOINTS),
        Route("/openapi.json", openapi),
        *page_routes(with_page),
    ]


def _middleware(settings: Settings, parts: Parts, keys: ApiKeys, tracing: Tracing | None) -> list[Middleware]:
    """The outermost first."""
    layers = [
        Middleware(
            RequestMiddleware,
            request_timeout_s=settings.request_timeout_s,
            metrics=parts.metrics,
            routes=[*(endpoint.path for endpoint in ENDPOINTS), PAGE_PATH, DOCS_PATH],
            tracing=tracing,
            is_closing=lambda: parts.engine.closing,
        )
    ]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CrossOriginMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=_CORS_METHODS,
                allow_headers=_CORS_ALLOWED,
                expose_headers=_CORS_EXPOSED,
            )
        )
    gate = Middleware(
        GateMiddleware,
        keys=keys,
        max_request_timeout_s=settings.max_request_timeout_s,
        retry_after_s=settings.retry_after_s,
    )
    handlers = {(endpoint.method, endpoint.path): endpoint.handler for endpoint in ENDPOINTS}
    return [*layers, gate, Middleware(ShortcutMiddleware, handlers=handlers)]
