"""What the score of a response is: the data's own, or made of several, and less for being long.

A :class:`Scoring` says how; what it needs to know of the data (means, quantiles, α) it is fitted with once, on
the training examples, and carries along as numbers, so that later rows are scored as the first ones were.
Attributes stay as they are; only ``Scored.scores`` is made anew.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.data.recipe import OVERALL, raw_scores
from mlxpref.errors import DataError, ScoreError, UsageError, raise_all
from mlxpref.records import Scored
from mlxpref.rewards.directions import direction_score, parse_direction
from mlxpref.rewards.ensembles import mean_score, uncertainty_weighted, worst_case
from mlxpref.rewards.lengths import balanced_alpha, length_penalised
from mlxpref.rewards.transforms import Standard, fit_standard, joint_utility, reference_score, standardise

COMBINES: Mapping[str, float | None] = {"mean": None, "min": None, "uwo": 0.5, "log_sigmoid": 0.85}
"""Ways to make one score of several → the default of the number that may follow, ``uwo:0.1``; None: takes none."""

DECIMALS = 12
"""Scores made here are rounded so far: float noise does not decide between two equal ones."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a scoring learnt from the training examples.

    Attributes:
        standards: attribute → mean and deviation it is standardised by, its own units.
        references: attribute → s_ref, standardised where the attribute is.
        alpha: score units a character.
    """

    standards: Mapping[str, Standard] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 0.0


@dataclass(frozen=True)
class Scoring:
    """How scores are made. Nothing given: the data's own, untouched.

    Attributes:
        score_from: attributes the score is made of ("overall" is the score itself), and
        combine: how. "mean" (the default); "min", the lowest; "uwo:LAMBDA", mean − λ · variance over the attributes
            (0.5); "log_sigmoid:QUANTILE", Σ log σ(s − s_ref), s_ref the quantile (0.85) of the training responses'.
        standardise: bring each attribute to mean 0 and deviation 1 over the training responses first. By default
            where mean, min or uwo compares several; log_sigmoid and a direction take them in their own units.
        direction: instead of both, ``"helpfulness*80 + verbosity*60"``: the score is v·r, v the unit vector of these
            weights, and the default template calls it by these words.
        length_penalty: score units a character to subtract, > 0; "dice": as many as make chosen and rejected
            training responses equally long.
        fitted: what :meth:`fit` learnt.

    Raises:
        UsageError: values out of range or in contradiction, all of them listed.
    """

    score_from: tuple[str, ...] = ()
    combine: str | None = None
    standardise: bool | None = None
    direction: str | None = None
    length_penalty: float | Literal["dice"] | None = None
    fitted: Fitted | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "score_from", tuple(self.score_from))
        raise_all(list(self._problems()), UsageError, "scores cannot be made like that:")

    def _problems(self) -> Iterator[str]:
        if len(set(self.score_from)) < len(self.score_from):
            yield f"score_from names each attribute once: {', '.join(self.score_from)}"
        if self.combine is not None:
            yield from self._combine_problems()
        if self.standardise is not None and not (self.score_from or self.direction):
            yield "standardise is of the attributes a score is made of: give score_from"
        if self.direction is not None:
            if self.score_from:
                yield "direction and score_from both say what the score is made of: keep one"
            yield from _refused(parse_direction, self.direction)
        penalty = self.length_penalty
        if penalty is not None and penalty != "dice" and not (_is_number(penalty) and 0 < penalty < math.inf):
            yield f'length_penalty: {penalty!r}; score units a character, above 0, or "dice"'

    def _combine_problems(self) -> Iterator[str]:
        kind = str(self.combine).partition(":")[0]
        if not self.score_from:
            yield f"combine {self.combine} puts attributes together: name them in score_from"
        elif kind in ("min", "uwo") and len(self.score_from) < 2:
            yield f"combine {self.combine} compares attributes: name two or more in score_from"
        yield from _refused(parse_combine, str(self.combine))

    # --- what is asked for ---

    @property
    def acts(self) -> bool:
        """Whether any score is made anew."""
        return bool(self.names) or self.length_penalty is not None

    @property
    def weights(self) -> dict[str, int]:
        """Of the direction, by attribute; empty without one."""
        return {} if self.direction is None else parse_direction(self.direction)

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes the score is made of."""
        return self.score_from or tuple(self.weights)

    @property
    def way(self) -> tuple[str, float | None]:
        """How they are put together, and its number: ("uwo", 0.5)."""
        return ("direction", None) if self.direction is not None else parse_combine(self.combine or "mean")

    @property
    def standardises(self) -> bool:
        if self.standardise is not None:
            return self.standardise
        return len(self.names) > 1 and self.way[0] in ("mean", "min", "uwo")

    @property
    def keeps_units(self) -> bool:
        """Whether the score is on the scale of the attributes it is made of (of the data's own, without any)."""
        return self.length_penalty is None and not self.standardises and self.way[0] in ("mean", "min")

    # --- scores ---

    def fit(self, examples: Sequence[Scored]) -> Scoring:
        """This scoring with what it needs to know of the training examples; itself if it knows already.

        Raises:
            ScoreError: no example has the attributes, or one of them has the same value everywhere.
        """
        if self.fitted is not None or not self.acts:
            return self
        tables = [table for example in examples if (table := self._usable(example)) is not None]
        if self.names and not tables:
            have = sorted({name for example in examples for name in example.attributes}) or ["none"]
            raise ScoreError(f"no example has all of {', '.join(self.names)}; there is: {', '.join(have)}")
        columns = dict(zip(self.names, np.concatenate(tables).T, strict=True)) if tables else {}
        scaled = columns if self.standardises else {}
        standards = {name: named_standard(name, values) for name, values in scaled.items()}
        kind, number = self.way
        references = {
            name: reference_score(_scaled(values, standards.get(name)), number)
            for name, values in columns.items()
            if kind == "log_sigmoid" and number is not None
        }
        known = dataclasses.replace(self, fitted=Fitted(standards, references))
        return dataclasses.replace(self, fitted=Fitted(standards, references, known._alpha(examples)))

    def _alpha(self, examples: Sequence[Scored]) -> float:
        if self.length_penalty != "dice":
            return float(self.length_penalty or 0.0)
        rescored = [self(example) for example in examples if not self.names or self._usable(example) is not None]
        lists = [(example.scores, _lengths(example)) for example in rescored if example.scores is not None]
        return balanced_alpha([scores for scores, _ in lists], [own for _, own in lists]) if lists else 0.0

    def __call__(self, example: Scored) -> Scored:
        """The example with its scores made anew; an unscored one without attributes as it is.

        Raises:
            DataError: it lacks an attribute. UsageError: the scoring is not fitted yet.
        """
        if not self.acts:
            return example
        if self.fitted is None:
            raise UsageError("a scoring is fitted on training examples before it scores any")
        if example.scores is None and (not self.names or not example.attributes):
            return example
        values = self._combined(self._table(example)) if self.names else np.asarray(example.scores)
        values = length_penalised(values, _lengths(example), self.fitted.alpha)
        return dataclasses.replace(example, scores=tuple(round(float(v), DECIMALS) for v in values))

    def _combined(self, table: np.ndarray) -> np.ndarray:
        """(K, M) attributes → (K,) scores."""
        fitted = self.fitted or Fitted()
        scaled = [_scaled(table[:, m], fitted.standards.get(name)) for m, name in enumerate(self.names)]
        values = np.stack(scaled, -1)
        kind, number = self.way
        if kind == "direction":
            return direction_score(values, list(self.weights.values()))
        if kind == "log_sigmoid":
            return joint_utility(values, [fitted.references[name] for name in self.names])
        if kind == "uwo":
            return uncertainty_weighted(values, float(number or 0.0))
        return worst_case(values) if kind == "min" else mean_score(values)

    def _table(self, example: Scored) -> np.ndarray:
        """(K, M) its scores under each attribute. DataError if it lacks one."""
        columns = [raw_scores(example, name) for name in self.names]
        lacking = [name for name, column in zip(self.names, columns, strict=True) if column is None]
        if lacking:
            raise DataError(f"no attribute {lacking[0]!r}" if lacking[0] != OVERALL else "no overall score")
        return np.asarray(columns, np.float64).T

    def _usable(self, example: Scored) -> np.ndarray | None:
        try:
            return self._table(example) if self.names else None
        except DataError:  # counted where it is scored
            return None

    # --- files ---

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe: what was given, and what was fitted. :meth:`from_dict` gives an equal scoring back."""
        return {**given_fields(self), "fitted": None if self.fitted is None else dataclasses.asdict(self.fitted)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Scoring:
        """The scoring that ``as_dict`` wrote. DataError if it is damaged."""
        try:
            fitted = stored.get("fitted")
            if fitted is not None:
                standards = {name: Standard(*map(float, own)) for name, own in fitted["standards"].items()}
                fitted = Fitted(standards, dict(fitted["references"]), float(fitted["alpha"]))
            return cls(**{**stored, "fitted": fitted})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"a damaged account of how scores were made: {error}") from error


def parse_combine(text: str) -> tuple[str, float | None]:
    """``"uwo:0.1"`` as ("uwo", 0.1), its number filled in where it is left out. UsageError if it is no such thing."""
    kind, sign, number = text.partition(":")
    if kind not in COMBINES:
        raise UsageError(f"combine: {text!r}; one of mean, min, uwo:LAMBDA, log_sigmoid:QUANTILE")
    if not sign:
        return kind, COMBINES[kind]
    value = parse_number(number)
    wanted = {"uwo": "LAMBDA is 0 or more", "log_sigmoid": "QUANTILE is 0 to 1"}.get(kind, "it takes no number")
    top = {"uwo": sys.float_info.max, "log_sigmoid": 1.0}.get(kind)
    if top is None or value is None or not 0 <= value <= top:
        raise UsageError(f"combine: {text!r}; {wanted}")
    return kind, value


def parse_number(text: str) -> float | None:
    """The number a text spells, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def given_fields(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults, ``fitted`` aside, JSON-safe."""
    found = {}
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.name != "fitted" and value != entry.default:
            found[entry.name] = list(value) if isinstance(value, tuple) else value
    return found


def _refused(parse: Any, text: str) -> Iterator[str]:
    try:
        parse(text)
    except UsageError as error:
        yield str(error)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def named_standard(name: str, values: ArrayLike) -> Standard:
    """:func:`mlxpref.rewards.transforms.fit_standard` of an attribute, whose name the ScoreError begins with."""
    try:
        return fit_standard(values)
    except ScoreError as error:
        raise ScoreError(f"{name}: {error}; leave it out") from error


def _scaled(values: np.ndarray, standard: Standard | None) -> np.ndarray:
    return values if standard is None else standardise(values, standard)


def _lengths(example: Scored) -> tuple[int, ...]:
    """Characters of each response."""
    return tuple(len(text) for text in example.responses)
