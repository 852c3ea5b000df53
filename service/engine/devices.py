"""Devices: those that a setting means, what suits them, the model on them, and how CPUs are shared out."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.process import num_cpus
from model.tokenizer import Tokenizer
from service.errors import UnavailableError
from service.settings import Settings

MAX_CPU_WORKERS = 4
MAX_DECODERS = 32
CPU_BATCH_SIZE = 8
GPU_BATCH_SIZE = 64
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability (major, minor) from which on GPUs multiply bfloat16 matrices (Ampere, 2020)."""
_FEW_CPUS = 2


def load_tokenizer(settings: Settings) -> Tokenizer:
    """Load the tokenizer that the settings name, on the device that they name.

    Raises:
        model.errors.CheckpointError: it cannot be loaded.
        model.errors.FusionError: the implementation of the fusion that they force cannot run here.
        UnavailableError: the device does not exist here.
    """
    device = visible_devices(settings.device)[0]
    dtype = getattr(torch, choose(settings).settings.dtype)
    tokenizer = Tokenizer.load(settings.checkpoint, device=device, dtype=dtype, fusion=settings.fusion)
    return tokenizer.compile_blocks() if settings.compile_blocks and device != "cpu" else tokenizer


def visible_devices(device: str) -> list[str]:
    """The devices that a setting means: ``auto`` and ``cuda`` stand for every visible GPU.

    Raises:
        UnavailableError: there is no such device here.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return ["cpu"]
    if num_gpus == 0:
        raise UnavailableError(f"The device {device!r} is not there: PyTorch sees no GPU.")
    if device in ("auto", "cuda"):
        return [f"cuda:{index}" for index in range(num_gpus)]
    if int(device.removeprefix("cuda:")) >= num_gpus:
        raise UnavailableError(f"The device {device!r} is not there: PyTorch sees {num_gpus} GPUs.")
    return [device]


@dataclass(frozen=True)
class Chosen:
    """Settings that leave nothing to the devices.

    Attributes:
        settings: with a dtype and a batch size.
        reasons: why these two are as they are, a phrase by the setting's name.
    """

    settings: Settings
    reasons: Mapping[str, str]


def choose(settings: Settings) -> Chosen:
    """Choose dtype and batch size for the devices, where the settings leave them open.

    Raises:
        UnavailableError: the device does not exist here.
    """
    gpus = [device for device in visible_devices(settings.device) if device != "cpu"]
    dtype, of_dtype = _dtype_for(gpus) if settings.dtype == "auto" else (settings.dtype, "as set")
    batch_size, of_batch_size = settings.batch_size, "as set"
    if batch_size == 0 and settings.batch_buckets:
        batch_size, of_batch_size = settings.batch_buckets[-1], "the last of batch_buckets"
    elif batch_size == 0:
        batch_size = GPU_BATCH_SIZE if gpus else CPU_BATCH_SIZE
        of_batch_size = f"{batch_size} suits {'a GPU' if gpus else 'a CPU'}"
    chosen = settings.model_copy(update={"dtype": dtype, "batch_size": batch_size})
    return Chosen(chosen, {"dtype": of_dtype, "batch_size": of_batch_size})


def _dtype_for(gpus: Sequence[str]) -> tuple[str, str]:
    """The type of all devices, since answers must not depend on which of them computes, and the reason."""
    if not gpus:
        return "float32", "CPUs keep float32, since most of them emulate bfloat16"
    capabilities = {gpu: torch.cuda.get_device_capability(gpu) for gpu in gpus}
    oldest = min(gpus, key=capabilities.__getitem__)
    shown = f"{oldest} has compute capability {'.'.join(map(str, capabilities[oldest]))}"
    least = ".".join(map(str, BFLOAT16_CAPABILITY))
    if capabilities[oldest] >= BFLOAT16_CAPABILITY:
        return "bfloat16", f"{shown}, and {least} is enough for bfloat16"
    return "float32", f"{shown}, and bfloat16 needs {least}"


@dataclass(frozen=True)
class CpuShares:
    """How the CPUs of this process are shared out.

    Attributes:
        num_workers: batches that a CPU computes side by side.
        num_threads: of each of them.
        num_decoders: processes that decode image files.
    """

    num_workers: int
    num_threads: int
    num_decoders: int


def share_cpus(settings: Settings) -> CpuShares:
    """Share out the CPUs between the model and the decoders, where the settings leave it open.

    Threads that compute and decoders are together no more than the CPUs. One or two CPUs are the exception:
    both get all of them, since a photo takes a decoder a fifth of the model's time.

    A batch gains less from a second core than a second batch does (on two cores, 47 images per second by two
    single-threaded workers, 40 by one with two threads), and one that shares its cores with decoders does
    not make a second thread wait.
    """
    cpus = num_cpus()
    num_gpus = torch.cuda.device_count() if settings.device != "cpu" and torch.cuda.is_available() else 0
    num_decoders = settings.num_decoders or min(MAX_DECODERS, _usual_decoders(cpus, num_gpus))
    num_cores = settings.cpu_threads or (cpus if cpus <= _FEW_CPUS else max(1, cpus - num_decoders))
    num_workers = settings.cpu_workers or min(num_cores, MAX_CPU_WORKERS)
    return CpuShares(num_workers, max(1, num_cores // num_workers), num_decoders)


def _usual_decoders(cpus: int, num_gpus: int) -> int:
    if num_gpus:
        return max(1, cpus - num_gpus)  # a thread of the host keeps each GPU busy
    return cpus if cpus <= _FEW_CPUS else max(cpus // 4, min(2, cpus - 2))


def resident_bytes() -> float:
    """Memory of this process that is resident, bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return float(int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return 0.0
