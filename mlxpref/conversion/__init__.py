"""Adapters carried over between mlx-lm's folders and PEFT's, both ways, without loading a model."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.adapters import Adapter, read_adapter, write_adapter
from mlxpref.conversion.bases import Base, base_of
from mlxpref.conversion.folders import CONFIG as PEFT_CONFIG
from mlxpref.conversion.folders import FACTS, PeftAdapter, kind_of, read_peft, write_peft
from mlxpref.conversion.folders import WEIGHTS as PEFT_WEIGHTS
from mlxpref.conversion.incoming import from_peft
from mlxpref.conversion.outgoing import to_peft
from mlxpref.errors import AdapterError, UsageError
from mlxpref.facts import check_fits
from mlxpref.files import file_digest, refused
from mlxpref.reference import default_store_folder

__all__ = ["Converted", "PeftAdapter", "as_mlx_folder", "convert", "facts_of", "kind_of", "write_converted"]

VERSION = 1
"""Of what a conversion makes of the same files; a new one makes kept folders anew."""


@dataclass(frozen=True, slots=True)
class Converted:
    """An adapter in both forms.

    Attributes:
        to: "mlx" or "peft", the form that was asked for.
        mlx, peft: the adapter in either form; the given one is as it was read.
        base: the model it is for.
        said: what was done to make it fit, in words.
    """

    to: str
    mlx: Adapter
    peft: PeftAdapter
    base: Base
    said: tuple[str, ...]


def convert(folder: str | Path, *, to: str | None = None, model: str | None = None) -> Converted:
    """An adapter folder in the other form; nothing is written.

    Args:
        folder: of mlx-lm's or PEFT's form, which its files show.
        to: "mlx" or "peft"; None is the other one.
        model: base model (folder or hub id) in place of the one that the adapter names.

    Raises:
        AdapterError: neither form, damaged, or with something that the other form cannot have.
        UsageError: it has the form that is asked for.
    """
    at = Path(folder)
    kind = kind_of(at)
    if not at.is_dir():
        raise AdapterError(f"{at}: no such folder")
    if kind is None:
        raise AdapterError(
            f"{at}: no adapter of mlx-lm's or PEFT's; the one is adapter_config.json and adapters.safetensors, the "
            "other adapter_config.json (JSON that can be read) and adapter_model.safetensors"
        )
    if to == kind:
        raise UsageError(f"{at}: an adapter in the form of {_maker(kind)} already; there is nothing to convert")
    if kind == "peft":
        peft = read_peft(at)
        base = _base_of_peft(peft, model)
        mlx, said = from_peft(peft, base)
        _check_base(mlx, base, at)
        return Converted("mlx", mlx, peft, base, tuple(said))
    mlx = read_adapter(at)
    revision = (mlx.facts.get("model") or {}).get("revision")
    base = base_of(at, mlx.model, revision, model)
    _check_base(mlx, base, at)
    peft, said = to_peft(mlx, base)
    return Converted("peft", mlx, peft, base, tuple(said))


def _check_base(mlx: Adapter, base: Base, folder: Path) -> None:
    """AdapterError if the base's own tensors, where they are on this disk, show that the adapter is another model's."""
    shapes = {name: tensor.shape for name, tensor in mlx.tensors.items()}
    check_fits(shapes, base.folder, f"{folder}: this adapter was made for another model than {base.name}:")


def _maker(kind: str) -> str:
    return "PEFT" if kind == "peft" else "mlx-lm"


def write_converted(converted: Converted, folder: Path) -> None:
    """Write the form that was asked for, whole or not at all.

    Raises:
        RunError: something is there already, or the disk refuses.
        AdapterError: a number is not finite, or too large for its type.
    """
    if converted.to == "peft":
        write_peft(converted.peft, folder)
    else:
        write_adapter(converted.mlx, folder)


# --- for whoever reads mlx-lm's folders ---


def as_mlx_folder(path: str | Path, *, model: str | None = None, cache: Path | None = None) -> Path:
    """The folder itself, or what a PEFT folder converts to, made once and kept.

    Any number of processes may ask at the same time. What is no adapter is given back as it is, for its reader to
    refuse.

    Args:
        model: base model in place of the one that the PEFT adapter names.
        cache: where converted folders are kept; ``$MLXPREF_CACHE/converted`` by default.

    Raises:
        AdapterError: a PEFT adapter that mlx-lm cannot have.
        RunError: the disk refuses.
    """
    folder = Path(path)
    if kind_of(folder) != "peft":
        return folder
    base = _base_of_peft(read_peft(folder), model)
    kept = (cache or default_store_folder().parent / "converted") / _digest(folder, base)
    if kind_of(kept) != "mlx":
        aside = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}")
        write_converted(convert(folder, to="mlx", model=model), aside)
        try:
            os.rename(aside, kept)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if kind_of(kept) != "mlx":  # not another process, which was faster
                raise refused(kept, error) from error
    return kept


def _base_of_peft(peft: PeftAdapter, model: str | None) -> Base:
    return base_of(peft.folder, peft.config.get("base_model_name_or_path"), peft.config.get("revision"), model)


def _digest(folder: Path, base: Base) -> str:
    """Names a conversion by all that it depends on, 32 hex digits."""
    parts: list[Any] = [VERSION, base.name, base.revision, base.model_type, base.n_layers, base.tied]
    for name in (PEFT_CONFIG, PEFT_WEIGHTS, FACTS):
        parts.append(file_digest(folder / name) if (folder / name).is_file() else None)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def facts_of(folder: str | Path) -> dict[str, Any]:
    """What mlxpref once wrote of a PEFT adapter (recipe, objective, …); empty for another's. Needs no base model.

    Raises:
        AdapterError: damaged.
    """
    former = read_peft(Path(folder)).facts.get("config")
    facts = former.get("mlxpref") if isinstance(former, dict) else None
    return dict(facts) if isinstance(facts, dict) else {}
