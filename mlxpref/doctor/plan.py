"""What a configuration asks for: is it there, whole, and free?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mlxpref.config import Config
from mlxpref.config_layers import load_config
from mlxpref.data.readers import READERS, ending
from mlxpref.doctor.check import Check, settled
from mlxpref.doctor.places import ROOM_FOR_RUN, Reach, check_disk, check_writable, hub_cache
from mlxpref.errors import MlxprefError, RunError
from mlxpref.facts import check_fits, read_adapter_folder
from mlxpref.files import safetensors_header
from mlxpref.objectives import resolve_objective
from mlxpref.runs import CONFIG, check_free

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of which a model folder holds at least one; Python tokenizers bring a tokenization_*.py."""

AGAIN = "fetch the whole folder again (`hf download OWNER/NAME --local-dir FOLDER`)"


def check_config(file: Path) -> tuple[Check, Config | None]:
    """Read a configuration as ``train`` would; None when it cannot be used."""
    try:
        config = load_config(file)
        resolve_objective(config.objective)
    except MlxprefError as error:
        return Check("config", "fail", str(error), "mend what is named; configs/ has commented examples"), None
    return Check("config", "ok", f"{file}: every key and value is understood"), config


def check_plan(config: Config, reach: Reach, free_memory: float) -> Iterator[Check]:
    """Model, data and output folder of a run.

    Args:
        reach: what is known of the hub.
        free_memory: GB the weights have to fit into.
    """
    model, source = config.model, config.data.source
    yield from settled("model", lambda: check_model(model.path, model.revision, reach, free_memory))
    if config.adapter.init_from is not None:
        yield from settled("adapter", lambda: check_adapters(config))
    named = [("data", path) for path in ([source] if isinstance(source, str) else [one.path for one in source])]
    if config.data.valid is not None:
        named.append(("validation data", config.data.valid))
    for name, path in named:
        yield from settled(name, partial(check_data, name, path, reach))
    yield from settled("output", lambda: check_output(Path(config.output.adapter_path).expanduser()))


# --- models and adapters ---


def check_model(path: str, revision: str | None, reach: Reach, free_memory: float) -> Check:
    """A local folder that is whole, a hub id that is cached, or one that can be had."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            said = f"{path} lies on this disk, and model.revision is for a hub id"
            return Check("model", "fail", said, "leave model.revision out")
        return _check_folder(folder, path, AGAIN, free_memory)
    if _looks_local(path):
        remedy = "check the path (it counts from the current folder); a hub id has the form owner/name"
        return Check("model", "fail", f"{path}: no such folder", remedy)
    cached = _cached_model(path, revision)
    if cached is None:
        return _to_download("model", path, reach, "model")
    missing = lacking(cached)
    if missing and reach != "offline":
        said = f"{path}: in the hub cache only in part ({'; '.join(missing)}); the rest will be downloaded"
        return Check("model", "ok", said)
    return _check_folder(cached, f"{path} (in the hub cache)", f"hf download {path}", free_memory)


def _check_folder(folder: Path, name: str, remedy: str, free_memory: float) -> Check:
    missing = lacking(folder)
    if missing:
        return Check("model", "fail", f"{name}: {'; '.join(missing)}", remedy)
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors")) / 1e9
    said = f"{name}: config, weights ({size:.2f} GB) and tokenizer are there"
    if size > free_memory:
        remedy = "take a smaller or a 4-bit model, or close other programs"
        return Check("model", "warn", f"{said}, and only {free_memory:.1f} GB of memory are free", remedy)
    return Check("model", "ok", said)


def _is_whole(weights: Path) -> bool:
    try:
        safetensors_header(weights)
    except (OSError, ValueError):
        return False
    return True


def lacking(folder: Path) -> list[str]:
    """What a model folder lacks, in words; empty when it is whole."""
    found = []
    if _json(folder / "config.json") is None:
        found.append("no readable config.json")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        found.append("no weights (model*.safetensors)")
    index = _json(folder / "model.safetensors.index.json") or {}
    shards = set(index.get("weight_map", {}).values())
    gone = sorted(name for name in shards if not (folder / name).is_file())
    if gone:
        found.append(f"{len(gone)} of {len(shards)} weight files missing ({gone[0]}, …)")
    found += [f"{file.name} is empty or cut off" for file in weights if not _is_whole(file)]
    if not any((folder / name).is_file() for name in TOKENIZERS) and not any(folder.glob("tokenization_*.py")):
        found.append("no tokenizer (tokenizer.json or tokenizer.model)")
    return found


def _json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_adapters(config: Config) -> Check:
    """The adapters a run starts from: whole, and of this model as far as its files on this disk tell."""
    asked = {"init_from": config.adapter.init_from, "reference.previous": config.reference.previous}
    named = {f"{key} {given}": Path(given).expanduser() for key, given in asked.items() if given is not None}
    path = config.model.path
    model = _on_disk(path, config.model.revision)
    try:
        for name, folder in named.items():
            _, header = read_adapter_folder(folder, name)
            if model is not None:
                shapes = {tensor: entry["shape"] for tensor, entry in header.items()}
                check_fits(shapes, model, f"{name}: this adapter was made for another model than {path}:")
    except MlxprefError as error:
        return Check("adapter", "fail", str(error), "name a folder that mlxpref or mlx_lm.lora wrote for this model")
    of_it = "and not of another model" if model is not None else "and compared with the model once that is here"
    return Check("adapter", "ok", f"{', '.join(named)}: whole, {of_it}")


# --- data ---


def check_data(name: str, path: str, reach: Reach) -> Check:
    """A file or folder that is there, or a hub data set."""
    place = Path(path).expanduser()
    if place.is_dir() and not any(place.iterdir()):
        return Check(name, "fail", f"{path}: an empty folder", "name a file, or a folder with files of rows")
    if place.is_file() and place.stat().st_size == 0:
        return Check(name, "fail", f"{path}: an empty file", "name another, or write it again")
    if place.exists():
        return Check(name, "ok", f"{path}: is there (its rows were not read)")
    if not _may_be_data_id(path):
        remedy = "check the path (it counts from the current folder); a hub id has the form owner/name"
        return Check(name, "fail", f"{path}: no such file or folder", remedy)
    if _cached_data(path):
        return Check(name, "ok", f"{path}: in the cache")
    return _to_download(name, path, reach, "dataset")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def _may_be_data_id(path: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path)) and ending(Path(path)) not in (*READERS, ".parquet")


def _to_download(name: str, path: str, reach: Reach, kind: str) -> Check:
    option = " --repo-type dataset" if kind == "dataset" else ""
    remedy = f"run `hf download{option} {path} --local-dir FOLDER` on a connected machine, and give the folder's path"
    if reach == "offline":
        return Check(name, "fail", f"{path}: not on this disk, and the hub is switched off (HF_HUB_OFFLINE)", remedy)
    if reach == "unreachable":
        return Check(name, "fail", f"{path}: not on this disk, and the hub does not answer", remedy)
    return Check(name, "ok", f"{path}: not on this disk; will be downloaded from the hub")


def _on_disk(path: str, revision: str | None) -> Path | None:
    """A model's folder, without asking the hub; None where there is none yet."""
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else None if _looks_local(path) else _cached_model(path, revision)


def _cached_model(path: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _cached_data(path: str) -> bool:
    """Whether the hub's client or ``datasets`` keeps something of it."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, name = path.split("/")
    made = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])
    return made.is_dir() or (hub_cache() / "--".join(["datasets", *owner, name]) / "snapshots").is_dir()


# --- output ---


def check_output(folder: Path) -> Iterator[Check]:
    """Room, the right to write, and that nothing is there for which ``train`` would refuse the folder."""
    problem = check_writable("output", folder)
    if problem is not None:
        yield problem
        return
    yield check_disk("disk, output", folder, enough=ROOM_FOR_RUN)
    yield _check_free(folder)


def _check_free(folder: Path) -> Check:
    try:
        check_free(folder)
    except RunError:
        if (folder / CONFIG).is_file():
            remedy = "add --resume to go on with it, or choose another output.adapter_path"
            return Check("output", "warn", f"{folder}: holds a run already", remedy)
        return Check("output", "fail", f"{folder}: is not empty", "choose another output.adapter_path")
    return Check("output", "ok", f"{folder}: free and writable")
