"""Model and adapter folders as both machine rooms read them: settings and hashes, no weights, no array framework."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxpref.errors import AdapterError, ConfigError, raise_all

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
FINE_TUNE_TYPES = ("lora", "dora", "full")
DTYPES = ("float32", "float16", "bfloat16")


def resolve_lora(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """mlx-lm's LoRA parameters with ``alpha`` turned into ``scale``; ConfigError on contradictions."""
    given = dict(given or {})
    if "alpha" in given and given.get("scale") is not None and given["alpha"] is not None:
        raise ConfigError("lora_parameters takes scale or alpha, not both (scale = alpha / rank)")
    unknown = set(given) - {"rank", "scale", "alpha", "dropout", "keys"}
    if unknown:
        raise ConfigError(f"unknown lora_parameters: {', '.join(sorted(unknown))}")
    rank = int(given.get("rank", 8))
    alpha, scale = given.get("alpha"), given.get("scale")
    scale = alpha / rank if alpha is not None else 20.0 if scale is None else scale
    resolved: dict[str, Any] = {"rank": rank, "scale": float(scale), "dropout": float(given.get("dropout", 0.0))}
    if rank < 1 or not 0 <= resolved["dropout"] < 1:
        raise ConfigError(f"lora_parameters: rank must be >= 1 and 0 <= dropout < 1, not {resolved}")
    if given.get("keys") is not None:
        resolved["keys"] = list(given["keys"])
    return resolved


def n_trained(fine_tune_type: str, num_layers: int, n_layers: int) -> int:
    """How many of a model's layers train. ConfigError for a type that is none, or for no layers."""
    if fine_tune_type not in FINE_TUNE_TYPES:
        raise ConfigError(f"unknown fine_tune_type {fine_tune_type!r}; one of {', '.join(FINE_TUNE_TYPES)}")
    if num_layers == 0:
        raise ConfigError("num_layers 0 trains nothing; give a number of layers from the last, or -1 for all")
    return n_layers if num_layers < 0 else min(num_layers, n_layers)


def model_config(folder: Path) -> dict[str, Any]:
    """A model's ``config.json``, its end tokens those of ``generation_config.json`` if that names any, as mlx-lm has
    it."""
    config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    try:
        eos = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError):
        eos = None
    return config | ({"eos_token_id": eos} if eos else {})


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """V by the model's own config."""
    return int((config.get("text_config") or config).get("vocab_size", 256))


# --- what names weights ---


def base_hash(folder: Path, config: Mapping[str, Any]) -> str:
    """Hash of a model's config and of its weights' bytes, 16 hex digits."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    _digest_files(digest, sorted(folder.glob("model*.safetensors")))
    return digest.hexdigest()[:16]


def reference_hash(base: str, dtype: str, init_from: str | None) -> str:
    """What reference log-probs depend on besides token ids: weights, dtype, and the adapter started from."""
    digest = hashlib.sha256(f"{base} {dtype}".encode())
    if init_from is not None:
        _digest_files(digest, [Path(init_from) / name for name in (WEIGHTS, CONFIG)])
    return digest.hexdigest()[:16]


def _digest_files(digest: Any, files: list[Path]) -> None:
    for file in files:
        if not file.exists():
            raise AdapterError(f"{file.parent}: {file.name} is missing; is this an adapter folder?")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())


# --- adapter folders ---


def adapter_config(policy: Any, extra: Mapping[str, Any]) -> str:
    """``adapter_config.json`` of a policy: mlx-lm's keys, and under ``mlxpref`` ours."""
    config = {
        "fine_tune_type": policy.fine_tune_type,
        "model": policy.name,
        "num_layers": policy.num_layers,
        "lora_parameters": policy.lora_parameters,
        "mlxpref": {**extra, "base_fingerprint": policy.base_fingerprint},
    }
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder; AdapterError when missing or damaged."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder}: no {' and no '.join(missing)}; is this an adapter folder?")
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
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


class Base(NamedTuple):
    """The model an adapter goes on.

    Attributes:
        path: folder or hub id. revision: of the hub id.
        fingerprint: of the weights it was trained on; None for an adapter that another program made.
        load_in_4bit: it was trained on a base quantised while loading, and this one is not quantised already.
    """

    path: str
    revision: str | None
    fingerprint: str | None
    load_in_4bit: bool


def read_base(folder: Path, model_path: str | None) -> Base:
    """The base an adapter goes on.

    Args:
        model_path: where the base is now, in place of where the adapter says; without a revision then.

    Raises:
        AdapterError: nobody names a base.
    """
    config = read_config(folder)
    base = model_path or config.get("model")
    if not base:
        raise AdapterError(f"{folder / CONFIG}: names no base model; give one with --model")
    ours = config.get("mlxpref", {})
    model = ours.get("model") or {}
    revision = model.get("revision") if model_path is None else None
    four_bits = bool(model.get("load_in_4bit")) and not _is_quantised(Path(str(base)))
    return Base(str(base), revision, trained_on(folder), four_bits)


def trained_on(folder: Path) -> str | None:
    """Fingerprint of the base weights an adapter was trained on; None if another program made it."""
    found = (read_config(folder).get("mlxpref") or {}).get("base_fingerprint")
    return None if found is None else str(found)


def _is_quantised(model: Path) -> bool:
    """Whether a model on this disk holds packed weights of MLX's."""
    return (model / "config.json").is_file() and "quantization" in model_config(model)


def check_tensors(
    theirs: Mapping[str, Sequence[int]], ours: Mapping[str, Sequence[int]], folder: Path, model: Path
) -> None:
    """AdapterError listing every tensor (name → shape) that is missing, unexpected or of another shape."""
    problems = [f"{name}: in the adapter, not in the model" for name in sorted(set(theirs) - set(ours))]
    problems += [f"{name}: in the model, not in the adapter" for name in sorted(set(ours) - set(theirs))]
    problems += [
        f"{name}: adapter {tuple(theirs[name])}, model {tuple(ours[name])}"
        for name in sorted(set(ours) & set(theirs))
        if tuple(theirs[name]) != tuple(ours[name])
    ]
    shown = problems[:12] + ([f"… and {len(problems) - 12} more"] if len(problems) > 12 else [])
    raise_all(shown, AdapterError, f"{folder}: this adapter was made for another model than {model}:")


def check_base(folder: Path, policy: Any, trained_on: str | None, *, chosen: bool) -> None:
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
