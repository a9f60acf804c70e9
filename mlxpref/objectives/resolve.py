"""From a configuration to the one function a step calls: names, options and weights checked first."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError

from mlxpref.errors import ObjectiveError, raise_all
from mlxpref.objectives.lift import lift_columns, mean_over_pairs, pairs_of
from mlxpref.objectives.registry import TABLE, Column, Entry, Lift, Scope
from mlxpref.ops import Array
from mlxpref.records import Logps

Spec = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Term:
    """One formula with its options and its weight in the mixture."""

    entry: Entry
    options: Mapping[str, Any]
    weight: float = 1.0
    lift: Lift = "first_two"

    def __call__(self, columns: Mapping[str, Any], state: Any = None) -> Any:
        """(B,) losses of the formula, unweighted; with a state, ``(losses, new state)``."""
        taken = self._take(columns)
        k = taken["policy"].tokens.shape[1]
        pairs = None if self.entry.lists or k == 2 else pairs_of(k, self.lift)
        if pairs is not None:
            taken = lift_columns(taken, self.entry.columns, pairs)
        arguments = {**taken, **self.options}
        if self.entry.start is None:
            losses = self.entry.function(**arguments)
        else:
            losses, state = self.entry.function(**arguments, state=state)
        if pairs is not None:
            losses = mean_over_pairs(losses, pairs, columns.get("scores"))
        return losses if self.entry.start is None else (losses, state)

    def start(self) -> Any:
        """The state at step 0; None without one."""
        return self.entry.start(**self.options) if callable(self.entry.start) else self.entry.start

    def _take(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        present = {name: value for name, value in columns.items() if value is not None}
        if "lengths" in self.entry.columns and "lengths" not in present:
            present["lengths"] = present["policy"].lengths
        missing = [name for name in self.entry.columns if name not in present]
        if missing:
            raise ObjectiveError(_lacks(self.entry, missing, present))
        return {name: present[name] for name in self.entry.columns}


@dataclass(frozen=True)
class Objective:
    """What a step minimises: one formula, or a weighted sum of several. Made by ``resolve_objective``.

    Attributes:
        terms: the formulas; each option resolved.
        per_token: the (first) formula compares log-probs averaged over tokens, so metrics do too.
    """

    terms: tuple[Term, ...]
    per_token: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """``dpo``, or ``dpo + 0.005 sft``."""
        return " + ".join(("" if t.weight == 1 else f"{t.weight:g} ") + t.entry.name for t in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """Columns without which it cannot be computed, beside ``policy``: ``reference``, ``scores``, …"""
        return frozenset().union(*(t.entry.needs for t in self.terms))

    @property
    def reads(self) -> frozenset[str]:
        """``needs``, and ``scores``, which lists of K > 2 use, where present, to leave out ties."""
        return self.needs | ({"scores"} if any(not t.entry.lists for t in self.terms) else set())

    @property
    def beta(self) -> float:
        """Scale of the implicit rewards in metrics: β of the first formula that has one, else 1."""
        return next((float(t.options["beta"]) for t in self.terms if "beta" in t.options), 1.0)

    @property
    def coupled(self) -> bool:
        """A loss depends on other examples of its batch, which must then come in one piece."""
        return any(t.entry.batch for t in self.terms)

    @property
    def stateful(self) -> bool:
        """It carries numbers from step to step: call ``apply`` with a state, not the objective."""
        return any(t.entry.start is not None for t in self.terms)

    @property
    def options(self) -> dict[str, Any]:
        """Every option in force; ``{"dpo.beta": …}``, by formula, in a mixture."""
        prefix = len(self.terms) > 1
        return {
            f"{spec['name']}.{key}" if prefix else key: value
            for spec in self.spec
            for key, value in spec.items()
            if key not in ("name", "weight")
        }

    @property
    def spec(self) -> list[dict[str, Any]]:
        """Every term as configured, defaults filled in; ``resolve_objective`` takes it back. JSON-safe."""
        return [
            {
                "name": term.entry.name,
                "weight": term.weight,
                **{k: list(v) if isinstance(v, tuple) else v for k, v in term.options.items()},
                **({} if term.entry.lists else {"lift": term.lift}),
            }
            for term in self.terms
        ]

    def check_columns(self, available: Collection[str]) -> None:
        """Before a model loads: does the data (with the reference pass) supply what the formulas need?

        Raises:
            ObjectiveError: naming each formula and the columns it lacks.
        """
        problems = []
        for term in self.terms:
            missing = sorted(term.entry.needs - set(available))
            if missing:
                problems.append(_lacks(term.entry, missing, available))
        raise_all(problems, ObjectiveError, f"the data do not fit the objective {self.name}:")

    def initial_state(self) -> dict[str, Any]:
        """The state of step 0 by formula: NamedTuples of arrays or numbers; empty without any."""
        return {t.entry.name: t.start() for t in self.terms if t.entry.start is not None}

    def apply(self, columns: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """One step's losses and the state for the next: pure, so it compiles.

        Args:
            columns: ``policy`` and ``needs``: ``Logps`` (B, K, L); ``scores`` (B, K); others (B, …).
            state: as ``initial_state`` or the last call gave it.

        Returns:
            (B,) losses, unreduced, and the new state.
        """
        total, after = None, {}
        for term in self.terms:
            losses = term(columns, state.get(term.entry.name))
            if term.entry.start is not None:
                losses, after[term.entry.name] = losses
            losses = losses if term.weight == 1 else term.weight * losses
            total = losses if total is None else total + losses
        return total, after

    def __call__(self, columns: Mapping[str, Any]) -> Array:
        """(B,) losses, unreduced; see ``apply``. An objective with a state has no value without it."""
        if self.stateful:
            raise TypeError(f"{self.name} carries a state: call apply(columns, state)")
        return self.apply(columns, {})[0]


def resolve_objective(spec: Spec) -> Objective:
    """The objective a configuration asks for.

    Args:
        spec: a name; ``{"name": "dpo", "beta": 0.1, …}``; or a list of these, each with a ``weight``
            (default 1), whose losses are added. Pair formulas take ``lift`` for lists of K > 2.

    Raises:
        ObjectiveError: every unknown name or option, wrong type and value out of range, at once, with
            the nearest name that exists.
    """
    items = [spec] if isinstance(spec, str | Mapping) else list(spec)
    problems: list[str] = [] if items else ["no objective is named"]
    terms = [term for item in items if (term := _term(item, problems)) is not None]
    names = [term.entry.name for term in terms]
    problems += [f"{name} is listed twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    raise_all(problems, ObjectiveError, "the objective cannot be used:")
    return Objective(tuple(terms), per_token=_compares_means(terms[0]))


def _term(item: object, problems: list[str]) -> Term | None:
    """One term of a mixture; None, with what is wrong added to ``problems``."""
    options = {"name": item} if isinstance(item, str) else dict(item) if isinstance(item, Mapping) else {}
    name, weight = options.pop("name", None), options.pop("weight", 1.0)
    if name is None:
        problems.append(f"{item!r}: expected the name of an objective, or a mapping with name and options")
        return None
    try:
        entry = find_objective(str(name))
    except ObjectiveError as error:
        problems.append(str(error))
        return None
    found = _option_problems(entry, options)
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        found.append(f"{name}: weight: {weight!r} is not a finite number")
    if found:
        problems += found
        return None
    checked = entry.model(**options).model_dump()
    term = Term(entry, {key: checked[key] for key in entry.options}, number, checked.get("lift", "first_two"))
    try:
        _try_out(term)
    except ValueError as error:  # how a formula refuses options that contradict each other
        problems.append(f"{name}: {error}")
        return None
    return term


def _option_problems(entry: Entry, options: Mapping[str, Any]) -> list[str]:
    facts = entry.schema["properties"]
    truths = [  # pydantic takes True for 1
        key
        for key, value in options.items()
        if isinstance(value, bool) and facts.get(key, {}).get("type") in ("number", "integer")
    ]
    problems = [
        f"{entry.name}: {key}: {options[key]!r} is not a number ({entry.describe(key)})" for key in truths
    ]
    try:
        entry.model(**{key: value for key, value in options.items() if key not in truths})
    except ValidationError as error:
        for e in error.errors(include_url=False):
            key = str(e["loc"][0])
            if e["type"] == "extra_forbidden":
                problems.append(_unknown_option(entry, key))
            else:
                said = e["msg"].removeprefix("Input ").removeprefix("Value error, ")
                problems.append(f"{entry.name}: {key}: {options[key]!r} {said} ({entry.describe(key)})")
    return problems


def find_objective(name: str) -> Entry:
    """The table's entry of that name. ObjectiveError: there is none; it names the nearest, also by the
    names other programs use."""
    if name in TABLE:
        return TABLE[name]
    aliases = {alias.lower(): entry.name for entry in TABLE.values() for alias in entry.aliases}
    plain = name.lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(plain, TABLE, n=3, cutoff=0.6)
    found = [aliases[plain]] if plain in aliases else near
    hint = f"did you mean {' or '.join(found)}? " if found else ""
    raise ObjectiveError(f"{name}: no such objective; {hint}There are: {', '.join(TABLE)}")


def _unknown_option(entry: Entry, key: str) -> str:
    known = list(entry.schema["properties"])
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    near = near or [name for name in known if plain.startswith(name) or name.startswith(plain)]
    hint = ""
    if near:
        text = entry.options[near[0]].help if near[0] in entry.options else ""
        hint = f"; did you mean {near[0]}?" + (f" ({near[0]}: {text})" if text else "")
    takes = ", ".join(f"{name} ({entry.describe(name)})" for name in known)
    return f"{entry.name} takes no option {key}{hint}\n    it takes: {takes or 'none'}"


def _lacks(entry: Entry, missing: Collection[str], available: Collection[str]) -> str:
    there = ", ".join(sorted(set(available) - {"policy"})) or "none"
    return f"{entry.name} needs {', '.join(missing)}; there is: {there}"


# --- trying a formula out on a few numbers -----------------------------------------------------


def _example(entry: Entry, repeat: int = 1) -> dict[str, Any]:
    """Four made-up examples with every column the formula names; ``repeat`` says each token again."""
    rng = np.random.default_rng(0)
    n, k, tokens = 4, 3 if entry.lists else 2, 5
    mask = (np.arange(tokens) < rng.integers(2, tokens + 1, (n, k, 1))).astype(np.float64)
    columns: dict[str, Any] = {}
    for name, kind in entry.columns.items():
        if isinstance(kind, Scope):
            logps = -rng.uniform(0.1, 3.0, mask.shape) * mask
            columns[name] = Logps(np.repeat(logps, repeat, -1), np.repeat(mask, repeat, -1))
        elif name == "lengths":
            columns[name] = mask.sum(-1) * repeat
        elif isinstance(kind, Column):
            shape = (n, k) if kind.per == "response" else (n,)
            columns[name] = np.zeros(shape, int) if kind.integer else -np.sort(-rng.uniform(1, 10, shape))
    return columns


def _try_out(term: Term, repeat: int = 1) -> np.ndarray:
    """Losses of a made-up batch. ValueError: the formula refuses its options. TypeError: for its author."""
    columns = _example(term.entry, repeat)
    with np.errstate(all="ignore"):
        losses = term(columns, term.start())
    if term.entry.start is not None:
        losses = losses[0]
    if np.shape(losses) != (len(columns["policy"].tokens),):
        raise TypeError(f"objective {term.entry.name}: losses of shape {np.shape(losses)}, expected (B,)")
    return losses


def _compares_means(term: Term) -> bool:
    """Does a response that says every token twice, at the same log-probs, leave the loss as it is?

    Asked with the default options too, since others may make a loss so flat that it cannot be seen.
    """
    plain = Term(term.entry, {o.name: o.default for o in term.entry.options.values()})
    return all(np.allclose(_try_out(t), _try_out(t, repeat=2), rtol=1e-9, atol=0) for t in (plain, term))
