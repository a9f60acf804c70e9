"""The group that ``mlx.launch`` made, over whatever connects it: ring, jaccl, nccl or mpi."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxpref.errors import RunError, UsageError
from mlxpref.workers import Group, Workers, formed


def workers() -> Workers:
    """The processes this one was launched with; a lone worker where nothing launched it.

    Raises:
        RunError: the group cannot be formed.
        UsageError: another library's launcher made the processes.
    """
    return formed(_form)


def _form(environment: Mapping[str, str]) -> Workers:
    launched = _launched(environment)
    if launched is None:
        return Workers()
    backend, address = launched
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the workers cannot be brought together over {backend}: {error}. Are all of them running, do they "
            "reach each other at the addresses given to mlx.launch, and are its ports (--starting-port) free?"
        ) from error
    return Workers() if group.size() == 1 else MlxWorkers(group, address)


def _launched(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """(backend, address of worker 0) of what a launcher left in the environment; None if there are no others."""
    if "TORCHELASTIC_RUN_ID" in environment and int(environment.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("torchrun started these processes, and this run's backend is mlx: start it with mlx.launch")
    if environment.get("MLX_JACCL_COORDINATOR"):
        return "jaccl", environment["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
    if environment.get("NCCL_HOST_IP") and int(environment.get("MLX_WORLD_SIZE", 1)) > 1:
        return "nccl", environment["NCCL_HOST_IP"]
    if environment.get("MLX_HOSTFILE") and "MLX_RANK" in environment:
        written = Path(environment["MLX_HOSTFILE"]).read_text(encoding="utf-8").strip()
        hosts = json.loads(written) if written else []
        return ("ring", hosts[0][0].rpartition(":")[0]) if len(hosts) > 1 else None
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "mpi", socket.gethostname()
    return None


class MlxWorkers(Group):
    """The processes of a group of MLX's."""

    def __init__(self, group: mx.distributed.Group, address: str):
        self._group = group
        super().__init__(group.rank(), group.size(), address)

    def sum(self, values: mx.array) -> mx.array:
        mx.eval(values)  # by the thread whose streams made it
        return super().sum(values)

    def _all_sum(self, values: mx.array) -> mx.array:
        total = mx.distributed.all_sum(values, group=self._group)
        mx.eval(total)
        return total

    def _given(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    def _numpy(self, values: mx.array) -> np.ndarray:
        return np.array(values)
