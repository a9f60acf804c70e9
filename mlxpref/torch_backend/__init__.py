"""The PyTorch machine room: the only importer of torch, transformers' models and peft.

It has the face of the MLX one (``load_policy``, ``token_logps``, ``make_step``, ``save_adapter``,
``load_adapter``, and generation and device facts beside them) and none of its machinery: one stream of tokens and an
attention that takes it apart instead of caches, autograd instead of compiled graphs, peft's layers instead of mlx-lm's.
It is written to be read; that two rooms built so differently agree is the evidence that both are right.
"""

from mlxpref.torch_backend.adapter import load_adapter, save_adapter
from mlxpref.torch_backend.generation import generate
from mlxpref.torch_backend.memory import device_info, memory, set_memory_policy
from mlxpref.torch_backend.policy import Policy, load_policy
from mlxpref.torch_backend.reading import hidden_sums, token_logps
from mlxpref.torch_backend.step import Step, make_step
from mlxpref.torch_backend.workers import workers

__all__ = [
    "Policy",
    "Step",
    "device_info",
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
