"""Query options: read once for each distinct query, and routes that read them so.

FastAPI describes the options in the OpenAPI document. Reading them itself, it would inspect every field's
type on every request, which takes longer than all else that the event loop does for one.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from service.codecs.schemas import CommonOptions
from service.errors import OptionError, describe_validation

Options = TypeVar("Options", bound=CommonOptions)

_MAX_OPTIONS = 64
_MAX_CACHED_BYTES = 512
_REPEATABLE = "shape"


class OptionsRoute(APIRoute):
    """A route whose endpoint takes the request, and the options that its signature describes."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """What runs for a request: FastAPI's own way to take its part over."""
        endpoint = self.endpoint
        annotation = inspect.signature(endpoint).parameters["options"].annotation
        model = cast(type[CommonOptions], annotation.__origin__)  # of Annotated[model, Query()]

        async def handle(request: Request) -> Response:
            response: Response = await endpoint(request, read_options(model, request.scope["query_string"]))
            return response

        return handle


def read_options(model: type[Options], query: bytes) -> Options:
    """The options of a query string, which clients repeat: frozen, so that requests can share them.

    Raises:
        OptionError: an unknown, repeated or impossible option; names it.
    """
    if len(query) > _MAX_CACHED_BYTES:
        return _parse(model, query)
    return cast(Options, _parse_cached(model, query))


def _parse(model: type[Options], query: bytes) -> Options:
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_OPTIONS)
    except ValueError as exc:
        raise OptionError(f"The query has more than {_MAX_OPTIONS} options.") from exc
    values: dict[str, object] = dict(pairs)
    if _REPEATABLE in values:
        values[_REPEATABLE] = [value for name, value in pairs if name == _REPEATABLE]
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1 and name != _REPEATABLE:
            raise OptionError(f"The option {name!r} is given {count} times.")
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        raise OptionError(describe_validation(error, "option")) from exc


_parse_cached = functools.lru_cache(maxsize=1024)(_parse)
