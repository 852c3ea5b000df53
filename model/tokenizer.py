"""The tokenizer: images to enriched latents and back.

Shape legend: B batch, N tokens, C latent width, h w latent grid, S image side.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import FusionSetting, choose_path, detect_platform
from kernels.reference import token_norm
from model.checkpoints.directory import Parts, Shapes, check_shapes, read_parts
from model.checkpoints.tokenizers import CheckpointInfo, open_checkpoint, resolve_checkpoint, write_checkpoint
from model.config import TokenizerConfig
from model.errors import CheckpointError, FusionError, LatentError
from model.images.tensors import FLOATS, Images, checked_images, is_dense, to_unit
from model.networks.decoder import Decoder
from model.networks.encoder import Encoder
from model.networks.fusion import Fusion
from model.networks.linear import pack_linear_maps
from model.networks.normalization import NormalizesLatents
from model.networks.vit import compile_blocks

logger = logging.getLogger(__name__)

LatentKind = Literal["enriched", "base"]
_loading = threading.Lock()


class Tokenizer(NormalizesLatents):
    """Image -> frozen encoder -> fusion -> enriched latent -> decoder -> image.

    Build one with `load`, or from a `TokenizerConfig` with random weights.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config.latent_shape)
        self.config = config
        self.checkpoint: CheckpointInfo | None = None
        self.encoder = Encoder(config.encoder)
        self.fusion = Fusion(config.fusion, config.encoder) if config.fusion else None
        self.decoder = Decoder(config)

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        fusion: FusionSetting = "auto",
    ) -> Self:
        """Load a checkpoint, frozen, in eval mode and prepared for inference.

        Args:
            source: a checkpoint directory, or the name of a preset with bundled weights (``mini``).
            device: where the weights go.
            dtype: computation type of weights and activations.
            fusion: which implementation of the fusion to run; ``auto`` takes the fastest for the device.

        Raises:
            FusionError: ``fusion`` names an implementation that cannot run here; says why.
            CheckpointError: missing, corrupt, foreign or of another version; names file and tensor.
        """
        path = resolve_checkpoint(source)
        with _on_one_thread():
            opened = open_checkpoint(path)
            tokenizer = cls.on_meta(opened.config)
            tokenizer._fill(read_parts(path, opened.files, tokenizer.shapes()), path)
            tokenizer.checkpoint = opened.info
            for module in (tokenizer.encoder, tokenizer.fusion, tokenizer.decoder):
                if module is not None:
                    module.freeze()
            tokenizer._prepare_fusion(path, fusion, torch.device(device), dtype)
            tokenizer.to(device=device, dtype=dtype).eval()
            pack_linear_maps(tokenizer)
            return tokenizer

    @classmethod
    def from_parts(cls, config: TokenizerConfig, parts: Parts, path: Path) -> Self:
        """A tokenizer of these tensors, as float32 on the CPU and not frozen.

        Args:
            config: its architecture.
            parts: tensors by checkpoint file, as `parts` gives them.
            path: directory that errors name.

        Raises:
            CheckpointError: a tensor is missing, unexpected or mis-shaped; names it.
        """
        tokenizer = cls.on_meta(config)
        tokenizer._fill(parts, path)
        return tokenizer

    @classmethod
    def on_meta(cls, config: TokenizerConfig) -> Self:
        """A tokenizer of shapes without values, which takes no memory whatever the configuration says."""
        with torch.device("meta"):
            return cls(config)

    def compile_blocks(self, backend: str = "inductor") -> Self:
        """Compile the transformer blocks, for inference on a GPU; the first batches then take some seconds.

        Args:
            backend: of `torch.compile`.
        """
        compile_blocks([*self.encoder.blocks, *self.decoder.blocks], backend)
        return self

    def shapes(self) -> Shapes:
        """Shapes of the tensors by checkpoint file, statistics included."""
        latent = torch.Size(self.config.latent_shape)
        shapes = {
            part: {name: t.shape for name, t in tensors.items()} for part, tensors in self.parts().items()
        }
        return {**shapes, "statistics": {"mean": latent, "var": latent}}

    def save(
        self,
        path: str | Path,
        storage_dtype: torch.dtype | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> CheckpointInfo:
        """Write a checkpoint directory atomically, replacing one that is there.

        Args:
            path: the directory.
            storage_dtype: type of the stored weights; by default as they are. Statistics stay float32.
            provenance: how the weights came to be, kept in ``config.json``; any JSON.
        """
        parts = {}
        for name, tensors in self.parts().items():
            dtype = torch.float32 if name == "statistics" else storage_dtype
            parts[name] = {key: t.detach().cpu().to(dtype or t.dtype) for key, t in tensors.items()}
        return write_checkpoint(Path(path), self.config, parts, provenance or {})

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by checkpoint file: encoder, fusion, decoder, statistics."""
        parts = {"encoder": self.encoder.state_dict(), "decoder": self.decoder.state_dict()}
        if self.fusion is not None:
            parts["fusion"] = self.fusion.state_dict()
        if self.latent_mean is not None and self.latent_var is not None:
            parts["statistics"] = {"mean": self.latent_mean, "var": self.latent_var}
        return parts

    @property
    def device(self) -> torch.device:
        return self.decoder.last_layer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.last_layer.dtype

    @property
    def fusion_path(self) -> str:
        """Which implementation of the fusion runs: triton, folded or reference; ``none`` without fusion."""
        return "none" if self.fusion is None else self.fusion.path

    @property
    def has_router(self) -> bool:
        """Whether `router_weights` is possible: there is a fusion that has a router."""
        return self.fusion is not None and self.fusion.has_router

    @torch.no_grad()
    def encode(self, images: Images, latent: LatentKind = "enriched", normalize: bool = False) -> Tensor:
        """Tokenize images.

        Args:
            images: [B, 3, S, S], floating point in [0, 1] or uint8, S = ``config.image_size``; a tensor or a
                NumPy array, moved to the tokenizer's device. Rounding errors beyond the range are clamped.
            latent: ``enriched`` (z_final) or ``base`` (z_base, the plain last layer).
            normalize: subtract the mean and divide by the deviation of each position.

        Returns:
            [B, C, h, w].

        Raises:
            ImageError: wrong shape or dtype, or values that are no pixels; the message names the valid ones.
            LatentError: another ``latent``; ``normalize`` without statistics, or with the base latent of a
                fused tokenizer.
        """
        if latent not in get_args(LatentKind):
            raise LatentError(f"there is no latent {latent!r}: it is enriched or base")
        images = checked_images(images, self.config.image_size)
        if normalize:
            self._check_normalizable(latent)
        return self.latents(images, latent, normalize)

    @torch.no_grad()
    def latents(self, images: Tensor, latent: LatentKind = "enriched", normalize: bool = False) -> Tensor:
        """`encode` without its checks, which look at every value and wait for the device."""
        tokens = self.tokens(self._unit_range(images), latent)
        latents = tokens.transpose(1, 2).unflatten(2, self.config.latent_shape[1:])
        return self.normalize_latents(latents) if normalize else latents.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, normalize: bool = False) -> Tensor:
        """Reconstruct images.

        Args:
            latents: [B, C, h, w], enriched or base.
            normalize: whether ``latents`` are normalised per position.

        Returns:
            [B, 3, S, S] in [0, 1].

        Raises:
            LatentError: wrong shape, dtype or a non-finite value; ``normalize`` without statistics.
        """
        latents = self._checked_latents(latents)
        if normalize:
            self._check_normalizable("enriched")
        return self.pixels(latents, normalize)

    def reconstruct(self, images: Images, latent: LatentKind = "enriched") -> Tensor:
        """``decode(encode(images))``: images as for `encode` to [B, 3, S, S] in [0, 1]."""
        return self.decode(self.encode(images, latent))

    @torch.no_grad()
    def router_weights(self, images: Images) -> Tensor:
        """The weights that the fusion's router gives each layer at each position; images as for `encode`.

        Returns:
            [B, L, h, w], shallow to deep. A negative weight suppresses its layer.

        Raises:
            FusionError: the tokenizer has no router.
            ImageError: as `encode` does.
        """
        return self.routing(checked_images(images, self.config.image_size))

    @torch.no_grad()
    def routing(self, images: Tensor) -> Tensor:
        """`router_weights` without the checks of values, which wait for the device."""
        if self.fusion is None or not self.has_router:
            raise FusionError(f"tokenizer {self.config.name!r} has no router")
        hidden_states = self.encoder(self.preprocess(self._unit_range(images)))
        weights_BNL = self.fusion.router_weights(hidden_states)
        return weights_BNL.transpose(1, 2).unflatten(2, self.config.latent_shape[1:]).contiguous()

    def tokens(self, images: Tensor, latent: LatentKind = "enriched") -> Tensor:
        """Differentiable encode: images [B, 3, S, S] in [0, 1] to latent tokens [B, N, C]."""
        return self.tokens_of(self.encoder(self.preprocess(images)), latent)

    def tokens_of(self, hidden_states: list[Tensor], latent: LatentKind = "enriched") -> Tensor:
        """Latent tokens [B, N, C] of every block's patch tokens, as the encoder gives them."""
        if latent == "base" or self.fusion is None:
            return token_norm(hidden_states[-1], self.config.encoder.layer_norm_eps)
        return self.fusion(hidden_states)

    def pixels(self, latents: Tensor, normalize: bool = False) -> Tensor:
        """Differentiable, unchecked decode: latents [B, C, h, w] to images [B, 3, S, S] in [0, 1]."""
        if normalize:
            latents = self.denormalize_latents(latents)
        return self.decoder(latents.flatten(2).transpose(1, 2)).clamp(0, 1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize [B, 3, S, S] in [0, 1] to the encoder's input (bicubic, as RAE) and normalise it."""
        side = self.config.encoder.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)
        return (images - self.decoder.pixel_mean) / self.decoder.pixel_std

    def _unit_range(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], floats or bytes, on the tokenizer's device, in its dtype and in [0, 1]."""
        return to_unit(images.to(self.device).contiguous(), self.dtype)

    def _checked_latents(self, latents: object) -> Tensor:
        """Latents on the tokenizer's device and in its dtype, in which they must be finite."""
        if not isinstance(latents, Tensor):
            raise LatentError(f"latents are a {type(latents).__name__}, expected a tensor (torch.from_numpy)")
        if not is_dense(latents):
            raise LatentError("latents are no dense tensor with values: sparse, nested or on the meta device")
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.config.latent_shape:
            channels, rows, columns = self.config.latent_shape
            raise LatentError(
                f"latents have shape {list(latents.shape)}, expected [B, {channels}, {rows}, {columns}]"
            )
        if latents.dtype not in FLOATS:
            raise LatentError(f"latents have dtype {latents.dtype}, expected floating point")
        latents = latents.to(device=self.device, dtype=self.dtype)
        finite = finite_items(latents)
        if not finite.all():
            index = int((~finite).nonzero()[0])
            raise LatentError(f"latent {index} holds a NaN or infinite value")
        return latents

    def _check_normalizable(self, latent: LatentKind) -> None:
        if not self.has_statistics:
            raise LatentError(f"checkpoint {self.config.name!r} has no latent statistics to normalise with")
        if latent == "base" and self.fusion is not None:
            raise LatentError("the statistics describe enriched latents: normalize is not offered for base")

    def _prepare_fusion(
        self, path: Path, setting: FusionSetting, device: torch.device, dtype: torch.dtype
    ) -> None:
        if self.fusion is None:
            return
        try:
            choice = choose_path(setting, self.fusion.problem(dtype), detect_platform(device))
        except ValueError as exc:
            raise FusionError(str(exc)) from exc
        try:
            self.fusion.prepare(choice.path, device, dtype)
        except ValueError as exc:
            raise CheckpointError(f"{path / 'fusion.safetensors'}: {exc}") from exc
        fell_back = setting == "auto" and device.type == "cuda" and choice.path != "triton"
        level = logging.WARNING if fell_back else logging.INFO
        logger.log(level, "fusion path %s: %s", choice.path, choice.reason)

    def _fill(self, parts: Parts, path: Path) -> None:
        """Give a tokenizer on meta its tensors, and the buffers that no checkpoint stores."""
        shapes = self.shapes()
        for part, tensors in sorted(parts.items()):  # statistics last: they go to the weights' device
            file = path / f"{part}.safetensors"
            check_shapes(file, {name: tensor.shape for name, tensor in tensors.items()}, shapes[part])
            if part == "statistics":
                self._load_statistics(tensors, file)
            else:
                values = {name: tensor.float() for name, tensor in tensors.items()}
                getattr(self, part).load_state_dict(values, assign=True)
        for name, constant in Decoder.constants(self.config).items():
            setattr(self.decoder, name, constant)

    def _load_statistics(self, tensors: dict[str, Tensor], file: Path) -> None:
        try:
            self.set_statistics(tensors["mean"], tensors["var"])
        except LatentError as exc:
            raise CheckpointError(f"{file}: {exc}") from exc


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Let PyTorch compute on the calling thread alone.

    Loading is hundreds of short operations. A team of threads spins at the end of each, and on busy CPUs
    waits there for a turn: a load of ``mini`` took 11 to 17 s on two threads and 0.7 s on one.
    The number of threads is also that of threads which first use PyTorch in the meantime, hence the lock.
    """
    with _loading:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


def largest_magnitudes(batch: Tensor) -> Tensor:
    """Of the numbers of each item of [B, ...], [B]; NaN or infinite where one of them is."""
    return batch.flatten(1).abs().amax(dim=1)


def finite_items(batch: Tensor) -> Tensor:
    """Which items of [B, ...] hold neither a NaN nor an infinity, [B] bool.

    By the largest magnitude, which either of them takes over: ten times as fast on a CPU as asking every
    number.
    """
    return torch.isfinite(largest_magnitudes(batch))
