"""From scores as they are to the examples whose scores become goals.

The order of operations: scores are made (``score_from`` and ``combine``, or ``direction``), then reduced by length
(``length_penalty``); of each list responses are taken (``sample``, then ``select``); then examples are filtered
(``drop_top``, ``weakest``). Goals are written after all of that, and ties and ``min_gap`` are theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxpref.data.picking import ASKED_FOR, TOP, WEAKEST, Picking, parse_weakest
from mlxpref.data.scoring import Scoring
from mlxpref.data.stored import gather
from mlxpref.data.words import counted
from mlxpref.errors import DataError, raise_all
from mlxpref.records import Counts, Dropped, Scored

SCORING = tuple(f.name for f in dataclasses.fields(Scoring) if f.name != "fitted")
PICKING = tuple(f.name for f in dataclasses.fields(Picking) if f.name != "fitted")
"""Options by the record that holds them; the same names in the library, the command and the configuration."""


@dataclass(frozen=True)
class Shaping:
    """Both halves of it. Nothing given: examples stay as they are.
    """

    scoring: Scoring = field(default_factory=Scoring)
    picking: Picking = field(default_factory=Picking)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Shaping:
        """From a mapping that may hold other options, too: the section ``relabel`` of a configuration, say."""
        return cls(
            Scoring(**{name: options[name] for name in SCORING if name in options}),
            Picking(**{name: options[name] for name in PICKING if name in options}),
        )

    def problems(self, *, ties: str = "drop", attributes: Sequence[str] = ()) -> Iterator[str]:
        """What contradicts how goals are to be written, in words with the remedy."""
        if ties == "keep" and self.picking.select is not None:
            yield "ties keep, but select drops pairs of equal scores: leave one of them out"
        weakest = self.picking.weakest
        if attributes and weakest is not None and parse_weakest(weakest)[0] == "flip":
            yield (
                f"weakest {weakest} exchanges the scores of a pair, and goals of several attributes are not of the "
                "score: use drop"
            )

    def as_dict(self) -> dict[str, Any]:
        """"scoring" and "picking" as they were used, JSON-safe, each only if it acts."""
        parts: dict[str, Scoring | Picking] = {"scoring": self.scoring, "picking": self.picking}
        return {name: part.as_dict() for name, part in parts.items() if part.acts}


@dataclass(frozen=True)
class Shaped:
    """What came of it.

    Attributes:
        splits: split → examples, in order.
        shaping: as fitted.
        counts: ``shape/train``, …: examples kept and dropped, and how many were turned round; empty if nothing was
            asked for.
        notes: what the user should look at, a sentence each.
    """

    splits: dict[str, Sequence[Scored]]
    shaping: Shaping
    counts: dict[str, Counts] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def shape_splits(
    splits: Mapping[str, Sequence[Scored]], shaping: Shaping, *, seed: int = 0, strict: bool = False
) -> Shaped:
    """Shape the examples of every split, fitted on "train" (else on the first).

    Args:
        strict: an example that cannot be used is an error; what was asked to go is not.

    Raises:
        ScoreError: what is needed for it is nowhere in the training examples.
        DataError: no example is left of a split, or ``strict`` and one cannot be used.
    """
    scoring, picking = shaping.scoring, shaping.picking
    if not (scoring.acts or picking.acts):
        return Shaped({**splits}, shaping)
    work = _Work({**splits})
    scoring = scoring.fit(work.training)
    work.through(scoring)
    work.through(lambda example: picking.narrow(example, seed=seed))
    picking = picking.fit(work.training)
    measured = len(work.training)
    work.through(picking.filter, changed=FLIPPED)
    if strict:
        raise_all(work.problems, DataError, f"{counted(len(work.problems), 'example')} cannot be used:")
    lines = [f"{name}: {line}" for name, own in work.splits.items() if not own for line in work.counts[name].lines()]
    raise_all(lines, DataError, "no example is left of a split:")
    for name, examples in work.splits.items():
        work.counts[name].kept = len(examples)
    fitted = Shaping(scoring, picking)
    notes = tuple(_notes(picking, work.counts[work.train], measured))
    return Shaped(work.splits, fitted, {f"shape/{name}": own for name, own in work.counts.items()}, notes)


FLIPPED = "preference turned round (weakest)"


class _Work:
    """The examples on their way, and what is counted there."""

    def __init__(self, splits: dict[str, Sequence[Scored]]) -> None:
        self.splits = splits
        self.train = "train" if "train" in splits else next(iter(splits))
        self.counts = {name: Counts() for name in splits}
        self.problems: list[str] = []

    @property
    def training(self) -> Sequence[Scored]:
        return self.splits[self.train]

    def through(self, step: Callable[[Scored], Scored | Dropped], changed: str | None = None) -> None:
        """Every example through one step; ``changed`` counts those that come out another."""
        self.splits = {name: gather(self._passed(step, name, rows, changed)) for name, rows in self.splits.items()}

    def _passed(
        self, step: Callable[[Scored], Scored | Dropped], name: str, examples: Sequence[Scored], changed: str | None
    ) -> Iterator[Scored]:
        for example in examples:
            result = _tried(step, example)
            if isinstance(result, Scored):
                if changed is not None and result is not example:
                    self.counts[name].notes[changed] = self.counts[name].notes.get(changed, 0) + 1
                yield result
                continue
            self.counts[name].drop(result)
            if result.reason not in ASKED_FOR:
                self.problems.append(f"{result.where}: {result.reason}")


def _tried(step: Callable[[Scored], Scored | Dropped], example: Scored) -> Scored | Dropped:
    try:
        return step(example)
    except DataError as error:
        return Dropped(str(error), example.place)


def _notes(picking: Picking, counts: Counts, measured: int) -> Iterator[str]:
    """Where values equal to a bound let fewer go than were asked to."""
    turned = counts.notes.get(FLIPPED, 0)
    gone = {picking.drop_top: counts.dropped.get(TOP, 0)}
    if picking.drop_top is None:  # else examples of the lowest strength may have gone before
        gone = {picking.weakest: counts.dropped.get(WEAKEST, 0) + turned}
    for text, n in gone.items():
        wanted = 0 if text is None else round(float(text.rpartition(":")[2]) * measured)
        if n < wanted:
            yield f"{text} meant {wanted} of {measured} examples and took {n}: the others are equal to some that stay"
