"""What a sweep is asked to vary: keys, their values, seeds; and what each is called in folders and tables."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxpref.config_layers import parse_setting
from mlxpref.errors import ConfigError, UsageError, raise_all

OBJECTIVE_KEYS = ("objective", "objective.name")
"""Both choose a formula, as ``--objective`` does: options of another one in the base are not its own."""

NOT_VARIED: Mapping[str, str] = {
    "training.seed": "give --seeds",
    "output.adapter_path": "a sweep gives every run a folder of its own below --out",
    "reference.store": "the runs of a sweep share one",
}

SEEDS = 2**32
"""Seeds are below it."""

NAME_LENGTH = 160
"""Characters of a run folder's name before the seed; file systems allow 255 bytes."""


@dataclass(frozen=True, slots=True)
class Varied:
    """A dotted key of the configuration and the values it takes."""

    key: str
    values: tuple[Any, ...]


def parse_vary(texts: Sequence[str]) -> tuple[Varied, ...]:
    """``section.key=value,value,…`` of each text.

    The values are those of a YAML list without its brackets, so commas inside ``[…]``, ``{…}`` and quotes
    belong to a value.

    Raises:
        ConfigError: not YAML, no value, a key that is given twice, or one that a sweep decides itself.
    """
    found = tuple(map(_varied, texts))
    keys = [one.key for one in found]
    problems = [f"{key} is given twice: list all its values in one --vary" for key in keys if keys.count(key) > 1]
    if set(OBJECTIVE_KEYS) <= set(keys):
        problems.append("objective and objective.name both choose the objective: keep one")
    problems += [f"{key}: {why}" for key, why in NOT_VARIED.items() if key in keys]
    raise_all(list(dict.fromkeys(problems)), ConfigError, "--vary:")
    return found


def _varied(text: str) -> Varied:
    key, sign, values = text.partition("=")
    example = "as in --vary objective.beta=0.05,0.1"
    if not sign or not key.strip() or not values.strip():
        raise ConfigError(f"--vary {text}: write section.key=value,value,…, {example}")
    try:
        _, found = parse_setting(f"{key}=[{values}]")
    except ConfigError as error:
        raise ConfigError(f"--vary {text}: the values are not YAML with commas between them, {example}") from error
    if not isinstance(found, list) or not found:
        raise ConfigError(f"--vary {text}: there is no value; write section.key=value,value,…, {example}")
    return Varied(key.strip(), tuple(found))


def parse_seeds(text: str, base: int) -> tuple[int, ...]:
    """``3``: the base's seed and the two after it; ``1,5,7``: these. UsageError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if len(words) > 1 and not words[-1]:
        words.pop()
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--seeds {text}: write how many (3), or which (1,5,7)")
    numbers = [int(word) for word in words]
    if "," not in text:
        numbers = list(range(base, base + numbers[0]))
    if not numbers or len(set(numbers)) < len(numbers) or max(numbers) >= SEEDS:
        raise UsageError(f"--seeds {text}: at least one seed, each once, below 2**32")
    return tuple(numbers)


# --- names ---


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Of each key its last part where that is enough to tell them apart, else the whole key."""
    last = {key: "objective" if key in OBJECTIVE_KEYS else key.rpartition(".")[2] for key in keys}
    shorts = [*last.values(), "seed"]
    return {key: short if shorts.count(short) == 1 else key for key, short in last.items()}


def plain(value: Any) -> Any:
    """A value as it will be read: text that is a number is one, so 1e-5 and 0.00001 have one name."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        value = number if math.isfinite(number) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def value_text(value: Any) -> str:
    """``0.05``, ``dpo``, ``null``, ``{"min_gap": 3}``."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def label_of(settings: Mapping[str, Any]) -> str:
    """``objective=dpo, beta=0.05``; ``base`` where nothing is varied."""
    return ", ".join(f"{short}={value_text(value)}" for short, value in settings.items()) or "base"


def folder_names(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What folders of these combinations begin with: readable, different (also where a file system takes upper
    case for lower), and each the same whatever the others are."""
    names = ["".join(f"{key}={_safe(value_text(value))}," for key, value in one.items()) for one in all_settings]
    return [
        name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH].rstrip(',')}-{_hash(label_of(one))},"
        for name, one in zip(names, all_settings, strict=True)
    ]


def _safe(text: str) -> str:
    """A text as part of a folder's name; with a hash of it where some of it had to go, or is in upper case."""
    safe = text if text == "{}" else re.sub(r"[^a-z0-9._+-]+", "_", text.lower())[:40].strip("_")
    return safe if safe == text else f"{safe}-{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
