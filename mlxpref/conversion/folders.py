"""Adapter folders as PEFT has them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.adapters import WEIGHTS as MLX_WEIGHTS
from mlxpref.adapters import check_free
from mlxpref.errors import AdapterError, raise_all
from mlxpref.files import folder_aside, safetensors_header, write_text
from mlxpref.tensors import FLOATS, Tensor, tensors_of, write_tensors

WEIGHTS, CONFIG, FACTS = "adapter_model.safetensors", "adapter_config.json", "mlxpref.json"
"""PEFT warns of keys that it does not know, so ours stand in a file of their own."""

PICKLED = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What a PEFT folder holds, or will.

    Attributes:
        folder: where it was read; of a converted one, what it was made of.
        config: ``adapter_config.json``.
        tensors: by the names in the file.
        facts: ``mlxpref.json``; empty for one that other programs made.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def kind_of(folder: str | Path) -> str | None:
    """ "mlx" or "peft" by what an adapter folder holds, None if it is neither; names say nothing."""
    at = Path(folder)
    try:
        config = json.loads((at / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    if "peft_type" in config:
        return "peft"
    if (at / MLX_WEIGHTS).is_file() or {"fine_tune_type", "lora_parameters", "num_layers"} & config.keys():
        return "mlx"
    return "peft" if (at / WEIGHTS).is_file() else None


def read_peft(folder: Path) -> PeftAdapter:
    """A PEFT folder; its tensors are read when they are asked for.

    Raises:
        AdapterError: it is none, is damaged, or its weights are a pickle.
    """
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise AdapterError(
            f"{folder / PICKLED}: a pickle, which can run code as it is read. Save it as safetensors, where you "
            "trust it: PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW_FOLDER)"
        )
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise AdapterError(f"{folder}: no {' and no '.join(lacking)}; is this a PEFT adapter's folder?")
    config = _read_object(folder / CONFIG)
    facts = _read_object(folder / FACTS) if (folder / FACTS).is_file() else {}
    try:
        tensors = tensors_of(folder / WEIGHTS, safetensors_header(folder / WEIGHTS))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{folder / WEIGHTS}: the file is damaged or cut off ({error}); take another copy of it"
        ) from error
    odd = [f"{name}: of type {one.dtype}" for name, one in tensors.items() if one.dtype not in FLOATS]
    raise_all(odd, AdapterError, f"{folder / WEIGHTS}: what can be converted is {', '.join(FLOATS)}:")
    return PeftAdapter(folder, config, tensors, facts)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: not the JSON of an adapter ({error}); take another copy of it") from error
    return found


def write_peft(adapter: PeftAdapter, folder: Path) -> None:
    """A folder that ``peft.PeftModel.from_pretrained`` loads; it appears whole or not at all.

    Raises:
        RunError: something is there already, or the disk refuses.
        AdapterError: a number is not finite, or too large for its type.
    """
    check_free(folder)
    with folder_aside(folder) as aside:
        write_tensors(aside / WEIGHTS, adapter.tensors)
        for name, content in ((CONFIG, adapter.config), (FACTS, adapter.facts)):
            if content:
                write_text(aside / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
