"""What a step minimises: one formula, or a weighted sum of several, with options already checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxpref.errors import ObjectiveError, raise_all
from mlxpref.objectives.lift import lift_columns, mean_over_pairs, pairs_of
from mlxpref.objectives.registry import Entry, Lift
from mlxpref.ops import Array


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
            losses = mean_over_pairs(losses, pairs, columns.get("goal_distances"), self.lift)
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
        per_token: the formula of ``lead`` compares log-probs averaged over tokens, so metrics do too.
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
        """``needs``, and ``goal_distances``, by which lists of K > 2, where it is present, leave out ties."""
        return self.needs | ({"goal_distances"} if any(not t.entry.lists for t in self.terms) else set())

    @property
    def lead(self) -> Term:
        """Whose rewards the metrics show: the first formula with a β, else the first."""
        return next((t for t in self.terms if "beta" in t.options), self.terms[0])

    @property
    def beta(self) -> float:
        """Scale of the implicit rewards in metrics: β of the formula that leads, else 1."""
        return float(self.lead.options.get("beta", 1.0))

    @property
    def coupled(self) -> bool:
        """A loss depends on other examples of its batch; see ``check_supported``."""
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

    def check_supported(self) -> None:
        """Before a model loads: can a backend run it?

        Raises:
            ObjectiveError: a formula couples the examples of a batch or carries a state. A batch may reach
                it in several micro-batches, and checkpoints keep no state of its own.
        """
        problems = []
        for entry in (term.entry for term in self.terms if term.entry.batch):
            what = "couples the examples of a batch" if entry.start is None else "carries a state"
            problems.append(f"{entry.name} {what}; no backend runs such objectives yet")
        raise_all(problems, ObjectiveError, "the objective cannot be used:")

    def initial_state(self) -> dict[str, Any]:
        """The state of step 0 by formula: NamedTuples of arrays or numbers; empty without any."""
        return {t.entry.name: t.start() for t in self.terms if t.entry.start is not None}

    def apply(self, columns: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """One step's losses and the state for the next: pure, so it compiles.

        Args:
            columns: ``policy`` and ``needs``: ``Logps`` (B, K, L); ``scores`` and, of lists,
                ``goal_distances`` (B, K); others (B, …).
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


def _lacks(entry: Entry, missing: Collection[str], available: Collection[str]) -> str:
    there = ", ".join(sorted(set(available) - {"policy"})) or "none"
    return f"{entry.name} needs {', '.join(missing)}; there is: {there}"
