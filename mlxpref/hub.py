"""A model's folder, from a local path or the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

from mlxpref.errors import ModelError

_WANTED = ("*.json", "*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja")


def model_folder(path: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model, downloaded first if ``path`` is a hub id.

    Args:
        path: an existing folder, or a hub id "owner/name".
        revision: branch, tag or commit of the hub id.
        weights: False fetches configuration and tokenizer only.

    Raises:
        ModelError: neither a folder nor a reachable hub id, a folder without config.json, or a revision of one.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{path} lies on this disk: a revision ({revision}) is for a hub id")
        _check_config(folder)
        return folder
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local:
        raise ModelError(f"{path}: no such folder (a hub id has the form owner/name)")
    return _download(path, revision, weights)


def _check_config(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json; a model folder holds config.json, weights and tokenizer")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error}); fetch the model again") from error


def _download(path: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    wanted = [pattern for pattern in _WANTED if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError) as error:
        raise _refused(path, error) from error
    except (HTTPError, OSError) as error:  # no network, or offline mode and not in the cache
        raise ModelError(
            f"{path}: not a local folder, and the hub cannot be reached. Check the spelling and the network, or "
            f"run `hf download {path}` on a connected machine and give the folder's path."
        ) from error


def _refused(path: str, error: Exception) -> ModelError:
    return ModelError(
        f"{path}: not a local folder, and the hub does not give it ({str(error).splitlines()[0]}). Check the "
        "spelling; for a gated model accept its terms and run `hf auth login`."
    )
