"""From a YAML file and a command line to a checked :class:`~mlxpref.config.Config`.

Order: default, file, command line. Everything wrong is gathered and raised once, each unknown key
with the nearest right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mlxpref.config import Config, LoraParameters, ScheduleSection, SourceSection, contradictions
from mlxpref.errors import ConfigError, raise_all

ALTERNATIVES = (
    ("training.iters", "training.epochs"),
    ("optimizer.schedule.warmup_steps", "optimizer.schedule.warmup_ratio"),
    ("adapter.lora_parameters.scale", "adapter.lora_parameters.alpha"),
    ("data.valid", "data.valid_fraction"),
)
"""Keys of which one is meant: a later layer that sets one takes the others of its group away."""

REPLACED: Mapping[str, tuple[str, ...]] = {
    "adapter.init_from": ("adapter.fine_tune_type", "adapter.num_layers", "adapter.lora_parameters"),
}
"""Keys that take others of earlier layers away: an adapter to start from brings its own settings."""

OTHER_NAMES: Mapping[str, str] = {
    "lr": "optimizer.learning_rate",
    "lora": "adapter.lora_parameters",
    "max_seq_length": "tokenization.max_length",
    "resume_adapter_file": "adapter.init_from",
    "lr_schedule": "optimizer.schedule",
    "optimizer_config": "optimizer.options",
    "project_name": "output.project",
    "output_dir": "output.adapter_path",
    "max_steps": "training.iters",
    "num_train_epochs": "training.epochs",
    "logging_steps": "training.steps_per_report",
    "eval_steps": "training.steps_per_eval",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_last",
    "metric_for_best_model": "training.best_metric",
    "loss_type": "objective.name",
    "beta": "objective.beta",
    "grad_accumulation_steps": "batching.gradient_accumulation_steps",
    "gradient_accumulation_steps": "batching.gradient_accumulation_steps",
}
"""What users of mlx-lm and TRL may write, and where it lives here."""


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent last word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    *,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The resolved configuration.

    Args:
        path: a YAML file, or None for defaults only.
        overrides: (dotted key, value) pairs, one layer over the file. They take alternatives of theirs out
            of the file; two alternatives among themselves contradict each other.
        base: a mapping in place of a file.

    Raises:
        ConfigError: the file cannot be read, or any key, type or combination is wrong; lists all.
    """
    merged: dict[str, Any] = read_yaml(path) if path is not None else _copy(base or {})
    _drop_alternatives(merged, overrides)
    for key, value in overrides:
        set_key(merged, key, value)
    return check_config(merged, where=str(path) if path is not None else "configuration")


def check_config(values: Mapping[str, Any], *, where: str = "configuration") -> Config:
    """A mapping as a :class:`Config`. ConfigError lists everything wrong with it."""
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        raise_all(sorted(set(_problems(error, values))), ConfigError, f"{where}:")
        raise
    raise_all(list(contradictions(config)), ConfigError, f"{where}:")
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. ConfigError names the file, line and column."""
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the path of --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path}: holds no sections; at least model: {{path: …}} and data: {{source: …}}")
    return dict(found)


def dump_config(config: Config) -> str:
    """YAML that :func:`load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)


def parse_setting(text: str) -> tuple[str, Any]:
    """``section.key=value`` as (key, value), the value read as YAML. ConfigError if it has no ``=``."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {text}: write section.key=value, as in --set optimizer.learning_rate=1e-5")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader) if value.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML: {error}") from error


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings (a number indexes a list).

    ``objective`` set to a name keeps the options written so far only when the name is the same. A section
    set to ``{}`` is opened, and keeps what is written in it.
    """
    if value == {} and isinstance(values.get(key), dict):
        return
    if key == "objective" and isinstance(value, str):
        current = values.get("objective")
        same = isinstance(current, Mapping) and current.get("name") == value
        values["objective"] = current if same else {"name": value}
        return
    *parents, last = key.split(".")
    place: Any = values
    for depth, name in enumerate(parents):
        place = _descend(place, name, ".".join(parents[: depth + 1]))
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _drop_alternatives(values: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> None:
    """Take out of earlier layers what a key of the next one stands for."""
    for key in (key for key, value in overrides if value is not None):
        group = next((group for group in ALTERNATIVES if key in group), ())
        for other in (*group, *REPLACED.get(key, ())):
            _remove(values, other.split("."))


def _descend(place: Any, name: str, so_far: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, name, so_far)]
    inner = place.get(name)
    if isinstance(inner, str) and so_far == "objective":
        inner = {"name": inner}
    if inner is None:
        inner = {}
    if not isinstance(inner, (dict, list)):
        raise ConfigError(f"{so_far} is {inner!r}, not a section: nothing below it can be set")
    place[name] = inner
    return inner


def _index(place: list[Any], name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise ConfigError(f"{key}: a list of {len(place)}; give an index from 0 to {len(place) - 1}")
    return int(name)


def _remove(values: dict[str, Any], path: Sequence[str]) -> None:
    place: Any = values
    for name in path[:-1]:
        place = place.get(name)
        if not isinstance(place, dict):
            return
    place.pop(path[-1], None)


def _copy(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _copy(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_copy(value) for value in values]
    return values


def _problems(error: ValidationError, values: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing pydantic found."""
    for found in error.errors(include_url=False):
        path = tuple(part for part in found["loc"] if part not in _UNION_TAGS)
        key = ".".join(map(str, path))
        given, kind = found["input"], found["type"]
        if kind == "tuple_type" or (kind == "string_type" and isinstance(given, (list, Mapping))):
            continue  # the other branch of a union, whose own problem is told
        if kind == "extra_forbidden":
            yield f"unknown key {key}{_nearest(path)}"
        elif kind == "missing":
            yield f"{key} is missing{_WHAT.get(key, '')}"
        elif kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
            yield f"{key} is a section of keys, not {given!r}{_inside(path)}"
        else:
            message = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
            yield f"{key}: {message}" + ("" if ", not" in message else f", not {given!r}")


_UNION_TAGS = frozenset({"str", "tuple[SourceSection, ...]", "function-before[_options(), dict[str,any]]"})
_WHAT = {
    "model": ": give --model, a model folder or hub id (model.path)",
    "model.path": ": a model folder or hub id (--model)",
    "data": ": give --data, a file, a folder or a hub id (data.source)",
    "data.source": ": a file, a folder or a hub id (--data)",
}


def _sections() -> dict[str, type[BaseModel]]:
    """Every section by its dotted path."""
    found: dict[str, type[BaseModel]] = {"": Config}
    for name, field in Config.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = kind
    nested: dict[str, type[BaseModel]] = {
        "adapter.lora_parameters": LoraParameters,
        "optimizer.schedule": ScheduleSection,
        "data.source": SourceSection,
    }
    return {**found, **nested}


def _nearest(path: tuple[Any, ...]) -> str:
    """``: did you mean …?`` for an unknown key, from its own section first, then from all."""
    *parents, last = (str(part) for part in path if not isinstance(part, int))
    sections = _sections()
    section = ".".join(parents)
    own = list(sections[section].model_fields) if section in sections else []
    close = difflib.get_close_matches(last, own, n=1, cutoff=0.75)
    if close:
        return f": did you mean {'.'.join([*parents, close[0]])}?"
    if last in OTHER_NAMES:
        return f": here it is {OTHER_NAMES[last]}"
    everywhere = {
        key: ".".join(filter(None, (name, key)))
        for name, kind in sections.items()
        for key in kind.model_fields
    }
    if last in everywhere:
        return f": it belongs to {everywhere[last].rpartition('.')[0]}: {everywhere[last]}"
    close = difflib.get_close_matches(last, own, n=1, cutoff=0.6)
    if close:
        return f": did you mean {'.'.join([*parents, close[0]])}?"
    close = difflib.get_close_matches(last, everywhere, n=1, cutoff=0.75)
    if close:
        return f": did you mean {everywhere[close[0]]}?"
    return f": {section or 'a configuration'} has {', '.join(own)}" if own else ""


def _inside(path: tuple[Any, ...]) -> str:
    section = _sections().get(".".join(map(str, path)))
    return f": as in {'.'.join(map(str, path))}.{next(iter(section.model_fields))}" if section else ""


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, sections opened."""
    if not (isinstance(values, Mapping) and values):
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
