"""Query options: read once per distinct query, and held to what the model can do."""

import functools
from collections import Counter
from typing import TypeVar, cast
from urllib.parse import parse_qsl

from pydantic import ValidationError
from starlette.requests import Request

from service.codecs.facts import ModelFacts
from service.codecs.media_types import JSON
from service.codecs.schemas import CommonOptions, EncodeOptions, PictureOutOptions, ReconstructOptions
from service.errors import OptionError, describe_validation

Options = TypeVar("Options", bound=CommonOptions)

_MAX_OPTIONS = 64
_MAX_CACHED_BYTES = 512
_REPEATABLE = "shape"


def read_options(model: type[Options], request: Request) -> Options:
    """The options of a request's query. They are frozen, since requests with equal queries share them.

    Raises:
        OptionError: an unknown, repeated or impossible option; names it.
    """
    query: bytes = request.scope["query_string"]
    if len(query) > _MAX_CACHED_BYTES:
        return _parse(model, query)
    return cast(Options, _parse_cached(model, query))


def check_scaling(options: CommonOptions) -> None:
    """Refuse the scaling that diffusers asks for by default.

    Raises:
        OptionError: a factor other than the neutral one.
    """
    if options.do_scaling:
        raise OptionError(
            "The option do_scaling=true is impossible, these latents have no scaling factor: "
            "pass do_scaling=False (in diffusers, remote_decode(..., do_scaling=False))."
        )
    for name, neutral in (("scaling_factor", 1.0), ("shift_factor", 0.0)):
        value = getattr(options, name)
        if value is not None and value != neutral:
            raise OptionError(
                f"The option {name}={value:g} is impossible, these latents have no scale and no shift: "
                f"leave it out, or pass do_scaling=False."
            )


def check_normalize(options: EncodeOptions, tokenizer: ModelFacts) -> None:
    """Refuse to normalise where the statistics are missing, or describe other latents.

    Raises:
        OptionError: ``normalize=true`` is impossible.
    """
    if not options.normalize:
        return
    check_statistics(tokenizer)
    if options.latent == "base":
        raise OptionError(
            "The option normalize=true needs latent=enriched: the statistics describe enriched latents."
        )


def check_statistics(tokenizer: ModelFacts) -> None:
    """Refuse normalised latents where the checkpoint has no statistics.

    Raises:
        OptionError: it has none.
    """
    if not tokenizer.has_statistics:
        raise OptionError("Latents cannot be normalised: this checkpoint has no latent statistics.")


def check_json_extras(options: ReconstructOptions, media_type: str, tokenizer: ModelFacts) -> None:
    """Refuse router weights and originals where the answer, or the model, has none.

    Raises:
        OptionError: ``router`` or ``originals`` is impossible.
    """
    for name in ("router", "originals"):
        if getattr(options, name) and media_type != JSON:
            raise OptionError(f"The option {name} needs format=json: no other answer has room for it.")
    if options.router is None:
        return
    if not tokenizer.has_router:
        raise OptionError("The option router is impossible: this model has no router.")
    if options.latent == "base":
        raise OptionError("The option router needs latent=enriched: the base latent is not mixed of layers.")


def check_picture_size(options: PictureOutOptions, tokenizer: ModelFacts) -> None:
    """Refuse a size of pictures other than the model's.

    Raises:
        OptionError: ``height`` or ``width`` differs.
    """
    side = tokenizer.config.image_size
    for name in ("height", "width"):
        value = getattr(options, name)
        if value is not None and value != side:
            raise OptionError(
                f"The option {name}={value} is impossible: this model's pictures are {side}x{side}."
            )


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
