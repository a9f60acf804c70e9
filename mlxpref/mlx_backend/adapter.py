"""Adapter folders as mlx-lm has them: ``adapters.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref.errors import AdapterError
from mlxpref.files import write_text, written_aside
from mlxpref.folders import (
    CONFIG,
    WEIGHTS,
    adapter_config,
    check_base,
    check_tensors,
    read_base,
    read_settings,
)
from mlxpref.mlx_backend.policy import Policy, load_policy


def save_adapter(policy: Policy, folder: Path, *, extra: Mapping[str, Any]) -> None:
    """Write the policy's adapter so that mlx-lm's generate, fuse and server take it as it is.

    Both files are written aside and renamed; an existing adapter stays whole until then.

    Args:
        folder: made if missing.
        extra: JSON-safe facts kept under the key ``mlxpref`` (objective, conditioning recipe, …).
    """
    weights = policy.to_save()
    mx.eval(weights)
    write_safetensors(folder / WEIGHTS, weights, {"format": "mlx"})
    write_text(folder / CONFIG, adapter_config(policy, extra))


def write_safetensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Arrays in a file that appears under its name whole or not at all; RunError when the disk is full."""
    ordered = {name: arrays[name] for name in sorted(arrays)}  # equal contents are equal bytes
    with written_aside(path) as aside, aside.open("wb") as stream:
        mx.save_safetensors(stream, ordered, metadata or {})


def load_weights(policy: Policy, folder: Path) -> None:
    """Put an adapter's weights into a policy prepared for them.

    Raises:
        AdapterError: every tensor that is missing, unexpected or of another shape, in one message.
    """
    try:
        weights = mx.load(str(folder / WEIGHTS))
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"{folder / WEIGHTS}: cannot be read ({error}); the file is damaged") from error
    ours = {name: value.shape for name, value in policy.trainable().items()}
    check_tensors({name: value.shape for name, value in weights.items()}, ours, folder, policy.path)
    policy.update(weights)


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
    policy.masters = {}  # nothing trains: the model holds the adapter as it is on disk
    policy.model.eval()
    return policy
