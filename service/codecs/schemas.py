"""Query options, and the documents that go in and out as JSON."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FloatName = Literal["float16", "bfloat16", "float32"]
NumberName = Literal["uint8", "float16", "bfloat16", "float32"]
RangeName = Literal["signed", "unit"]
FitName = Literal["crop", "pad", "stretch"]
LatentName = Literal["enriched", "base"]
RouterName = Literal["mean", "maps"]
LatentFormat = Literal["safetensors", "npy", "json", "raw"]
PictureAnswerFormat = Literal["png", "jpeg", "jpg", "webp", "zip", "safetensors", "npy", "json", "raw"]

Shape = Annotated[
    list[Annotated[int, Field(ge=1, le=2**31 - 1)]],
    Field(min_length=1, max_length=8),
]

_SMALL_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAJ0lEQVR42mPkK81gwAaYGHAAFgh11/4KXEj5oA4+HaRLsCCbS5QOAIf1"
    "BQ+TtVbmAAAAAElFTkSuQmCC"
)
Base64Text = Annotated[str, Field(json_schema_extra={"format": "byte", "contentEncoding": "base64"})]


class CommonOptions(BaseModel):
    """Options of every route that takes a body."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: Shape | None = Field(
        None, description="Shape of a raw tensor body, repeated: shape=1&shape=3&shape=256&shape=256."
    )
    range: RangeName | None = Field(
        None,
        description="Range of floating-point pixels, in and out: signed [-1, 1] (default, as diffusers has) "
        "or unit [0, 1].",
    )
    scaling_factor: float | None = Field(
        None,
        json_schema_extra={"enum": [1.0]},
        description="Sent by diffusers; only 1 is possible, the latents have no other scale.",
    )
    shift_factor: float | None = Field(
        None,
        json_schema_extra={"enum": [0.0]},
        description="Sent by diffusers; only 0 is possible, the latents have no shift.",
    )
    do_scaling: bool | None = Field(
        None, json_schema_extra={"enum": [False]}, description="Sent by diffusers; only false is possible."
    )


class ImageInOptions(CommonOptions):
    """Options of the routes that take images."""

    latent: LatentName = Field(
        "enriched", description="Which latent: enriched by fusing the layers, or base, the last layer's."
    )
    fit: FitName = Field(
        "crop",
        description="How an image becomes square: short side resized and centre cropped, padded with white, "
        "or stretched.",
    )
    exact: bool = Field(
        False,
        description="Decode and resize image files bit by bit as training does, which takes two to eight "
        "times as long.",
    )


class PictureOutOptions(CommonOptions):
    """Options of the routes that answer with pictures."""

    format: PictureAnswerFormat | None = Field(
        None,
        description="Format of the answer, instead of Accept. Several pictures come as a zip of that format.",
    )
    dtype: NumberName | None = Field(
        None, description="Type of a raw tensor body's numbers; else as output_dtype."
    )
    output_dtype: NumberName | None = Field(
        None,
        description="Type of the numbers of a picture tensor (default uint8, 0 to 255; with output_type=pt "
        "the request's floating-point dtype).",
    )
    output_type: Literal["pil", "pt"] | None = Field(
        None, description="Sent by diffusers: pt asks for floating-point tensors, pil for image files."
    )
    image_format: Literal["png", "jpg"] | None = Field(
        None, description="Sent by diffusers: the image format where neither format nor Accept names one."
    )
    partial_postprocess: bool | None = Field(
        None, description="Sent by diffusers: with output_type=pt the tensor is uint8 [N, H, W, 3]."
    )
    height: int | None = Field(
        None, ge=1, description="Sent by diffusers; only the model's image size is possible."
    )
    width: int | None = Field(
        None, ge=1, description="Sent by diffusers; only the model's image size is possible."
    )


class EncodeOptions(ImageInOptions):
    """Options of ``/encode``."""

    format: LatentFormat | None = Field(None, description="Format of the answer, instead of Accept.")
    dtype: NumberName | None = Field(
        None,
        description="Type of the latents' numbers (default float16); of a raw tensor body it is the body's "
        "type too, where uint8 is possible.",
    )
    output_dtype: FloatName | None = Field(
        None, description="Type of the latents' numbers where it is not the raw body's."
    )
    normalize: bool = Field(
        False, description="Normalise the latents per position; only where /info says the model can."
    )


class DecodeOptions(PictureOutOptions):
    """Options of ``/decode``."""

    normalize: bool | None = Field(
        None,
        description="Whether the latents are normalised; default is what their metadata says, else false.",
    )


class ReconstructOptions(ImageInOptions, PictureOutOptions):
    """Options of ``/reconstruct``."""

    router: RouterName | None = Field(
        None,
        description="As JSON, also the weights that the fusion's router gives the layers: mean for the mean "
        "of each layer over the picture, maps for that and the weight at each position of the latent.",
    )
    originals: bool = Field(False, description="As JSON, also the fitted images that went into the model.")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImagesIn(_Document):
    """Images as JSON in UTF-8: each field once, and at most 16 KiB beside the list of images."""

    images: list[Base64Text] = Field(
        min_length=1,
        description="Image files, each in standard base64 with padding.",
        examples=[[_SMALL_PNG]],
    )


class LatentsIn(_Document):
    """Latents as JSON in UTF-8; an answer of ``/encode`` is one. Each field once, and at most 16 KiB beside
    the list of latents."""

    latents: list[object] = Field(
        min_length=1, description="Nested lists of numbers, [N, C, h, w] or [C, h, w]."
    )
    normalized: bool | None = Field(None, description="Whether they are normalised per position.")
    checkpoint_sha256: str | None = Field(
        None, description="The checkpoint that made them; another one is refused."
    )
    model: str | None = Field(None, description="Name of the model that made them.")
    latent: LatentName | None = Field(None, description="Which latent they are.")
    dtype: str | None = Field(None, description="Type that their numbers were rounded to.")
    shape: list[int] | None = Field(None, description="Their shape, [N, C, h, w].")


class LatentsOut(_Document):
    """Latents as JSON."""

    model: str = Field(description="Name of the model that made them.")
    checkpoint_sha256: str | None = Field(description="The checkpoint that made them.")
    latent: LatentName = Field(description="Which latent they are.")
    normalized: bool = Field(description="Whether they are normalised per position.")
    dtype: FloatName = Field(description="Type that their numbers were rounded to.")
    shape: list[int] = Field(description="[N, C, h, w].")
    latents: list[list[list[list[float]]]] = Field(description="The numbers, nested as the shape says.")


class PicturesOut(_Document):
    """Pictures as JSON."""

    model: str = Field(description="Name of the model that made them.")
    checkpoint_sha256: str | None = Field(description="The checkpoint that made them.")
    image_format: Literal["png", "jpeg"] = Field(description="Format of the images.")
    images: list[Base64Text] = Field(description="Image files in base64, in the order of the request.")


class ReconstructionsOut(PicturesOut):
    """Reconstructions as JSON, with how close they are to the fitted originals."""

    psnr: list[float | None] = Field(
        description="Peak signal-to-noise ratio of each image, dB; null where it is infinite."
    )
    ssim: list[float] = Field(description="Structural similarity of each image, at most 1.")
    router_mean: list[list[float]] = Field(
        [],
        description="With router: [N, L], each image's mean router weight of each layer that /info lists; a "
        "negative one suppresses its layer.",
    )
    router_maps: list[list[list[list[float]]]] = Field(
        [], description="With router=maps: [N, L, h, w], the router weights at each position of the latent."
    )
    originals: list[Base64Text] = Field(
        [], description="With originals: the fitted images, as files in base64, in the order of the request."
    )


class Limits(_Document):
    """Limits of one request."""

    max_body_bytes: int
    max_image_pixels: int
    max_request_pixels: int
    max_aspect_ratio: float
    max_frames: int
    max_items_per_request: int
    queue_limit_items: int
    queue_limit_bytes: int
    batch_size: int
    request_timeout_s: float
    max_request_timeout_s: float


class LatentInfo(_Document):
    """The latents that this model makes."""

    shape: tuple[int, int, int] = Field(description="[C, h, w] of one latent.")
    normalization: bool = Field(description="Whether normalize=true is possible.")
    kinds: list[LatentName] = Field(description="Values of the option latent.")


class Info(_Document):
    """What runs here."""

    service: Literal["drorae"] = "drorae"
    version: str = Field(description="Version of the service.")
    model: str = Field(description="Name of the model.")
    checkpoint_sha256: str | None = Field(
        description="Identity of the weights; null for weights never saved."
    )
    image_size: int = Field(description="Side of the images in and out, pixels.")
    latent: LatentInfo
    layers: list[int] = Field(description="1-based numbers of the encoder's blocks that are fused.")
    num_layers: int = Field(description="Blocks of the encoder.")
    router: bool = Field(description="Whether the option router of /reconstruct is possible.")
    beta: float | None = Field(description="Size of the incremental correction; null without fusion.")
    dtype: str = Field(description="Type of weights and activations.")
    device: str = Field(description="Where the model runs.")
    reasons: dict[str, str] = Field(description="Why dtype and batch_size are what they are, by name.")
    kernel_path: str = Field(
        description="What computes the fusion: triton, folded or reference; none where there is no fusion."
    )
    limits: Limits


class Health(_Document):
    """State of the service."""

    status: Literal["alive", "ready"]


class Problem(_Document):
    """RFC 9457 problem document: every error looks like this."""

    type: str = Field(description="Stable identifier of the kind of problem, urn:drorae:problem:...")
    title: str = Field(description="The kind of problem in words.")
    status: int = Field(description="HTTP status.")
    detail: str = Field(description="What is wrong with this request, and what to do.")
    request_id: str = Field(description="The id that the service's log has.")
