"""What a run says about itself: where it came from, what is in it, in figures and in words."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxpref.config import Config
from mlxpref.data.plan import Plan
from mlxpref.data.words import counted
from mlxpref.errors import AdapterError, ConfigError, RunError, raise_all
from mlxpref.files import file_digest, safetensors_header
from mlxpref.hub import model_folder
from mlxpref.objectives import Objective
from mlxpref.prepare import Prepared

PACKAGES = (
    "mlxpref", "mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "mkl", "numpy",
    "transformers", "tokenizers", "datasets", "torch", "peft",
)  # fmt: skip
"""Packages that can change a run's numbers, down to the last bit."""

_LAYER = re.compile(r"(.*?\.)(\d+)\b")
"""``model.layers.7`` at the beginning of a tensor's name: the stack, and the number in it."""


def packages() -> dict[str, str]:
    """Installed versions of :data:`PACKAGES`, in their order; those not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def versions() -> dict[str, str]:
    """Python's version, the platform's name, and :func:`packages`."""
    return {"python": platform.python_version(), "platform": platform.platform(), **packages()}


def commit(root: Path | None = None) -> str | None:
    """The git commit of the source tree this package runs from; None when it was installed from a wheel.

    Args:
        root: the tree; by default the one that holds the package.
    """
    git = (root or Path(__file__).resolve().parents[1]) / ".git"
    try:
        if git.is_file():  # a worktree: the file names its folder
            git = (git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return _hash(head)
        name = head.removeprefix("ref: ")
        common = git / "commondir"
        store = (git / common.read_text(encoding="utf-8").strip()) if common.is_file() else git
        if (store / name).is_file():
            return _hash((store / name).read_text(encoding="utf-8"))
        packed = (store / "packed-refs").read_text(encoding="utf-8")
        return next((_hash(line) for line in packed.splitlines() if line.endswith(f" {name}")), None)
    except OSError:
        return None


def _hash(text: str) -> str | None:
    found = re.match(r"[0-9a-f]{40,64}", text)
    return found[0] if found else None


def run_facts(
    config: Config,
    objective: Objective,
    machine: ModuleType,
    data: Prepared,
    policy: Any,
    plan: Plan,
    *,
    starts: Sequence[Mapping[str, Any]],
    step: int,
    time: datetime,
) -> dict[str, Any]:
    """``run.json``: JSON-safe.

    Args:
        starts: what earlier starts of a resumed run left; this start, at ``step``, is added to them.
    """
    start = {
        "time": time.isoformat(timespec="seconds"),
        "step": step,
        "versions": versions(),
        "commit": commit(),
        "device": machine.device_info(),
    }
    return {
        "starts": [*starts, start],
        "objective": objective.spec,
        "model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "load_in_4bit": config.model.load_in_4bit,
            "fingerprint": policy.fingerprint,
            "way": policy.way,
            "parameters": policy.n_parameters,
            "trainable": policy.n_trainable,
            "init_from": config.adapter.init_from,
        },
        "data": {
            "fingerprint": data.fingerprint,
            "train_rows": len(data.train),
            "valid_rows": len(data.valid),
            "said": list(data.said),
            "counts": {
                stage: {"kept": counts.kept, "dropped": dict(counts.dropped)}
                for stage, counts in data.counts.items()
            },
            "recipe": None if data.recipe is None else data.recipe.as_dict(),
            "scoring": data.scoring,
        },
        "tokenization": config.tokenization.model_dump(mode="json"),
        "reference": _reference_facts(config),
        "plan": {
            "steps": len(plan.steps),
            "epochs": plan.epochs[-1],
            "shapes": len(plan.shapes),
            "tokens": plan.tokens,
            "padding": plan.padding,
        },
    }


def _reference_facts(config: Config) -> dict[str, Any]:
    """What is set of the reference; of the adapter of the round before also which weights it has."""
    found = config.reference.model_dump(mode="json", exclude={"store"}, exclude_none=True)
    previous = config.reference.previous
    return found | ({"previous_sha256": file_digest(Path(previous) / "adapters.safetensors")} if previous else {})


def adapter_facts(facts: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What an adapter says about itself under ``mlxpref`` in its config, from the run's facts."""
    return {
        "objective": facts["objective"],
        "model": {key: facts["model"].get(key) for key in ("path", "revision", "load_in_4bit", "fingerprint")},
        "recipe": facts["data"]["recipe"],
        "scoring": facts["data"].get("scoring"),
        "tokenization": facts["tokenization"],
        "reference": facts.get("reference", {}),
        "init_from": facts["model"]["init_from"],
        "step": step,
        "versions": facts["starts"][0]["versions"],
    }


# --- the adapters a run starts from ---


def check_start(config: Config) -> None:
    """What can be known of ``adapter.init_from`` and ``reference.previous`` without loading a model: that each is a
    whole adapter folder, and that no tensor of it contradicts the model's own of the same name.

    Names that the model's files do not have, and files that are not on this disk yet, prove nothing; the
    backend compares every tensor when it loads them.

    Raises:
        AdapterError: missing, damaged, or made for another model.
        ModelError: no such model.
    """
    named = {"adapter.init_from": config.adapter.init_from, "reference.previous": config.reference.previous}
    for key, given in named.items():
        if given is None:
            continue
        folder = Path(given)
        if not folder.is_dir():
            raise AdapterError(f"{key} {folder}: no such folder; give an adapter or run folder")
        settings, header = read_adapter_folder(folder, f"{key} {folder}")
        _check_bits(settings, config.model.load_in_4bit, f"{key} {folder}")
        model = model_folder(config.model.path, revision=config.model.revision, weights=False)
        shapes = {name: entry["shape"] for name, entry in header.items()}
        check_fits(shapes, model, f"{key} {folder}: this adapter was made for another model than {config.model.path}:")


def _check_bits(settings: Mapping[str, Any], load_in_4bit: bool, called: str) -> None:
    """ConfigError if an adapter was trained on a base of 4 bits and would go on over another, or the reverse."""
    model = (settings.get("mlxpref") or {}).get("model") or {}
    if model.get("load_in_4bit", load_in_4bit) != load_in_4bit:
        before = "on the base as it is" if load_in_4bit else "on a base of 4 bits"
        raise ConfigError(f"{called} was trained {before}: set model.load_in_4bit: {str(not load_in_4bit).lower()}")


def read_adapter_folder(folder: Path, called: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Config, and the header of the weights, of a whole adapter folder. AdapterError for one that is not.

    Args:
        called: what to call a folder that lacks a file.
    """
    settings, weights = folder / "adapter_config.json", folder / "adapters.safetensors"
    lacking = [file.name for file in (settings, weights) if not file.is_file()]
    if lacking:
        raise AdapterError(f"{called}: no {' and no '.join(lacking)}; is this an adapter folder?")
    try:
        config = json.loads(settings.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise AdapterError(f"{settings}: not the JSON of an adapter ({error}); take another copy of it") from error
    try:
        return config, safetensors_header(weights)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{weights}: the file is damaged or cut off ({error}); take another copy of it") from error


def check_fits(adapter: Mapping[str, Sequence[int]], model: Path, headline: str) -> None:
    """AdapterError with this headline if tensors of an adapter (name → shape) contradict those in a model's folder."""
    problems = list(dict.fromkeys(_strangers(adapter, _model_shapes(model))))
    more = [f"… and {len(problems) - 5} more"] if len(problems) > 5 else []
    raise_all(problems[:5] + more, AdapterError, headline)


def _model_shapes(model: Path) -> dict[str, list[int]]:
    """Tensor name → shape of all of a model's weights; damaged files are left to what loads them."""
    found: dict[str, list[int]] = {}
    for file in sorted(model.glob("model*.safetensors")):
        with suppress(OSError, ValueError):
            found |= {name: entry["shape"] for name, entry in safetensors_header(file).items()}
    return found


def _strangers(adapter: Mapping[str, Sequence[int]], model: Mapping[str, list[int]]) -> Iterator[str]:
    """Tensors inside numbered layers that the model cannot have: of a layer it lacks, or too wide or narrow.

    ``lora_a`` is (inputs, rank) and ``lora_b`` is (rank, outputs). A quantised weight has its rows for outputs,
    too, but packs its inputs.
    """
    layers = {found.groups() for name in model if (found := _LAYER.match(name))}
    stacks = {stack for stack, _ in layers}
    for name, shape in sorted(adapter.items()):
        module, _, factor = name.rpartition(".")
        layer = _LAYER.match(module)
        if layer is None:
            continue
        if layer[1] in stacks and layer.groups() not in layers:
            yield f"{layer[0]}: the model has no such layer"
        if factor not in ("lora_a", "lora_b") or len(shape) != 2:
            continue
        weight = model.get(f"{module}.weight")
        width = shape[0] if factor == "lora_a" else shape[1]
        packed = factor == "lora_a" and f"{module}.scales" in model
        if weight is None or packed:
            continue
        if width not in weight:
            yield f"{name}: {width} wide, the model's weight there is {tuple(weight)}"
            continue
        other = adapter.get(f"{module}.lora_b") if factor == "lora_a" else None
        if other is not None and len(other) == 2 and sorted((width, other[1])) != sorted(weight):
            yield f"{module}: from {width} to {other[1]}, the model's weight there is {tuple(weight)}"


def check_same(known: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """A resumed run must meet the data, weights and plan it began with; warnings come back.

    Raises:
        RunError: listing what has changed.
    """
    if not known:
        return
    before, now = (run["starts"][-1].get("device", {}).get("backend") for run in (known, facts))
    if before != now:
        raise RunError(f"{folder}: began on {before}, and a run goes on where it began: --backend {before}, not {now}")
    watched = [
        ("data", "fingerprint"), ("data", "recipe"), ("model", "fingerprint"), ("reference", "previous_sha256"),
        ("plan", "steps"),
    ]  # fmt: skip

    def value(of: Mapping[str, Any], section: str, key: str) -> Any:
        return of.get(section, {}).get(key)

    raise_all(
        [
            f"{section} {key}: was {value(known, section, key)}, is {value(facts, section, key)}"
            for section, key in watched
            if value(known, section, key) != value(facts, section, key)
        ],
        RunError,
        f"{folder}: not the data or model this run began with; put them back, or start a new run:",
    )
    before, after = known["starts"][-1]["versions"], facts["starts"][-1]["versions"]
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if names:
        changed = ", ".join(f"{name} {before.get(name)} → {after.get(name)}" for name in names)
        yield f"other versions than before ({changed}): the last bits may differ from an uninterrupted run"


def said_device(device: Mapping[str, Any]) -> str:
    """``mlx on metal (Apple M3)``, of a backend's ``device_info()``."""
    named = device.get("device_name")
    return f"{device.get('backend')} on {device.get('kind')}" + (f" ({named})" if named else "")


def describe(
    config: Config,
    objective: Objective,
    data: Prepared,
    policy: Any,
    plan: Plan,
    *,
    device: Mapping[str, Any],
    done: int = 0,
) -> Iterator[str]:
    """What a person wants to know before the first step, a line each.

    Args:
        device: the backend's ``device_info()``.
    """
    yield from data.said
    for stage, count in data.counts.items():
        dropped = sum(count.dropped.values())
        yield f"{stage}: {count.kept} kept" + (f", {dropped} dropped" if dropped else "")
        yield from (f"  {line}" for line in count.lines())
    share = policy.n_trainable / max(1, policy.n_parameters)
    yield (
        f"model: {config.model.path}, {policy.n_parameters:,} parameters, "
        f"{policy.n_trainable:,} trainable ({share:.2%}, {policy.fine_tune_type})"
    )
    how = "each prompt once for all its responses" if policy.share_prompts else "whole rows"
    yield f"way: {policy.way} ({how})"
    yield f"backend: {said_device(device)}"
    whole = "; it sees each batch as a whole, in two passes" if objective.coupled else ""
    yield f"objective: {objective.name}{whole}"
    if not data.valid:
        yield "no validation rows, so no evaluation: data.valid or data.valid_fraction gives some"
    yield (
        f"plan: {counted(len(plan.steps), 'step')} ({plan.epochs[-1]:.2f} epochs), "
        f"{counted(len(plan.shapes), 'shape')}, "
        f"{plan.padding:.1%} padding" + (f"; going on after step {done}" if done else "")
    )
