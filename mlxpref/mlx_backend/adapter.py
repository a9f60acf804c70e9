"""Adapter folders as mlx-lm has them: ``adapters.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref.errors import AdapterError, raise_all
from mlxpref.files import write_text, written_aside
from mlxpref.mlx_backend.policy import Policy, load_policy

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(policy: Policy, folder: Path, *, extra: Mapping[str, Any]) -> None:
    """Write the policy's adapter so that mlx-lm's generate, fuse and server take it as it is.

    Both files are written aside and renamed; an existing adapter stays whole until then.

    Args:
        folder: made if missing.
        extra: JSON-safe facts kept under the key ``mlxpref`` (objective, conditioning recipe, …).
    """
    weights = policy.to_save()
    mx.eval(weights)
    config = {
        "fine_tune_type": policy.fine_tune_type,
        "model": policy.name,
        "num_layers": policy.num_layers,
        "lora_parameters": policy.lora_parameters,
        "mlxpref": {**extra, "base_fingerprint": policy.base_fingerprint},
    }
    write_safetensors(folder / WEIGHTS, weights, {"format": "mlx"})
    write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Arrays in a file that appears under its name whole or not at all; RunError when the disk is full."""
    ordered = {name: arrays[name] for name in sorted(arrays)}  # equal contents are equal bytes
    with written_aside(path) as aside, aside.open("wb") as stream:
        mx.save_safetensors(stream, ordered, metadata or {})


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder; AdapterError when missing or damaged."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder}: no {' and no '.join(missing)}; is this an adapter folder?")
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"{folder / CONFIG}: not JSON ({error})") from error


def read_settings(folder: Path) -> tuple[str, int, dict[str, Any]]:
    """Fine-tune type, number of layers and LoRA parameters of an adapter folder."""
    config = read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    wanted = ["num_layers"] + ([] if kind == "full" else ["lora_parameters"])
    absent = [key for key in wanted if key not in config]
    if absent:
        raise AdapterError(f"{folder / CONFIG}: no key {', '.join(absent)}; not an adapter made for mlx-lm")
    return kind, int(config["num_layers"]), dict(config.get("lora_parameters") or {})


def load_weights(policy: Policy, folder: Path) -> None:
    """Put an adapter's weights into a policy prepared for them.

    Raises:
        AdapterError: every tensor that is missing, unexpected or of another shape, in one message.
    """
    try:
        weights = mx.load(str(folder / WEIGHTS))
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"{folder / WEIGHTS}: cannot be read ({error}); the file is damaged") from error
    known = policy.trainable()
    problems = [f"{name}: in the adapter, not in the model" for name in sorted(set(weights) - set(known))]
    problems += [f"{name}: in the model, not in the adapter" for name in sorted(set(known) - set(weights))]
    problems += [
        f"{name}: adapter {tuple(weights[name].shape)}, model {tuple(known[name].shape)}"
        for name in sorted(set(known) & set(weights))
        if weights[name].shape != known[name].shape
    ]
    shown = problems[:12] + ([f"… and {len(problems) - 12} more"] if len(problems) > 12 else [])
    raise_all(shown, AdapterError, f"{folder}: this adapter was made for another model than {policy.path}:")
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
    config = read_config(folder)
    base = model_path or config.get("model")
    if not base:
        raise AdapterError(f"{folder / CONFIG}: names no base model; give one with --model")
    kind, num_layers, lora = read_settings(folder)
    ours = config.get("mlxpref", {})
    revision = (ours.get("model") or {}).get("revision") if model_path is None else None
    policy = load_policy(
        base, revision=revision, dtype=dtype, fine_tune_type=kind, num_layers=num_layers, lora_parameters=lora
    )
    load_weights(policy, folder)
    _check_base(folder, policy, ours.get("base_fingerprint"), chosen=model_path is not None)
    policy.masters = {}  # nothing trains: the model holds the adapter as it is on disk
    policy.model.eval()
    return policy


def _check_base(folder: Path, policy: Policy, trained_on: str | None, *, chosen: bool) -> None:
    """The same shapes do not make it the same model: compare the weights with those it was trained on.

    Args:
        trained_on: their fingerprint; None for adapters that other programs made.
        chosen: the user named this base, which may be meant (a quantised twin): a note, not an error.
    """
    if trained_on is None or trained_on == policy.base_fingerprint:
        return
    said = f"{folder} was trained on other weights than those of {policy.path}"
    if not chosen:
        raise AdapterError(
            f"{said}: they have changed since. Put the old ones back, or name a base with --model if this is meant"
        )
    policy.notes.append(f"{said}; what it does there is untested")
