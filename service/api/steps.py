"""The steps of a request, in the order in which a route takes them: admit, read, decode, compute, answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from prometheus_client import Histogram
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from service.api.admission import Reservation
from service.api.parts import parts_of
from service.codecs.answers import Answer, writing_bytes
from service.codecs.facts import ModelFacts
from service.codecs.media_types import RAW
from service.codecs.requests import (
    IMAGE_FILE,
    LatentBatch,
    Payload,
    image_body_kind,
    latent_body_kind,
    read_latents,
    read_raw_images,
    reading_bytes,
    split_images,
)
from service.codecs.schemas import DecodeOptions, EncodeOptions, ReconstructOptions
from service.engine.operations import BatchKey, Operation
from service.engine.queue import Job
from service.errors import DeadlineError, DisconnectError, UnavailableError
from service.http.bodies import BodyLimits, check_declared, media_type_of, read_body
from service.photos.decode import ImageRules
from service.telemetry.context import RequestContext


@asynccontextmanager
async def admit(request: Request, operation: Operation, num_items: int) -> AsyncIterator[Reservation]:
    """Give a request its place until its answer is sent, its time is up, or its client goes away.

    Args:
        request: its headers are there, its body is not read yet.
        operation: of its items.
        num_items: how many items it has, as far as the headers tell.

    Raises:
        ServiceError: no room, no time left, the client went away, or a body that cannot be read.
    """
    parts, context = parts_of(request), _context_of(request)
    check_declared(request, parts.settings.max_body_bytes)
    place = context.resources.enter_context(parts.admission.admit(operation, num_items, context.deadline_s))
    context.work.callback(place.hold_items, 0)
    try:
        async with asyncio.timeout(context.deadline_s - time.monotonic()):
            yield place
    except TimeoutError as exc:
        seconds = context.deadline_s - context.started_s
        raise DeadlineError(f"The request was not done within {seconds:.3g} s.") from exc
    except DisconnectError:
        parts.metrics.disconnects.inc()
        raise
    except asyncio.CancelledError:
        if not context.abandoned:
            raise
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        parts.metrics.disconnects.inc()
        raise DisconnectError("The client went away before its answer was ready.") from None
    finally:
        context.work.close()


async def read(request: Request, place: Reservation, num_items: int) -> Payload:
    """The body with what its headers say of it. From then on the client is watched.

    Raises:
        ServiceError: a body that is empty, too large, too slow or incomplete, or no room for it.
    """
    settings, context = parts_of(request).settings, _context_of(request)
    media_type, parameters = media_type_of(request)
    limits = BodyLimits(settings.max_body_bytes, settings.body_timeout_s, settings.body_bytes_per_s)
    with context.measure("read"):
        body = await read_body(request, limits, place.hold_bytes)
    place.hold_items(num_items)
    watcher = asyncio.create_task(_watch_client(request, context, asyncio.current_task()))
    context.work.callback(watcher.cancel)
    return Payload(body, media_type, parameters.get(b"boundary"))


async def decode_images(
    request: Request,
    place: Reservation,
    options: EncodeOptions | ReconstructOptions,
    payload: Payload,
    tokenizer: ModelFacts,
) -> list[Tensor]:
    """The images of a body, each [3, S, S]: uint8, or float32 in [0, 1]. The payload is empty afterwards.

    Raises:
        ServiceError: an image that cannot be read, or no room for the pixels.
    """
    parts, context = parts_of(request), _context_of(request)
    kind = image_body_kind(payload, options)
    limits = parts.settings
    rules = ImageRules(
        tokenizer.config.image_size,
        limits.max_image_pixels,
        limits.max_aspect_ratio,
        options.fit,
        limits.max_frames,
        exact=limits.exact_images or options.exact,
    )
    place.hold_bytes(reading_bytes(kind, len(payload.data)))
    with _timed(request, "decode", parts.metrics.body_decode_seconds):
        if kind == RAW:
            images = await parts.in_thread(place, partial(read_raw_images, payload, options, rules))
            payload.release()
            return images
        split = partial(split_images, payload, kind, limits.max_items_per_request)
        files = split() if kind == IMAGE_FILE else await parts.in_thread(place, split)
        payload.release()
        place.hold_items(len(files))
        place.hold_bytes(sum(len(file.data) for file in files) + len(files) * 3 * rules.side**2)
        return await parts.decoders.decode(files, rules, context.deadline_s)


async def decode_latents(
    request: Request, place: Reservation, options: DecodeOptions, payload: Payload, tokenizer: ModelFacts
) -> LatentBatch:
    """The latents of a body. The payload is empty afterwards.

    Raises:
        ServiceError: the body cannot be read, or its latents do not belong to this model.
    """
    parts = parts_of(request)
    kind = latent_body_kind(payload, options)
    max_items = parts.settings.max_items_per_request
    place.hold_bytes(reading_bytes(kind, len(payload.data), max_items, tokenizer.config.latent_shape))
    with _timed(request, "decode", parts.metrics.body_decode_seconds):
        reading = partial(read_latents, payload, kind, options, tokenizer, max_items)
        batch = await parts.in_thread(place, reading)
    payload.release()
    place.hold_items(len(batch.latents))
    return batch


async def compute(
    request: Request, place: Reservation, key: BatchKey, inputs: Sequence[Tensor], media_type: str
) -> Tensor:
    """Put inputs through the engine. The result is [N, ...] of the key's dtype, in the order of the inputs.

    Reserves the memory that is needed until the answer is sent, so that no result is computed in vain.

    Args:
        request: its payload was released.
        place: its reservation.
        key: kind of the inputs.
        inputs: on the CPU.
        media_type: of the answer.

    Raises:
        ServiceError: no room, the engine stopped, or an item that the model refuses; items that no
            device has begun are taken back.
    """
    engine, context = parts_of(request).engine, _context_of(request)
    operation = key.operation
    result_bytes = len(inputs) * operation.result_bytes(engine.tokenizer.config)
    input_bytes = sum(tensor.nbytes for tensor in inputs)
    kept_bytes = 0 if operation.gives == "latents" else input_bytes
    place.hold_bytes(
        result_bytes
        + max(
            input_bytes + result_bytes,  # the batches that results came in
            kept_bytes + writing_bytes(operation.gives, media_type, result_bytes),
        )
    )
    job = Job(key, inputs, context.deadline_s)
    engine.submit(job)
    try:
        results = await asyncio.wrap_future(job.future)
    except BaseException as exc:
        expired = isinstance(exc, asyncio.CancelledError) and not context.abandoned
        outcome = "expired" if expired else "cancelled"
        engine.cancel(job, UnavailableError("Nobody waits for it."), outcome)
        raise
    finally:
        job.release()
    times = job.times
    context.record("queue", times.enqueued_s, times.taken_s)
    context.record("batch", times.taken_s, times.started_s)
    context.record("device", times.started_s, times.finished_s)
    return results


async def answer(
    request: Request, place: Reservation, write: Callable[[], Answer], is_quick: bool = False
) -> Response:
    """Write the answer: in a thread, or at once where that is quicker than asking a thread."""
    parts = parts_of(request)
    with _timed(request, "encode", parts.metrics.answer_encode_seconds):
        written = write() if is_quick else await parts.in_thread(place, write)
    place.hold_bytes(len(written.content))
    return Response(written.content, headers=dict(written.headers), media_type=written.media_type)


def _context_of(request: Request) -> RequestContext:
    context: RequestContext = request.state.context
    return context


@contextmanager
def _timed(request: Request, stage: str, histogram: Histogram) -> Iterator[None]:
    """Time the block as a stage of the request, and in a histogram by route."""
    started_s = time.monotonic()
    try:
        yield
    finally:
        ended_s = time.monotonic()
        _context_of(request).record(stage, started_s, ended_s)
        histogram.labels(request.scope["path"]).observe(ended_s - started_s)


async def _watch_client(request: Request, context: RequestContext, task: "asyncio.Task[None] | None") -> None:
    """Cancel the request's own task once its client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    context.abandoned = True
    if task is not None:
        task.cancel()
