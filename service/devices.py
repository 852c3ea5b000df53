"""Devices: those that a setting means, the model on them, and how a CPU's cores are shared out."""

import os

import torch

from model.process import num_cpus
from model.tokenizer import Tokenizer
from service.errors import UnavailableError
from service.settings import Settings

MAX_CPU_WORKERS = 4


def load_tokenizer(settings: Settings) -> Tokenizer:
    """Load the tokenizer that the settings name, on the device that they name.

    Raises:
        model.errors.CheckpointError: it cannot be loaded.
        model.errors.FusionError: the implementation of the fusion that they force cannot run here.
        UnavailableError: the device does not exist here.
    """
    device = visible_devices(settings.device)[0]
    dtype = getattr(torch, settings.dtype)
    return Tokenizer.load(settings.checkpoint, device=device, dtype=dtype, fusion=settings.fusion)


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


def share_cores(num_workers: int, num_threads: int) -> tuple[int, int]:
    """Workers of a CPU and the threads of each, from the settings ``cpu_workers`` and ``cpu_threads``.

    A batch gains less from a second core than a second batch does (on two cores, 47 images a second by two
    single-threaded workers, 40 by one with two threads), and one that shares its cores with decoders does
    not make a second thread wait.
    """
    cores = num_threads or num_cpus()
    workers = num_workers or min(cores, MAX_CPU_WORKERS)
    return workers, max(1, cores // workers)


def resident_bytes() -> float:
    """Memory of this process that is resident, bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return float(int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return 0.0
