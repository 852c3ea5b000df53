"""DDP and FSDP2 wrappers, and states that do not depend on the number of ranks.

DDP keeps whole parameters on every rank; FSDP2 keeps a shard of each of the decoder's, and the rest whole.
What a checkpoint stores is whole in both, under the names of the plain module.
"""

import hashlib
import inspect
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model.networks.decoder import Decoder
from training.distributed.ranks import Ranks, current

logger = logging.getLogger(__name__)

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

# torch 2.13 renamed the option and warns of its old name.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


class Replicas:
    """A module that all ranks train on their share of a batch: its gradients are means over the ranks.

    Sharded submodules (`shard_decoder`) average their own gradients; where there are some the others'
    are averaged when the last micro-batch is done, and else by DDP while it is under way.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, may_leave_unused: bool = False) -> None:
        self.module = module
        self.ranks = ranks
        self.sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self.ddp: DistributedDataParallel | None = None
        if ranks.size > 1 and not self.sharded:
            device = next(module.parameters()).device
            options: dict[str, Any] = {_SYNC_BUFFERS: False}  # none of ours changes
            self.ddp = DistributedDataParallel(
                module,
                device_ids=[device.index] if device.type == "cuda" else None,
                find_unused_parameters=may_leave_unused,
                **options,
            )
            # Said of the class token, whose gradient's strides differ in a dimension of one element only.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs) if self.ddp is None else self.ddp(*inputs)

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: gradients travel after the last one only."""
        for part in self.sharded:
            part.set_requires_gradient_sync(is_last, recurse=False)
        quiet: AbstractContextManager[None] = nullcontext()
        if self.ddp is not None and not is_last:
            quiet = self.ddp.no_sync()
        with quiet:
            yield
        if is_last and self.sharded:
            whole = [p for p in self.module.parameters() if p.requires_grad and not is_sharded(p)]
            self.ranks.average_gradients(whole)


def shard_decoder(decoder: Decoder) -> None:
    """`shard_blocks` of a decoder, whose last layer stays whole.

    The adversarial term is balanced by the gradient at its weight, for which a sharded parameter is no leaf.
    """
    shard_blocks(decoder, decoder.blocks, kept_whole=set(decoder.predict.parameters()))


def shard_blocks(
    module: nn.Module, blocks: Iterable[nn.Module], kept_whole: Collection[nn.Parameter] = ()
) -> None:
    """FSDP2: each rank keeps a shard of every block's parameters, and gathers a block when it is its turn."""
    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=set(kept_whole))


def checkpoint_activations(module: nn.Module) -> None:
    """Keep only a module's inputs in the forward pass, and run it again in the backward pass."""
    forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    setattr(module, "forward", forward)  # noqa: B010 - a method of this one instance


def compile_forward(module: nn.Module, dynamic: bool | None = None) -> None:
    """Compile a module's forward pass; hooks of FSDP and of recomputation stay outside.

    With ``dynamic=False`` every shape has code of its own; by default a second one makes it general.
    """
    import torch._functorch.config as functorch

    # The adversarial term's balance takes gradients of one graph three times, so no buffer may be given away.
    functorch.donated_buffer = False
    setattr(module, "forward", torch.compile(module.forward, dynamic=dynamic))  # noqa: B010


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a shard of the tensor only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every rank; collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, which all ranks have, sharded as ``pattern`` is."""
    if not isinstance(pattern, DTensor):
        return value
    value = value.to(pattern.device)
    return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)


def whole_state(module: nn.Module, trained_only: bool = False) -> dict[str, Any]:
    """A module's state dict with whole tensors, in memory of rank 0; empty on other ranks. Collective."""
    state = get_model_state_dict(module, options=replace(_WHOLE, ignore_frozen_params=trained_only))
    return state if current().is_main else {}


def state_everywhere(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict with whole tensors on the device of every rank; collective."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def load_whole_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Strict inverse of `whole_state`, however the module is sharded.

    Raises:
        RuntimeError: names or shapes are not the module's.
    """
    own = module.state_dict()
    module.load_state_dict({name: like(t, own[name]) if name in own else t for name, t in state.items()})


def whole_optimizer_state(
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], module: nn.Module
) -> dict[str, Any]:
    """Moments and step counts by the parameter's name, whole, in memory of rank 0; else empty. Collective."""
    state: Any = get_optimizer_state_dict(module, optimizers, options=_WHOLE)
    return dict(state["state"]) if current().is_main else {}


def load_whole_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Inverse of `whole_optimizer_state`, for one optimizer; rates and decays stay the optimizer's own.

    Raises:
        KeyError: a parameter has no state.
        ValueError: a tensor has another shape than its parameter.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    packed = optimizer.state_dict()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {
        index: {
            key: _moment(value, parameter, names[parameter]) for key, value in state[names[parameter]].items()
        }
        for index, parameter in enumerate(trained)
    }
    optimizer.load_state_dict(packed)


def _moment(value: Tensor, parameter: Tensor, name: str) -> Tensor:
    if value.ndim == 0:  # the step count
        return value
    if value.shape != parameter.shape:
        raise ValueError(f"the optimizer's state of {name!r} has shape {list(value.shape)}")
    return like(value, parameter)


def module_sha256(module: nn.Module) -> str:
    """Digest of a module's names and values, whatever device they are on, sharded or not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
