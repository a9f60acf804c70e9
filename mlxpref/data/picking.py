"""Which responses of a list and which examples stay, before goals are written.

First a list becomes shorter (``sample``), then a pair (``select``); then examples go (``drop_top``) or have
their label turned round (``weakest``). What a filter needs to know of the data, a bound, is fitted once on the
training examples and then holds for every split. Draws depend on the seed and the example's id alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, cast

import numpy as np

from mlxpref.data.drafts import as_number
from mlxpref.data.relabel import TIE, per_response
from mlxpref.data.scoring import DECIMALS, given_fields, named_standard, parse_number
from mlxpref.errors import DataError, ScoreError, UsageError, raise_all
from mlxpref.records import Dropped, Scored
from mlxpref.rewards.filters import highest_kept, lowest_kept, preference_strength
from mlxpref.rewards.selection import SELECTS, Select, rejection_sample, select_pair

TOP = "among the highest of drop_top"
WEAKEST = "among the weakest preferences"

ASKED_FOR = frozenset({TIE, TOP, WEAKEST})
"""Reasons that are filters, not faults: ``strict`` leaves them alone."""

MODES = tuple(mode for mode in SELECTS if mode != "max_min_p")
"""Of ``select``."""

SAMPLE_BETA = 0.5
"""The temperature of rejection sampling where none is given: the paper's."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the filters learnt from the training examples.

    Attributes:
        highest: of ``drop_top``'s column, the highest value that stays.
        weakest: the lowest preference strength that stays, in standard deviations.
        deviations: of each attribute of ``strength_from``, its own units.
    """

    highest: float | None = None
    weakest: float | None = None
    deviations: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Picking:
    """What stays. Nothing given: everything.

    Attributes:
        sample: responses to keep of a longer list, ≥ 2, by statistical rejection sampling on the scores.
        sample_beta: its temperature in score units, ≥ 0 (0.5): larger samples more evenly, 0 keeps the best.
        select: make a pair of each list: "random", "max_random", "max_min" or "max_max". The pair keeps its scores;
            equal ones are dropped.
        drop_top: "COLUMN:SHARE", drop the examples in the top share of a column: one number an example, or one a
            response (an attribute), of which the highest counts.
        strength_from: attributes of pairs, one a reward model, whose mean gap in standard deviations is the
            strength of the preference that the scores (of unscored pairs: the data) state.
        weakest: "drop:SHARE" or "flip:SHARE", what becomes of the pairs of the lowest strength. A flip exchanges
            the scores (of unscored pairs: the responses).
        fitted: what :meth:`fit` learnt.

    Raises:
        UsageError: values out of range or in contradiction, all of them listed.
    """

    sample: int | None = None
    sample_beta: float | None = None
    select: str | None = None
    drop_top: str | None = None
    strength_from: tuple[str, ...] = ()
    weakest: str | None = None
    fitted: Bounds | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength_from", tuple(self.strength_from))
        raise_all(list(self._problems()), UsageError, "examples cannot be picked like that:")

    def _problems(self) -> Iterator[str]:
        if self.sample is not None and self.sample < 2:
            yield f"sample: {self.sample}; at least 2 responses make a preference"
        if self.sample_beta is not None and self.sample is None:
            yield "sample_beta is the temperature of sample: give that, too"
        if self.sample_beta is not None and not self.sample_beta >= 0:
            yield f"sample_beta: {self.sample_beta:g}; a temperature, 0 or more"
        if self.sample == 2 and self.select is not None:
            yield "sample 2 leaves a pair already: sample more to select from, or leave select out"
        for parse, text in ((check_select, self.select), (parse_top, self.drop_top), (parse_weakest, self.weakest)):
            try:
                _ = None if text is None else parse(text)
            except UsageError as error:
                yield str(error)
        if len(set(self.strength_from)) < len(self.strength_from):
            yield f"strength_from names each attribute once: {', '.join(self.strength_from)}"
        if bool(self.strength_from) != (self.weakest is not None):
            yield "strength_from says how strong a preference is, weakest what becomes of the weakest: give both"

    @property
    def acts(self) -> bool:
        """Whether anything may go or change."""
        return bool(self.sample or self.select or self.filters)

    @property
    def filters(self) -> bool:
        return self.drop_top is not None or self.weakest is not None

    # --- responses ---

    def narrow(self, example: Scored, *, seed: int) -> Scored | Dropped:
        """The example with the responses that stay, a selected pair chosen first. Unscored ones pass.

        Returns:
            A new example, or why there is none: the selected responses have equal scores.
        """
        scores = example.scores
        if scores is not None and self.sample is not None and self.sample < len(scores):
            beta = SAMPLE_BETA if self.sample_beta is None else self.sample_beta
            rng = _generator(seed, f"sample:{example.example_id}")
            example = take(example, sorted(rejection_sample(scores, self.sample, beta=beta, rng=rng)))
        if example.scores is None or self.select is None:
            return example
        rng = _generator(seed, f"select:{example.example_id}")
        pair = select_pair(example.scores, cast(Select, self.select), rng=rng)
        return Dropped(TIE, example.place) if pair is None else take(example, (pair.chosen, pair.rejected))

    # --- examples ---

    def fit(self, examples: Sequence[Scored]) -> Picking:
        """This picking with the bounds of its filters, from narrowed training examples; itself if it has them.

        Raises:
            ScoreError: no example has the column or the attributes, or a model gave one score to all.
        """
        if self.fitted is not None or not self.filters:
            return self
        highest = weakest = None
        deviations: dict[str, float] = {}
        if self.drop_top is not None:
            column, share = parse_top(self.drop_top)
            found = _usable(examples, lambda example: _highest(example, column))
            highest = highest_kept(_some(found, column, examples), share)
        if self.weakest is not None:
            for name in self.strength_from:
                values = [v for example in examples for v in example.attributes.get(name, ())]
                deviations[name] = named_standard(name, _some(values, name, examples)).std
            known = dataclasses.replace(self, fitted=Bounds(deviations=deviations))
            strengths = _some(_usable(examples, known._strength), "strength_from of pairs", examples)
            weakest = lowest_kept(strengths, parse_weakest(self.weakest)[1])
        return dataclasses.replace(self, fitted=Bounds(highest, weakest, deviations))

    def filter(self, example: Scored) -> Scored | Dropped:
        """The example, with its preference turned round where that was asked; or why it goes.

        Raises:
            DataError: it lacks the column or an attribute, or has more than two responses.
        """
        bounds = self.fitted or Bounds()
        if self.drop_top is not None and bounds.highest is not None:
            value = _highest(example, parse_top(self.drop_top)[0])
            if value > bounds.highest:
                return Dropped(TOP, example.place, f"{value:g} > {bounds.highest:g}")
        if self.weakest is not None and bounds.weakest is not None:
            strength = self._strength(example)
            if strength < bounds.weakest:
                drop = parse_weakest(self.weakest)[0] == "drop"
                return Dropped(WEAKEST, example.place, f"{strength:g} < {bounds.weakest:g}") if drop else _flip(example)
        return example

    def _strength(self, example: Scored) -> float:
        """Mean gap of the ensemble between the preferred response and the other, in standard deviations."""
        if len(example.responses) != 2:
            raise DataError("a list: strength is of pairs (make some with select)")
        missing = [name for name in self.strength_from if name not in example.attributes]
        if missing:
            raise DataError(f"no attribute {missing[0]!r}")
        turned = example.scores is not None and example.scores[0] < example.scores[1]
        deviations = (self.fitted or Bounds()).deviations
        own = [(example.attributes[name], deviations[name]) for name in self.strength_from]
        gaps = [(first - second) / deviation for (first, second), deviation in own]
        mean = round(float(preference_strength([gaps]).mean[0]), DECIMALS)
        return -mean if turned else mean

    # --- files ---

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe: what was given, and what was fitted. :meth:`from_dict` gives an equal picking back."""
        return {**given_fields(self), "fitted": None if self.fitted is None else dataclasses.asdict(self.fitted)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Picking:
        """The picking that ``as_dict`` wrote. DataError if it is damaged."""
        try:
            fitted = stored.get("fitted")
            return cls(**{**stored, "fitted": None if fitted is None else Bounds(**fitted)})
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"a damaged account of what was picked: {error}") from error


def check_select(text: str) -> None:
    """UsageError if it is no way to make a pair of a list here."""
    if text.startswith("max_min_p"):
        raise UsageError(
            f"select: {text!r}; goals are written of the scores, so take the length off those: length_penalty LAMBDA "
            "with select max_min"
        )
    if text not in MODES:
        raise UsageError(f"select: {text!r}; one of {', '.join(MODES)}")


def parse_top(text: str) -> tuple[str, float]:
    """``"ches:0.1"`` as column and share. UsageError otherwise."""
    column, _, number = text.rpartition(":")
    share = parse_number(number)
    if not column or share is None or not 0 < share < 1:
        raise UsageError(f"drop_top: {text!r}; COLUMN:SHARE with a share between 0 and 1, as ches:0.1")
    return column, share


def parse_weakest(text: str) -> tuple[str, float]:
    """``"flip:0.1"`` as what to do and with which share. UsageError otherwise."""
    action, _, number = text.partition(":")
    share = parse_number(number)
    if action not in ("drop", "flip") or share is None or not 0 < share < 1:
        raise UsageError(f"weakest: {text!r}; drop:SHARE or flip:SHARE with a share between 0 and 1, as flip:0.1")
    return action, share


def _generator(seed: int, key: str) -> np.random.Generator:
    """Draws that depend on the seed and the key alone."""
    digest = blake2b(f"{seed}:{key}".encode("utf8", "surrogatepass"), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _highest(example: Scored, column: str) -> float:
    """The example's number in a column, the highest of its responses'. DataError if it has none."""
    value = example.attributes.get(column, example.extras.get(column))
    numbers = [as_number(v) for v in (value if isinstance(value, tuple) else (value,))]
    found = [v for v in numbers if isinstance(v, float) and np.isfinite(v)]
    if not found or len(found) < len(numbers):
        raise DataError(f"no number in the column {column!r}")
    return max(found)


def _usable(examples: Sequence[Scored], measure: Any) -> list[float]:
    found = []
    for example in examples:
        try:
            found.append(measure(example))
        except DataError:  # counted where it is filtered
            continue
    return found


def _some(values: list[float], what: str, examples: Sequence[Scored]) -> list[float]:
    if values:
        return values
    have = sorted({name for example in examples for name in (*example.attributes, *example.extras)}) or ["none"]
    remedy = " (`mlxpref columns` computes it)" if what == "ches" else ""
    raise ScoreError(f"no example has {what}, which picks examples{remedy}; there is: {', '.join(have)}")


def take(example: Scored, places: Sequence[int]) -> Scored:
    """The example with these of its responses, in this order, and all that belongs to each of them."""
    n = len(example.responses)
    own = {name: v for name, v in example.extras.items() if per_response(v, n)}
    return dataclasses.replace(
        example,
        responses=tuple(example.responses[i] for i in places),
        scores=None if example.scores is None else tuple(example.scores[i] for i in places),
        attributes={name: tuple(values[i] for i in places) for name, values in example.attributes.items()},
        extras={**example.extras, **{name: tuple(v[i] for i in places) for name, v in own.items()}},
    )


def _flip(example: Scored) -> Scored:
    if example.scores is None:
        return take(example, (1, 0))
    return dataclasses.replace(example, scores=example.scores[::-1])
