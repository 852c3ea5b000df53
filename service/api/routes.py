"""The routes. Those of operations read from top to bottom: admit, read, decode, compute, answer."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version

from starlette.requests import Request
from starlette.responses import Response

from model.images.tensors import dtype_name
from service.api.options import (
    check_json_extras,
    check_normalize,
    check_picture_size,
    check_scaling,
    check_statistics,
    read_options,
)
from service.api.parts import parts_of
from service.api.steps import admit, answer, compute, decode_images, decode_latents, read
from service.codecs.answers import (
    Origin,
    latent_dtype,
    latents_answer,
    offered_pictures,
    picture_dtype,
    pictures_answer,
    reconstructions_answer,
)
from service.codecs.media_types import JSON, LATENT_MEDIA_TYPES, choose
from service.codecs.requests import declared_items
from service.codecs.schemas import (
    DecodeOptions,
    EncodeOptions,
    Health,
    Info,
    LatentInfo,
    Limits,
    ReconstructOptions,
)
from service.engine.operations import DECODE, ENCODE, RECONSTRUCT, ROUTE, BatchKey
from service.telemetry.metrics import METRICS_MEDIA_TYPE

_QUICK_NUMBERS = 400_000  # narrowed and copied in under 0.2 ms: as long as asking a thread takes


async def encode(request: Request) -> Response:
    """Turn images into latents [N, C, h, w].

    The body is one image file, several as `multipart/form-data` or JSON, or a raw tensor
    [N, 3, H, W] whose shape and dtype the query names: uint8, or floating point in [-1, 1] unless
    `range=unit`; the answer then has the body's dtype where that is a float. Images get their EXIF
    orientation, alpha goes on white, colours become sRGB, animations give their first frame; then
    the short side is resized and the centre cropped, unless `fit` says otherwise.
    """
    options = read_options(EncodeOptions, request)
    parts = parts_of(request)
    tokenizer = parts.ready_tokenizer()
    check_scaling(options)
    check_normalize(options, tokenizer)
    latent_dtype(options)
    media_type = choose(options.format, request.headers.get("accept"), LATENT_MEDIA_TYPES)
    num_items = declared_items(options, parts.settings.max_items_per_request)
    async with admit(request, ENCODE, num_items) as place:
        payload = await read(request, place, num_items)
        images = await decode_images(request, place, options, payload, tokenizer)
        key = BatchKey(ENCODE, options.latent, options.normalize, latent_dtype(options))
        latents = await compute(request, place, key, images, media_type)
        del images  # no pixel is needed while the answer is written
        write = partial(latents_answer, latents, media_type, options, Origin.of(tokenizer))
        is_quick = media_type != JSON and latents.numel() <= _QUICK_NUMBERS
        return await answer(request, place, write, is_quick)


async def decode(request: Request) -> Response:
    """Turn latents [N, C, h, w] into pictures.

    One picture comes as an image file, several as a zip of numbered ones; tensor formats give
    uint8 [N, 3, S, S]. Latents that another checkpoint made are refused where the body tells.
    """
    options = read_options(DecodeOptions, request)
    parts = parts_of(request)
    tokenizer = parts.ready_tokenizer()
    check_scaling(options)
    check_picture_size(options, tokenizer)
    media_type = choose(options.format, request.headers.get("accept"), offered_pictures(options))
    num_items = declared_items(options, parts.settings.max_items_per_request)
    async with admit(request, DECODE, num_items) as place:
        payload = await read(request, place, num_items)
        batch = await decode_latents(request, place, options, payload, tokenizer)
        if batch.normalized:
            check_statistics(tokenizer)
        key = BatchKey(DECODE, normalize=batch.normalized, dtype=picture_dtype(media_type, options))
        pictures = await compute(request, place, key, batch.latents.unbind(), media_type)
        png = parts.settings.png_compression
        write = partial(pictures_answer, pictures, media_type, options, Origin.of(tokenizer), png=png)
        return await answer(request, place, write)


async def reconstruct(request: Request) -> Response:
    """Encode images and decode the latents again.

    Takes what `/encode` takes and answers as `/decode` does; the JSON answer also has PSNR and
    SSIM of each picture against the fitted original and, where options ask for them, the weights
    by which the fusion's router mixed the layers, and the fitted originals themselves.
    """
    options = read_options(ReconstructOptions, request)
    parts = parts_of(request)
    tokenizer = parts.ready_tokenizer()
    check_scaling(options)
    check_picture_size(options, tokenizer)
    media_type = choose(options.format, request.headers.get("accept"), offered_pictures(options))
    check_json_extras(options, media_type, tokenizer)
    num_items = declared_items(options, parts.settings.max_items_per_request)
    async with admit(request, RECONSTRUCT, num_items) as place:
        payload = await read(request, place, num_items)
        images = await decode_images(request, place, options, payload, tokenizer)
        weights = None
        if options.router is not None:
            weights = await compute(request, place, BatchKey(ROUTE), images, media_type)
        dtype = picture_dtype(media_type, options, compares=True)
        key = BatchKey(RECONSTRUCT, options.latent, dtype=dtype)
        pictures = await compute(request, place, key, images, media_type)
        origin, png = Origin.of(tokenizer), parts.settings.png_compression
        write = partial(reconstructions_answer, pictures, images, weights, media_type, options, origin, png)
        return await answer(request, place, write)


async def info(request: Request) -> Response:
    """Say which model runs here, how, and within which limits."""
    parts = parts_of(request)
    tokenizer, settings = parts.engine.tokenizer, parts.settings
    config, origin = tokenizer.config, Origin.of(tokenizer)
    document = Info(
        version=service_version(),
        model=origin.model,
        checkpoint_sha256=origin.checkpoint_sha256,
        image_size=config.image_size,
        latent=LatentInfo(
            shape=config.latent_shape,
            normalization=tokenizer.has_statistics,
            kinds=["enriched", "base"],
        ),
        layers=list(config.fused_layers),
        num_layers=config.encoder.depth,
        router=tokenizer.has_router,
        beta=config.fusion.beta if config.fusion else None,
        dtype=dtype_name(tokenizer.dtype),
        device=str(tokenizer.device),
        reasons=dict(parts.engine.reasons),
        kernel_path=tokenizer.fusion_path,
        limits=Limits(
            **{name: getattr(settings, name) for name in Limits.model_fields}
            | {"batch_size": parts.engine.batch_size}
        ),
    )
    return Response(document.model_dump_json(), media_type=JSON)


async def livez(request: Request) -> Response:
    """Answer as long as the process runs."""
    return Response(Health(status="alive").model_dump_json(), media_type=JSON)


async def readyz(request: Request) -> Response:
    """Answer 200 once the model is warm and images can be decoded, 503 before and while draining."""
    parts_of(request).check_ready()
    return Response(Health(status="ready").model_dump_json(), media_type=JSON)


async def metrics(request: Request) -> Response:
    """Counters and histograms in Prometheus' text format."""
    page = await parts_of(request).engine.metrics_page()
    return Response(page, headers={"Content-Type": METRICS_MEDIA_TYPE})


def service_version() -> str:
    """Version of the installed package, or ``0+source`` when run from a source tree alone."""
    try:
        return version("drorae")
    except PackageNotFoundError:
        return "0+source"
