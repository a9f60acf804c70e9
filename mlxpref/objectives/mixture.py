"""What a step minimises: one formula, or a weighted sum of several, with options already checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from mlxpref.errors import ObjectiveError, raise_all
from mlxpref.objectives.columns import join_rows, split_texts
from mlxpref.objectives.lift import lift_columns, mean_over_pairs, pairs_of
from mlxpref.objectives.registry import ALWAYS_THERE, FROM_MODEL, Column, Entry, Kind, Lift, Weighting
from mlxpref.objectives.weighting import wpo_weights
from mlxpref.ops import Array

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Term:
    """One formula with its options and its weight in the mixture."""

    entry: Entry
    options: Mapping[str, Any]
    weight: float = 1.0
    lift: Lift = "first_two"
    weighting: Weighting = "none"

    @property
    def columns(self) -> Mapping[str, Kind]:
        """What the formula takes, and its weighting."""
        more = {"overlap": Column("token")} if self.weighting == "wpo" else {}
        return {**self.entry.columns, **more}

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the data, the reference pass or the model must supply."""
        return self.entry.needs | (set(self.columns) - set(self.entry.columns))

    def __call__(self, columns: Columns, state: Any = None) -> Any:
        """(B,) losses of the formula, unweighted; with a state, ``(losses, new state)``."""
        taken = self._take(columns)
        k = taken["policy"].tokens.shape[1]
        pairs = None if self.entry.lists or k == 2 else pairs_of(k, self.lift)
        if pairs is not None:
            taken = lift_columns(taken, self.columns, pairs)
        arguments = {**{name: taken[name] for name in self.entry.columns}, **self.options}
        if self.entry.start is None:
            losses = self.entry.function(**arguments)
        else:
            losses, state = self.entry.function(**arguments, state=state)
        if self.weighting == "wpo":
            losses = losses * wpo_weights(taken["policy"], taken["overlap"])
        if pairs is not None:
            # A coupled formula's losses need not be in the order of the rows, and it has one pair an example.
            distances = None if self.entry.batch else columns.get("goal_distances")
            losses = mean_over_pairs(losses, pairs, distances, self.lift)
        return losses if self.entry.start is None else (losses, state)

    def joined(self, parts: Sequence[Columns]) -> Columns:
        """The columns of several parts of a batch as those of one; lists of any K become pairs."""
        taken = []
        for columns in parts:
            found = self._take(columns)
            k = found["policy"].tokens.shape[1]
            taken.append(found if k == 2 else lift_columns(found, self.columns, pairs_of(k, self.lift)))
        return {name: join_rows([columns[name] for columns in taken], kind) for name, kind in self.columns.items()}

    def start(self, n_groups: int = 1) -> Any:
        """The state at step 0; None without one."""
        if not callable(self.entry.start):
            return self.entry.start
        asked = "n_groups" in signature(self.entry.start).parameters and "n_groups" not in self.options
        more = {"n_groups": n_groups} if asked else {}
        return self.entry.start(**self.options, **more)

    def _take(self, columns: Columns) -> dict[str, Any]:
        present = {name: value for name, value in columns.items() if value is not None}
        if "lengths" in self.entry.columns and "lengths" not in present:
            present["lengths"] = present["policy"].lengths
        missing = [name for name in self.columns if name not in present]
        if missing:
            raise ObjectiveError(_lacks(self.entry, missing, present))
        return {name: present[name] for name in self.columns}


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
        """``dpo``, ``dpo (wpo)``, or ``dpo + 0.005 sft``."""
        return " + ".join(
            ("" if t.weight == 1 else f"{t.weight:g} ")
            + t.entry.name
            + ("" if t.weighting == "none" else f" ({t.weighting})")
            for t in self.terms
        )

    @property
    def needs(self) -> frozenset[str]:
        """Columns without which it cannot be computed, beside ``policy``: ``reference``, ``scores``, …"""
        return frozenset().union(*(t.needs for t in self.terms))

    @property
    def reads(self) -> frozenset[str]:
        """``needs``, and ``goal_distances``, by which lists of K > 2, where it is present, leave out ties."""
        return self.needs | ({"goal_distances"} if any(not t.entry.lists for t in self.terms) else set())

    @property
    def texts(self) -> Mapping[str, str]:
        """Further texts it reads, by name, each "example" or "response": the rows behind the responses' own."""
        return dict(sorted({name: per for t in self.terms for name, per in t.entry.texts.items()}.items()))

    @property
    def from_data(self) -> frozenset[str]:
        """The part of ``needs`` that the data must hold."""
        return self.needs - FROM_MODEL - {"reference"}

    @property
    def lead(self) -> Term:
        """Whose rewards the metrics show: the first formula with a β, else the first."""
        return next((t for t in self.terms if _scale(t) is not None), self.terms[0])

    @property
    def beta(self) -> float:
        """Scale of the implicit rewards in metrics: β of the formula that leads, else 1."""
        scale = _scale(self.lead)
        return 1.0 if scale is None else float(scale)

    @property
    def coupled(self) -> bool:
        """A loss depends on other examples of its batch; see ``apply_parts``."""
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
                **({} if term.entry.lists or term.entry.batch else {"weighting": term.weighting}),
            }
            for term in self.terms
        ]

    def check_columns(self, available: Collection[str]) -> None:
        """Before a model loads: does the data (with the reference pass) supply what the formulas need?

        Raises:
            ObjectiveError: naming each formula and the columns it lacks.
        """
        problems = []
        there = {*available, "reference", *FROM_MODEL}
        for term in self.terms:
            missing = sorted(term.needs - there)
            if missing:
                problems.append(_lacks(term.entry, missing, available))
        raise_all(problems, ObjectiveError, f"the data do not fit the objective {self.name}:")

    def initial_state(self, n_groups: int = 1) -> dict[str, Any]:
        """The state of step 0 by formula: NamedTuples of arrays or numbers; empty without any.

        Args:
            n_groups: different values of the column ``groups``.
        """
        return {t.entry.name: t.start(n_groups) for t in self.terms if t.entry.start is not None}

    def apply(self, columns: Columns, state: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """One step's losses and the state for the next: pure, so it compiles.

        Args:
            columns: ``policy`` and ``needs``: ``Logps`` (B, S, L) of the K responses and, behind them, of the
                ``texts`` in their order; ``scores`` and, of lists, ``goal_distances`` (B, K); others (B, …).
            state: as ``initial_state`` or the last call gave it.

        Returns:
            (B,) losses, unreduced, and the new state.
        """
        losses, after = self.apply_parts([columns], state)
        return losses[0], after

    def apply_parts(
        self, parts: Sequence[Columns], state: Mapping[str, Any]
    ) -> tuple[list[Array], dict[str, Any]]:
        """The same of a batch that went through the model in parts; the split changes no value.

        Returns:
            for each part its (B,) losses, and the new state.
        """
        parts = [split_texts(columns, self.texts) for columns in parts]
        totals: list[Any] = [None] * len(parts)
        after: dict[str, Any] = {}
        for term in self.terms:
            if term.entry.batch and len(parts) > 1:
                found = term(term.joined(parts), state.get(term.entry.name))
                if term.entry.start is not None:
                    found, after[term.entry.name] = found
                losses = _cut(found, [len(columns["policy"].tokens) for columns in parts])
            else:
                losses = [term(columns, state.get(term.entry.name)) for columns in parts]
                if term.entry.start is not None:
                    losses, after[term.entry.name] = [losses[0][0]], losses[0][1]
            for index, found in enumerate(losses):
                weighted = found if term.weight == 1 else term.weight * found
                totals[index] = weighted if totals[index] is None else totals[index] + weighted
        return totals, after

    def __call__(self, columns: Columns) -> Array:
        """(B,) losses, unreduced; see ``apply``. An objective with a state has no value without it."""
        if self.stateful:
            raise TypeError(f"{self.name} carries a state: call apply(columns, state)")
        return self.apply(columns, {})[0]


def _scale(term: Term) -> Any:
    """β of a formula, of the chosen response where the two differ; None without one."""
    return term.options.get("beta", term.options.get("beta_chosen"))


def _cut(losses: Array, sizes: Sequence[int]) -> list[Array]:
    """(ΣB,) as (B,) of each part."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [losses[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _lacks(entry: Entry, missing: Collection[str], available: Collection[str]) -> str:
    there = ", ".join(sorted(set(available) - ALWAYS_THERE)) or "none"
    return f"{entry.name} needs {', '.join(missing)}; there is: {there}"
