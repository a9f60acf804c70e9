"""From a configuration to an objective: names, options and weights are checked here, at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import ValidationError

from mlxpref.errors import ObjectiveError, raise_all
from mlxpref.objectives.mixture import Objective, Term
from mlxpref.objectives.registry import TABLE, Entry, Scope, Text
from mlxpref.records import Logps

N_GROUPS = 2
"""Of the made-up examples."""

Spec = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def resolve_objective(spec: Spec) -> Objective:
    """The objective a configuration asks for.

    Args:
        spec: a name; ``{"name": "dpo", "beta": 0.1, …}``; or a list of these, each with a ``weight``
            (default 1), whose losses are added. Pair formulas take ``lift``, for lists of K > 2, and ``weighting``.

    Raises:
        ObjectiveError: every unknown name or option, wrong type and value out of range, at once, with
            the nearest name that exists.
    """
    items = [spec] if isinstance(spec, str | Mapping) else list(spec)
    problems: list[str] = [] if items else ["no objective is named"]
    terms = [term for item in items if (term := _term(item, problems)) is not None]
    if terms and not problems and not any(term.weight for term in terms):
        problems.append("every weight is 0: nothing would be trained")
    names = [term.entry.name for term in terms]
    problems += [f"{name} is listed twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    raise_all(problems, ObjectiveError, "the objective cannot be used:")
    found = Objective(tuple(terms))
    return replace(found, per_token=_compares_means(found.lead))


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
    more = {key: checked[key] for key in ("lift", "weighting") if key in checked}
    term = Term(entry, {key: checked[key] for key in entry.options}, number, **more)
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
    found = [plain] if plain in TABLE else [aliases[plain]] if plain in aliases else near
    hint = f"; did you mean {' or '.join(found)}?" if found else f". There are: {', '.join(TABLE)}"
    raise ObjectiveError(f"{name}: no such objective{hint}")


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


# --- trying a formula out on a few numbers -----------------------------------------------------


def check_widths(objective: Objective, widths: Mapping[str, int]) -> None:
    """Before a model loads: do the options fit the data's numbers of rewards a response?

    Args:
        widths: column → M, for columns (B, K, M); 0 for (B, K).

    Raises:
        ObjectiveError: a formula refuses them, such as too few weights.
    """
    problems = []
    for term in objective.terms:
        try:
            _try_out(term, widths=widths)
        except ValueError as error:
            problems.append(f"{term.entry.name}: {error}")
    raise_all(problems, ObjectiveError, f"the data do not fit the objective {objective.name}:")


def _example(term: Term, repeat: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """Four made-up examples with every column the formula names; ``repeat`` says each token again."""
    entry, rng = term.entry, np.random.default_rng(0)
    weights = term.options.get("weights", ())
    widths = {"attributes": 2, "margin_rewards": max(0, len(weights) - 1), **widths}
    n, k, tokens = 4, 3 if entry.lists else 2, 5

    def mask_of(slots: int) -> np.ndarray:
        return (np.arange(tokens) < rng.integers(2, tokens + 1, (n, slots, 1))).astype(np.float64)

    mask = mask_of(k)
    masks = {name: mask_of(k if per == "response" else 1) for name, per in entry.texts.items()}
    columns: dict[str, Any] = {}
    for name, kind in entry.columns.items():
        if isinstance(kind, Scope | Text):
            own = masks.get(name.removesuffix("_reference"), mask)
            logps = -rng.uniform(0.1, 3.0, own.shape) * own
            columns[name] = Logps(np.repeat(logps, repeat, -1), np.repeat(own, repeat, -1))
        elif name == "lengths":
            columns[name] = mask.sum(-1) * repeat
        elif kind.per == "token":
            columns[name] = np.repeat(rng.uniform(0.1, 1.0, mask.shape) * mask, repeat, -1)
        elif kind.integer:
            columns[name] = np.arange(n) % N_GROUPS
        else:
            shape = (n, k) if kind.per == "response" else (n,)
            values = -np.sort(-rng.uniform(0.1, 1, shape))
            columns[name] = np.stack([values] * widths[name], -1) if widths.get(name) else values
    return columns


def _try_out(term: Term, repeat: int = 1, widths: Mapping[str, int] = MappingProxyType({})) -> np.ndarray:
    """Losses of a made-up batch. ValueError: the formula refuses its options. TypeError: for its author."""
    columns = _example(term, repeat, widths)
    plain = replace(term, weighting="none")
    with np.errstate(all="ignore"):
        losses = plain(columns, term.start(N_GROUPS))
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
