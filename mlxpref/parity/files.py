"""A comparison carried from one machine to another: what one backend computed, in a folder.

``parity.json`` says which models, settings and rows; ``parity.safetensors`` holds the arrays. The format is
written down in ``docs/parity.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlxpref import facts
from mlxpref.adapters import check_free
from mlxpref.errors import DataError, RunError
from mlxpref.files import file_digest, folder_aside, safetensors_header
from mlxpref.folders import base_hash, model_config
from mlxpref.hub import model_folder
from mlxpref.parity.cases import Case, Model
from mlxpref.parity.trace import Settings
from mlxpref.records import Tokenized
from mlxpref.tensors import Tensor, tensors_of, write_tensors

FORMAT = "mlxpref-parity"
VERSION = 1

JSON = "parity.json"
ARRAYS = "parity.safetensors"


@dataclass(frozen=True, slots=True)
class Export:
    """What a folder holds.

    Attributes:
        facts: of the machine it was made on: versions, commit, device, backend.
        cases: in the order they were computed, with fingerprints.
        folder: where it was read.
    """

    facts: Mapping[str, Any]
    cases: tuple[Case, ...]
    folder: Path

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a case, float32."""
        start = f"{index}."
        file = self.folder / ARRAYS
        tensors = tensors_of(file, safetensors_header(file))
        return {
            name[len(start) :]: tensor.read().astype(np.float32)
            for name, tensor in tensors.items()
            if name.startswith(start)
        }


def machine_facts(backend: ModuleType) -> dict[str, Any]:
    """Where figures come from: JSON-safe."""
    return {
        "backend": backend.__name__.rsplit(".", 1)[-1],
        "versions": facts.versions(),
        "commit": facts.commit(),
        "device": backend.device_info(),
    }


def check_export(folder: Path) -> None:
    """Before anything is computed: may the folder be written? RunError if it is occupied."""
    check_free(folder)


def write_export(
    folder: Path, found: Iterable[tuple[Case, Mapping[str, np.ndarray]]], about: Mapping[str, Any]
) -> None:
    """Write cases with their arrays; the folder appears whole or not at all.

    Args:
        about: of :func:`machine_facts`.

    Raises:
        RunError: a number is not finite, the folder is occupied, or the disk refuses.
    """
    rows: list[list[dict[str, Any]]] = []
    cases: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, (case, arrays) in enumerate(found):
        wrong = sorted(name for name, values in arrays.items() if not np.isfinite(values).all())
        if wrong:
            raise RunError(f"{case.model.name}, {case.objective}: {wrong[0]} is not finite; nothing is exported")
        written = [_row_record(row) for row in case.rows]
        if written not in rows:
            rows.append(written)
        cases.append(_case_record(case, rows.index(written)))
        tensors |= {f"{index}.{name}": Tensor("F32", value.shape, _reader(value)) for name, value in arrays.items()}
    with folder_aside(folder) as aside:
        write_tensors(aside / ARRAYS, tensors)
        content = {
            "format": FORMAT, "version": VERSION, "facts": dict(about), "cases": cases, "rows": rows,
            "sha256": file_digest(aside / ARRAYS),
        }  # fmt: skip
        (aside / JSON).write_text(_as_text(content), encoding="utf-8")


def _as_text(content: Mapping[str, Any]) -> str:
    """A line for each key, and in its lists for each entry: rows of ids are long."""

    def one(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, default=_plain)

    def lines(value: Any) -> str:
        return "[\n  " + ",\n  ".join(map(one, value)) + "\n ]" if isinstance(value, list) else one(value)

    return "{\n" + ",\n".join(f" {one(key)}: {lines(value)}" for key, value in content.items()) + "\n}\n"


def _reader(value: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: value.astype(np.float64)


def read_export(folder: Path) -> Export:
    """What :func:`write_export` wrote.

    Raises:
        DataError: no such export, of another version, damaged, or cut off.
    """
    file, arrays = folder / JSON, folder / ARRAYS
    lacking = [one.name for one in (file, arrays) if not one.is_file()]
    if lacking:
        raise DataError(f"{folder}: no {' and no '.join(lacking)}; give a folder that `mlxpref parity --export` wrote")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind, version = content["format"], content["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not an export of parity, or damaged ({error}); export it again") from error
    if kind != FORMAT or version != VERSION:
        raise DataError(
            f"{file}: {kind} version {version}, and this mlxpref reads {FORMAT} version {VERSION}; export it again "
            "with the same mlxpref on both machines"
        )
    if file_digest(arrays) != content.get("sha256"):
        raise DataError(f"{arrays}: damaged or cut off, its sha256 is not the one in {JSON}; copy the folder again")
    try:
        rows = [tuple(map(_row, some)) for some in content["rows"]]
        cases = tuple(_case(record, rows) for record in content["cases"])
        return Export(content["facts"], cases, folder)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{file}: damaged ({type(error).__name__}: {error}); copy the folder again") from error


def fingerprint(model: Model) -> str:
    """Of a model's config and weights: every backend's ``Policy.base_fingerprint``."""
    folder = model_folder(model.path)
    return base_hash(folder, model_config(folder))


def placed(export: Export, models: Sequence[Model], built_in: Callable[[str], Model]) -> Iterator[Case]:
    """The export's cases with their models as they are on this machine.

    Args:
        models: those that were given.
        built_in: writes a built-in model.

    Raises:
        RunError: a model is not here, or is another one, or one was given that the export does not have.
    """
    known = {fingerprint(model): model for model in models}
    for case in export.cases:
        if case.fingerprint not in known:
            known[case.fingerprint] = _found(case, models, built_in)
        yield replace(case, model=replace(known[case.fingerprint], name=case.model.name))
    for name in known.keys() - {case.fingerprint for case in export.cases}:
        raise RunError(f"{known[name].path}: none of the export's models has these weights; leave it out")


def _found(case: Case, models: Sequence[Model], built_in: Callable[[str], Model]) -> Model:
    """The model where the export says it was."""
    kind = case.model.built_in
    model = case.model if kind is None else built_in(kind)
    there = Path(model.path).exists()
    here = fingerprint(model) if there else None
    if here == case.fingerprint:
        return model
    given = "".join(f"; {one.path} has {fingerprint(one)}" for one in models)
    at = f"{model.path} has {here}: config or weights differ" if there else f"{model.path} is not here"
    raise RunError(
        f"{case.model.name}: not the model of the export, whose fingerprint is {case.fingerprint}; {at}{given}. Give "
        "as MODEL a copy of the folder it was made with"
    )


# --- records ---


def _case_record(case: Case, rows: int) -> dict[str, Any]:
    return {
        "model": {"name": case.model.name, "path": case.model.path, "built_in": case.model.built_in},
        "fingerprint": case.fingerprint,
        "told": dict(case.told or {}),
        "settings": case.settings.as_dict(),
        "n_groups": case.n_groups,
        "rows": rows,
    }


def _case(record: Mapping[str, Any], rows: Sequence[tuple[Tokenized, ...]]) -> Case:
    return Case(
        model=Model(**record["model"]),
        settings=Settings.from_dict(record["settings"]),
        rows=rows[record["rows"]],
        n_groups=record["n_groups"],
        fingerprint=record["fingerprint"],
        told=record["told"],
    )


_IDS = ("prompt_ids", "response_ids", "texts", "leads")
_KEPT = ("example_id", "scores", "goal", "half", "weight", "prompt_cut", "response_cut")


def _row_record(row: Tokenized) -> dict[str, Any]:
    found = {name: getattr(row, name) for name in (*_IDS, *_KEPT)}
    record = {**found, "texts": dict(row.texts), "extras": dict(row.extras)}
    decoded: dict[str, Any] = json.loads(json.dumps(record, default=_plain))  # as it will be read
    return decoded


def _row(record: Mapping[str, Any]) -> Tokenized:
    kept = {name: record[name] for name in _KEPT}
    return Tokenized(
        prompt_ids=_ids(record["prompt_ids"]),
        response_ids=tuple(map(_ids, record["response_ids"])),
        texts={name: tuple(map(_ids, texts)) for name, texts in record["texts"].items()},
        leads=tuple(map(_ids, record["leads"])),
        extras={name: _tuples(value) for name, value in record["extras"].items()},
        **{**kept, "scores": _tuples(kept["scores"]), "response_cut": tuple(kept["response_cut"])},
    )


def _ids(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int32)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")
