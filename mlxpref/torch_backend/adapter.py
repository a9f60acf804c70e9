"""Adapter folders as mlx-lm has them, written and read by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from mlxpref.errors import AdapterError
from mlxpref.files import write_text, written_aside
from mlxpref.folders import CONFIG, WEIGHTS, adapter_config, check_base, check_tensors, read_base, read_settings
from mlxpref.torch_backend.policy import Policy, load_policy


def save_adapter(policy: Policy, folder: Path, *, extra: Mapping[str, Any]) -> None:
    """Write the policy's adapter so that mlx-lm's generate, fuse and server take it as it is.

    Both files are written aside and renamed; an existing adapter stays whole until then.

    Args:
        folder: made if missing.
        extra: JSON-safe facts kept under the key ``mlxpref`` (objective, conditioning recipe, …).

    Weights that are shared out over the workers are brought together: all workers call this then, the first writes.
    """
    weights = policy.to_save()
    if policy.sharded and dist.get_rank() > 0:
        return
    write_safetensors(folder / WEIGHTS, weights, {"format": "mlx"})
    write_text(folder / CONFIG, adapter_config(policy, extra))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors in a file that appears under its name whole or not at all; RunError when the disk is full."""
    # Clones: views of one memory cannot be saved beside each other.
    ordered = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    with written_aside(path) as aside:
        aside.write_bytes(safetensors.torch.save(ordered, metadata))


def load_weights(policy: Policy, folder: Path) -> None:
    """Put an adapter's weights into a policy prepared for them.

    Raises:
        AdapterError: every tensor that is missing, unexpected or of another shape, in one message.
    """
    weights = read_safetensors(folder / WEIGHTS)
    ours = {name: slot.shape for name, slot in policy.slots.items()}
    check_tensors({name: value.shape for name, value in weights.items()}, ours, folder, policy.path)
    for name, value in weights.items():
        policy.slots[name].value.copy_(policy.slots[name].sliced(value))


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """AdapterError if the file is missing or damaged."""
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file}: cannot be read ({error}); the file is damaged") from error


def load_adapter(path: str | Path, *, model_path: str | None = None, dtype: str | None = None) -> Policy:
    """A policy with a finished adapter on it, for evaluation and generation; nothing trains.

    Its reference is the base model.

    Args:
        path: adapter folder (a run folder is one).
        model_path: base model, when it has moved since the adapter was trained.

    Raises:
        AdapterError: the folder is no adapter, was made for another model, or its base has changed since.
        ModelError: the base model cannot be loaded.
    """
    folder = Path(path)
    base = read_base(folder, model_path)
    kind, num_layers, lora = read_settings(folder)
    policy = load_policy(
        base.path, revision=base.revision, dtype=dtype, load_in_4bit=base.load_in_4bit,
        fine_tune_type=kind, num_layers=num_layers, lora_parameters=lora,
    )  # fmt: skip
    load_weights(policy, folder)
    check_base(folder, policy, base.fingerprint, chosen=model_path is not None)
    policy.masters = {}
    policy.model.requires_grad_(False)
    return policy


