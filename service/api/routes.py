"""The routes. Each says what it reads and writes; `Pipeline` does the waiting."""

import math
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from torch import Tensor

from model.images.tensors import dtype_name
from model.tokenizer import Tokenizer
from service.api import openapi
from service.api.options import OptionsRoute
from service.api.pipeline import Call, Pipeline
from service.codecs.media_types import JSON, LATENT_MEDIA_TYPES, RAW, choose
from service.codecs.requests import (
    IMAGE_FILE,
    declared_items,
    image_body_kind,
    latent_body_kind,
    read_latents,
    read_raw_images,
    reading_bytes,
    split_images,
)
from service.codecs.responses import Origin, latent_dtype, latents_answer, offered_pictures, pictures_answer
from service.codecs.schemas import (
    CommonOptions,
    DecodeOptions,
    EncodeOptions,
    Health,
    Info,
    LatentInfo,
    Limits,
    PictureOutOptions,
    ReconstructOptions,
)
from service.engine.operations import DECODE, ENCODE, RECONSTRUCT, BatchKey
from service.errors import OptionError
from service.photos.decode import ImageRules
from service.telemetry.metrics import METRICS_MEDIA_TYPE

router = APIRouter()
operations = APIRouter(route_class=OptionsRoute)

_QUICK_NUMBERS = 400_000  # narrowed and copied in under 0.2 ms: as long as a thread takes to be asked


@operations.post("/encode", **openapi.ENCODE)
async def encode(request: Request, options: Annotated[EncodeOptions, Query()]) -> Response:
    """Turn images into latents [N, C, h, w].

    The body is one image file, several as `multipart/form-data` or JSON, or a raw tensor
    [N, 3, H, W] whose shape and dtype the query names: uint8, or floating point in [-1, 1] unless
    `range=unit`; the answer then has the body's dtype where that is a float. Images get their EXIF
    orientation, alpha goes on white, colours become sRGB, animations give their first frame; then
    the short side is resized and the centre cropped, unless `fit` says otherwise.
    """
    pipeline = _pipeline(request)
    tokenizer = pipeline.ready_tokenizer()
    _check_scaling(options)
    _check_normalize(options, tokenizer)
    latent_dtype(options)
    media_type = choose(options.format, request.headers.get("accept"), LATENT_MEDIA_TYPES)
    num_items = declared_items(options, pipeline.settings.max_items_per_request)
    async with pipeline.admit(request, ENCODE, num_items) as call:
        images = await _read_images(call, options, tokenizer)
        key = BatchKey(ENCODE, options.latent, options.normalize)
        latents = await call.compute(key, images, media_type)
        del images  # no pixel is needed while the answer is written
        write = partial(latents_answer, latents, media_type, options, Origin.of(tokenizer))
        return await call.answer(write, is_quick=media_type != JSON and latents.numel() <= _QUICK_NUMBERS)


@operations.post("/decode", **openapi.DECODE)
async def decode(request: Request, options: Annotated[DecodeOptions, Query()]) -> Response:
    """Turn latents [N, C, h, w] into pictures.

    One picture comes as an image file, several as a zip of numbered ones; tensor formats give
    uint8 [N, 3, S, S]. Latents that another checkpoint made are refused where the body tells.
    """
    pipeline = _pipeline(request)
    tokenizer = pipeline.ready_tokenizer()
    _check_scaling(options)
    _check_picture_size(options, tokenizer)
    media_type = choose(options.format, request.headers.get("accept"), offered_pictures(options))
    max_items = pipeline.settings.max_items_per_request
    num_items = declared_items(options, max_items)
    async with pipeline.admit(request, DECODE, num_items) as call:
        payload = await call.read()
        kind = latent_body_kind(payload, options)
        max_numbers = max_items * math.prod(tokenizer.config.latent_shape)
        call.hold(reading_bytes(kind, len(payload.data), max_numbers))
        batch = await call.in_thread(read_latents, payload, kind, options, tokenizer, max_items)
        del payload  # no byte of the body is needed while the latents wait
        call.expect(len(batch.latents))
        if batch.normalized:
            _check_statistics(tokenizer)
        key = BatchKey(DECODE, normalize=batch.normalized)
        pictures = await call.compute(key, batch.latents.unbind(), media_type)
        origin = Origin.of(tokenizer)
        return await call.answer(partial(pictures_answer, pictures, media_type, options, origin))


@operations.post("/reconstruct", **openapi.RECONSTRUCT)
async def reconstruct(request: Request, options: Annotated[ReconstructOptions, Query()]) -> Response:
    """Encode images and decode the latents again.

    Takes what `/encode` takes and answers as `/decode` does; the JSON answer also has PSNR and
    SSIM of each picture against the fitted original.
    """
    pipeline = _pipeline(request)
    tokenizer = pipeline.ready_tokenizer()
    _check_scaling(options)
    _check_picture_size(options, tokenizer)
    media_type = choose(options.format, request.headers.get("accept"), offered_pictures(options))
    num_items = declared_items(options, pipeline.settings.max_items_per_request)
    async with pipeline.admit(request, RECONSTRUCT, num_items) as call:
        images = await _read_images(call, options, tokenizer)
        pictures = await call.compute(BatchKey(RECONSTRUCT, options.latent), images, media_type)
        origin = Origin.of(tokenizer)
        return await call.answer(partial(pictures_answer, pictures, media_type, options, origin, images))


@router.get("/info", **openapi.INFO)
async def info(request: Request) -> Response:
    """Say which model runs here, how, and within which limits."""
    pipeline = _pipeline(request)
    tokenizer, settings = pipeline.engine.tokenizer, pipeline.settings
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
        beta=config.fusion.beta if config.fusion else None,
        dtype=dtype_name(tokenizer.dtype),
        device=str(tokenizer.device),
        kernel_path=tokenizer.fusion_path,
        limits=Limits(
            **{name: getattr(settings, name) for name in Limits.model_fields}
            | {"batch_size": pipeline.engine.batch_size}
        ),
    )
    return Response(document.model_dump_json(), media_type=JSON)


@router.get("/livez", **openapi.LIVEZ)
async def livez() -> Response:
    """Answer as long as the process runs."""
    return Response(Health(status="alive").model_dump_json(), media_type=JSON)


@router.get("/readyz", **openapi.READYZ)
async def readyz(request: Request) -> Response:
    """Answer 200 once the model is warm and images can be decoded, 503 before and while draining."""
    _pipeline(request).check_ready()
    return Response(Health(status="ready").model_dump_json(), media_type=JSON)


@router.get("/metrics", **openapi.METRICS)
async def metrics(request: Request) -> Response:
    """Counters and histograms in Prometheus' text format."""
    pipeline = _pipeline(request)
    return Response(pipeline.metrics.render(), headers={"Content-Type": METRICS_MEDIA_TYPE})


for _path, _endpoint in (("/info", info), ("/livez", livez), ("/readyz", readyz), ("/metrics", metrics)):
    router.add_api_route(_path, _endpoint, methods=["HEAD"], include_in_schema=False, response_model=None)


def service_version() -> str:
    """Version of the installed package, or ``0+source`` when run from a source tree alone."""
    try:
        return version("drorae")
    except PackageNotFoundError:
        return "0+source"


def _pipeline(request: Request) -> Pipeline:
    pipeline: Pipeline = request.app.state.pipeline
    return pipeline


async def _read_images(
    call: Call, options: EncodeOptions | ReconstructOptions, tokenizer: Tokenizer
) -> list[Tensor]:
    """The images of the body, each [3, S, S]: uint8, or float32 in [0, 1]."""
    payload = await call.read()
    kind = image_body_kind(payload, options)
    limits = call.settings
    rules = ImageRules(
        tokenizer.config.image_size,
        limits.max_image_pixels,
        limits.max_aspect_ratio,
        options.fit,
        limits.max_frames,
    )
    call.hold(reading_bytes(kind, len(payload.data)))
    if kind == RAW:
        return await call.in_thread(read_raw_images, payload, options, rules)
    if kind == IMAGE_FILE:
        parts = split_images(payload, kind, limits.max_items_per_request)
    else:
        parts = await call.in_thread(split_images, payload, kind, limits.max_items_per_request)
        call.expect(len(parts))
    del payload  # of several images the parts are copies
    return await call.decode_images(parts, rules)


def _check_scaling(options: CommonOptions) -> None:
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


def _check_normalize(options: EncodeOptions, tokenizer: Tokenizer) -> None:
    if not options.normalize:
        return
    _check_statistics(tokenizer)
    if options.latent == "base":
        raise OptionError("normalize=true needs latent=enriched: the statistics describe enriched latents.")


def _check_statistics(tokenizer: Tokenizer) -> None:
    if not tokenizer.has_statistics:
        raise OptionError("Latents cannot be normalised: this checkpoint has no latent statistics.")


def _check_picture_size(options: PictureOutOptions, tokenizer: Tokenizer) -> None:
    side = tokenizer.config.image_size
    for name in ("height", "width"):
        value = getattr(options, name)
        if value is not None and value != side:
            raise OptionError(
                f"The option {name}={value} is impossible: this model's pictures are {side}x{side}."
            )
