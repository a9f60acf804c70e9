"""From a base configuration and the keys to vary to every run of a sweep, each checked.

A combination is one value of each varied key; a point is a combination with one seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mlxpref.ablate.asked import (
    OBJECTIVE_KEYS,
    Varied,
    folder_names,
    label_of,
    parse_seeds,
    plain,
    short_names,
)
from mlxpref.config import Config
from mlxpref.config_layers import flat, load_config
from mlxpref.data.words import counted
from mlxpref.errors import ConfigError, MlxprefError, raise_all
from mlxpref.objectives import TABLE, resolve_objective
from mlxpref.train import FREE_ON_RESUME, absolute_paths

MOST_LISTED = 12
"""Combinations that an error lists with each problem."""

Settings = Sequence[tuple[str, Any]]
"""(dotted key, value) pairs that go over the configuration file."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One value of each varied key.

    Attributes:
        settings: short name of each varied key → value; a key is left out where it means nothing.
        label: the same in words: ``objective=dpo, beta=0.1``.
        config: the whole configuration, its seed the base's.
    """

    settings: Mapping[str, Any]
    label: str
    config: Config


@dataclass(frozen=True, slots=True)
class Point:
    """One run: a combination with a seed (of order, first weights and dropout).

    ``name`` is that of its folder, the same whatever else is in the sweep.
    """

    name: str
    combination: Combination
    seed: int

    def config(self, out: Path) -> Config:
        """The run's configuration in the sweep folder ``out``."""
        config = self.combination.config
        store = config.reference.store or str(out / "reference")
        return config.model_copy(
            update={
                "training": config.training.model_copy(update={"seed": self.seed}),
                "output": config.output.model_copy(update={"adapter_path": str(out / "runs" / self.name)}),
                "reference": config.reference.model_copy(update={"store": store}),
            }
        )


@dataclass(frozen=True, slots=True)
class Grid:
    """Every run of a sweep.

    Attributes:
        keys: varied key → its short name, in the order given.
        combinations: in the order of their values, the last key's changing fastest.
        seeds: in the order given.
        data_seed: the base's ``training.seed``, by which the data of every run are parted and drawn.
        notes: what a reader of the results should know.
    """

    keys: Mapping[str, str]
    combinations: tuple[Combination, ...]
    seeds: tuple[int, ...]
    data_seed: int
    notes: tuple[str, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """In the order they run: all combinations with the first seed, then with the next, so that every
        combination has a figure early."""
        names = folder_names([one.settings for one in self.combinations])
        return tuple(
            Point(f"{name}seed={seed}", one, seed)
            for seed in self.seeds
            for name, one in zip(names, self.combinations, strict=True)
        )


def make_grid(
    base: Mapping[str, Any],
    settings: Settings,
    varied: Sequence[Varied],
    seeds: str = "1",
    *,
    skip_impossible: bool = False,
) -> Grid:
    """Every combination as a checked configuration.

    Args:
        base: what the configuration file holds.
        settings: what goes over it, and stands below what is varied.
        seeds: see ``parse_seeds``.
        skip_impossible: leave out combinations that contradict themselves; and where an option means nothing,
            such as a beta for ``sft``, run the combination once without it.

    Raises:
        ConfigError: a value that no combination can have; without ``skip_impossible``, any combination that
            cannot be; or two that are the same run. Lists all.
    """
    _check_settings(settings, varied)
    keys = [one.key for one in varied]
    shorts = short_names(keys)
    chosen = [dict(zip(keys, values, strict=True)) for values in product(*(one.values for one in varied))]
    tried = [_try(base, settings, values, shorts) for values in chosen]
    _refuse(tried, varied, shorts, skip_impossible)
    kept: dict[str, Combination] = {}
    for one in tried:
        if one.config is not None:
            kept.setdefault(one.label, Combination(one.settings, one.label, one.config))
    combinations = tuple(kept.values())
    _check_different(combinations)
    seed = combinations[0].config.training.seed
    notes = (*_left_out(tried, shorts), *_meanings(combinations, shorts))
    return Grid(shorts, combinations, parse_seeds(seeds, seed), seed, notes)


def _check_settings(settings: Settings, varied: Sequence[Varied]) -> None:
    given, keys = {key for key, _ in settings}, {one.key for one in varied}
    both = given & keys
    if keys & set(OBJECTIVE_KEYS):
        both |= given & set(OBJECTIVE_KEYS)
    raise_all(sorted(both), ConfigError, "given to --set and to --vary; keep one:")


# --- one combination ---


@dataclass(frozen=True, slots=True)
class _Tried:
    """A combination with what is wrong with it.

    Attributes:
        values: as asked for, by key.
        settings, label: of those that mean something here.
        idle: the other keys → why they mean nothing.
        wrong: with all values, a line each.
        config: with those that mean something; None if that cannot be either.
    """

    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    label: str
    idle: Mapping[str, str]
    wrong: tuple[str, ...]
    config: Config | None


def _try(base: Mapping[str, Any], settings: Settings, values: Mapping[str, Any], shorts: Mapping[str, str]) -> _Tried:
    idle = {**_below_null(values), **_not_taken(base, settings, values)}
    rest = {key: value for key, value in values.items() if key not in idle}
    named = {shorts[key]: plain(value) for key, value in rest.items()}
    config, _ = _resolved(base, settings, rest)
    _, wrong = _resolved(base, settings, values)
    return _Tried(values, named, label_of(named), idle, (*_below_null(values).values(), *wrong), config)


def _resolved(
    base: Mapping[str, Any], settings: Settings, values: Mapping[str, Any]
) -> tuple[Config | None, list[str]]:
    """The configuration, or what is wrong with it, a line each."""
    try:
        config = load_config(base=base, overrides=_overrides(base, settings, values))
        resolve_objective(config.as_dict()["objective"])
        return absolute_paths(config), []
    except MlxprefError as error:
        lines = re.split(r"\n  (?=\S)", str(error))
        return None, [re.sub(r"\s*\n\s+", "; ", line) for line in lines[1:] or lines]


def _overrides(base: Mapping[str, Any], settings: Settings, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The choice of an objective goes first: options that were set are meant for every one."""
    several = isinstance(base.get("objective"), list)  # objective.name is nobody's there
    first = [key for key in values if key == "objective" or (key == "objective.name" and not several)]
    rest = [(key, value) for key, value in values.items() if key not in first]
    return [*(("objective", values[key]) for key in first), *settings, *rest]


def _below_null(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a section that this combination leaves out."""
    left_out = [key for key, value in values.items() if value is None]
    return {
        key: f"{section} is null, so there is no {key}"
        for section in left_out
        for key in values
        if key.startswith(f"{section}.")
    }


def _not_taken(base: Mapping[str, Any], settings: Settings, values: Mapping[str, Any]) -> dict[str, str]:
    """Options that this combination's objective does not take."""
    asked = [key for key in values if re.fullmatch(r"objective\.[a-z_]+", key) and key not in OBJECTIVE_KEYS]
    rest = {key: value for key, value in values.items() if key not in asked}
    name = _formula(_resolved(base, settings, rest)[0]) if asked else None
    if name is None:
        return {}
    known = {*TABLE[name].model.model_fields, "weight"}
    options = {key: key.partition(".")[2] for key in asked}
    return {key: f"{name} takes no {option}" for key, option in options.items() if option not in known}


def _formula(config: Config | None) -> str | None:
    """The name of the one formula; None for a sum of several, or where there is no configuration."""
    objective = None if config is None else config.objective
    return str(objective["name"]) if isinstance(objective, Mapping) else None


# --- all of them ---


def _refuse(tried: Sequence[_Tried], varied: Sequence[Varied], shorts: Mapping[str, str], skip: bool) -> None:
    """ConfigError where nothing, or without ``skip`` not everything, can be."""

    def hopeless(key: str, value: Any) -> bool:
        text = repr(value)  # 1, 1.0 and true are equal and not the same
        return all(one.config is None for one in tried if repr(one.values[key]) == text)

    useless = [one.key for one in varied if all(one.key in t.idle for t in tried)]
    never = useless or [one.key for one in varied for value in one.values if hopeless(one.key, value)]
    possible = any(one.config is not None for one in tried)
    if skip and possible and not never:
        return
    found: dict[str, list[str]] = {}
    for one in tried:
        for line in one.wrong:
            found.setdefault(line, []).append(_named(one.values, shorts))
    remedy = "" if never or not possible else " (--skip-impossible leaves out what cannot be)"
    n = len({label for labels in found.values() for label in labels})
    raise_all(
        [f"{line}{_where(labels, len(tried))}" for line, labels in found.items()],
        ConfigError,
        f"{n} of {counted(len(tried), 'combination')} cannot be{remedy}:",
    )


def _named(values: Mapping[str, Any], shorts: Mapping[str, str]) -> str:
    return label_of({shorts[key]: plain(value) for key, value in values.items()})


def _where(labels: Sequence[str], n: int) -> str:
    if len(labels) == n:
        return "" if n == 1 else "\n    in every combination"
    shown = "".join(f"\n    in {label}" for label in labels[:MOST_LISTED])
    more = len(labels) - MOST_LISTED
    return shown + (f"\n    and in {more} more" if more > 0 else "")


def _check_different(combinations: Sequence[Combination]) -> None:
    """ConfigError where two combinations would be the same run under two names."""
    seen: dict[str, str] = {}
    problems = []
    for one in combinations:
        given = one.config.as_dict()
        whole = json.dumps({**given, "objective": resolve_objective(given["objective"]).spec}, sort_keys=True)
        if whole in seen:
            problems.append(f"{seen[whole]}  and  {one.label}")
        seen.setdefault(whole, one.label)
    raise_all(problems, ConfigError, "the same run under two names; vary what makes them differ:")


def _left_out(tried: Sequence[_Tried], shorts: Mapping[str, str]) -> Iterator[str]:
    idle = dict.fromkeys((why, one.label) for one in tried for why in one.idle.values() if one.config is not None)
    for why, label in idle:
        yield f"{why}: {label} runs once without it"
    for one in tried:
        if one.config is None:
            yield f"left out: {_named(one.values, shorts)}: {'; '.join(one.wrong)}"


def _meanings(combinations: Sequence[Combination], shorts: Mapping[str, str]) -> Iterator[str]:
    """Options of one name that mean different things in the objectives that are compared."""
    for key, short in shorts.items():
        section, _, option = key.partition(".")
        said = {}
        for one in combinations:
            entry = TABLE.get(_formula(one.config) or "")
            if section == "objective" and short in one.settings and entry is not None and option in entry.options:
                said[entry.name] = re.split(r"[.;] ", entry.options[option].help)[0].rstrip(".")
        if len(set(said.values())) > 1:
            words = "; ".join(f"{name}: {text}" for name, text in said.items())
            yield f"{short} is not the same thing in every objective. {words}"


# --- comparing configurations ---


def deciding(config: Config) -> dict[str, Any]:
    """Every dotted key that can change a weight, with its value."""
    return {key: value for key, value in flat(config.as_dict()).items() if key not in FREE_ON_RESUME}


def shared_settings(grid: Grid) -> dict[str, Any]:
    """What all combinations have alike and nothing varies, by dotted key."""
    first, *others = (deciding(one.config) for one in grid.combinations)
    varied = {"objective" if key in OBJECTIVE_KEYS else key for key in grid.keys}
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
        and not any(key == one or key.startswith(f"{one}.") for one in varied)
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: was …, now …`` for each that both have and that differs."""
    return [f"{key}: was {before[key]!r}, now {now[key]!r}" for key in before if key in now and before[key] != now[key]]
