"""The group that ``torchrun`` made: gloo between CPUs, nccl between CUDA devices."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from mlxpref.errors import RunError, UsageError
from mlxpref.workers import Group, Workers, formed

PATIENCE = timedelta(days=7)
"""A worker may wait long for another (it reads a model, it saves); one that has gone is noticed otherwise."""

LET_GO_SECONDS = 1.0
"""How long a sum waits for the library below to let go of it."""


def workers() -> Workers:
    """The processes this one was launched with; a lone worker where nothing launched it.

    On CUDA the process's device is set to the one of its number on its machine.

    Raises:
        RunError: the group cannot be formed.
        UsageError: another library's launcher made the processes.
    """
    return formed(_form)


def _form(environment: Mapping[str, str]) -> Workers:
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        if "MLX_RANK" in environment and environment.get("MLX_HOSTFILE"):
            raise UsageError(
                "mlx.launch started these processes, and this run's backend is torch: start it with torchrun"
            )
        return Workers()
    if int(environment["WORLD_SIZE"]) == 1:
        return Workers()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(environment.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    try:
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the workers cannot be brought together: {error}. Are all of them running, and do they reach "
            f"{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', '')}?"
        ) from error
    return TorchWorkers(device, environment["MASTER_ADDR"])


class TorchWorkers(Group):
    """The processes of torch's default group."""

    def __init__(self, device: torch.device, address: str):
        self._device = device
        # Sums have a stream of their own: one that never ends must not keep the others from being saved.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        super().__init__(dist.get_rank(), dist.get_world_size(), address)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if values.is_cuda:
            torch.cuda.current_stream().synchronize()  # another thread has another stream
        return super().sum(values)

    def _all_sum(self, values: torch.Tensor) -> torch.Tensor:
        if not values.is_cuda:
            total = values.detach().clone()
            alone = _holders(total)
            try:
                dist.all_reduce(total)
            finally:
                # gloo's thread lets go of the sum when it comes to it, and where Python is at its end by then that
                # aborts the process: no sum is over before.
                latest = time.monotonic() + LET_GO_SECONDS
                while _holders(total) != alone and time.monotonic() < latest:
                    time.sleep(1e-4)
            return total
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            total = values.detach().clone()
            dist.all_reduce(total)
        self._stream.synchronize()
        return total

    def _given(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(values))

    def _numpy(self, values: torch.Tensor) -> np.ndarray:
        return values.cpu().numpy()


def _holders(values: torch.Tensor) -> tuple[int, int]:
    """How many hold a tensor: in torch, in Python."""
    return values._use_count(), sys.getrefcount(values)
