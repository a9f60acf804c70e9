"""The MLX machine room: the only importer of mlx and mlx_lm.

Five functions are the backend's face (``load_policy``, ``token_logps``, ``make_step``,
``save_adapter``, ``load_adapter``); generation and device facts stand beside them.
"""

from mlxpref import blas

blas.preload()  # before mlx.core is loaded: on Linux CPU a fast BLAS replaces the reference one

from mlxpref.mlx_backend.adapter import load_adapter, save_adapter  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend.generation import generate  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend.memory import device_info, memory, set_memory_policy  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend.policy import Policy, load_policy  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend.probe import examine  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend.reading import hidden_sums, token_logps  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend.step import Step, make_step  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend.workers import workers  # noqa: E402 - after the BLAS

__all__ = [
    "Policy",
    "Step",
    "device_info",
    "examine",
    "generate",
    "hidden_sums",
    "load_adapter",
    "load_policy",
    "make_step",
    "memory",
    "save_adapter",
    "set_memory_policy",
    "token_logps",
    "workers",
]
