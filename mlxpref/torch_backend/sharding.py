"""Weights shared out over the workers (FSDP), for full fine-tuning of models that no single device holds.

Every worker keeps a slice of each weight, of its gradient and of its optimiser moments. A layer's weights are
brought together when it computes and dropped behind it; gradients are added up and sliced by the backward pass. So
all workers must go through the model equally often, in the same order, and always through :class:`Sharded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mlxpref.errors import ConfigError


class Sharded(nn.Module):
    """The root of a sharded model: whatever reads weights is called inside it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> Sharded:
    """Slice a model's weights, layer by layer and then what is left.

    Raises:
        ConfigError: this process is alone.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ConfigError(
            "training.fsdp shares a model out over several processes: start them with torchrun, or go on "
            "without slices (--set training.fsdp=false)"
        )
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    root = Sharded(model)
    fully_shard(root, mp_policy=policy, reshard_after_forward=True)
    return root


def local(tensor: Tensor) -> Tensor:
    """This worker's slice of a sharded tensor, sharing memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(slice_: Tensor, like: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """A sharded tensor from every worker's slice; all must call this.

    Args:
        slice_: of this worker, as ``view`` shows it.
        like: the parameter it belongs to.
    """
    if not isinstance(like, DTensor):
        return slice_
    shape = view(torch.empty(like.shape, device="meta")).shape
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(_axis(view, like))]
    made = DTensor.from_local(
        slice_.contiguous(), like.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return made.full_tensor()


def sliced(tensor: Tensor, like: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """This worker's slice of a whole tensor, the inverse of :func:`whole`; nothing is exchanged."""
    if not isinstance(like, DTensor):
        return tensor
    placements = [Shard(_axis(view, like))]
    return distribute_tensor(tensor.to(like.device), like.device_mesh, placements, src_data_rank=None).to_local()


def _axis(view: Callable[[Tensor], Tensor], like: Tensor) -> int:
    """Where a view has the parameter's first axis, along which it is sliced."""
    marked = torch.empty((like.shape[0] + 1, *like.shape[1:]), device="meta")
    before, after = view(torch.empty(like.shape, device="meta")).shape, view(marked).shape
    return next(axis for axis, (one, other) in enumerate(zip(before, after, strict=True)) if one != other)
