"""Any data set as :class:`Scored`: detected, checked at this door, trusted afterwards.

A source is a table of raw rows (``tables.py``) read through a format (``formats.py``). Here lies what
is the same for all of them: which columns mean what, what makes a row unusable, the id of an
example, and several sources together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, groupby, islice
from typing import Any

import numpy as np

from mlxpref.data.door import LEFT_OUT, SCORE_REASONS, checked, unlike
from mlxpref.data.drafts import ALIASES, CARRIED, Draft, Format, as_number
from mlxpref.data.formats import FORMATS, get_format
from mlxpref.data.messages import Unusable
from mlxpref.data.readers import Rows
from mlxpref.data.scale import Range
from mlxpref.data.stored import gather
from mlxpref.data.tables import SourceSpec, Table, find_split, open_table
from mlxpref.data.words import counted
from mlxpref.errors import DataError, ScoreError, UsageError, raise_all
from mlxpref.records import Counts, Dropped, Message, Scored

__all__ = ["Source", "SourceSpec", "find_split", "open_source", "parse_columns", "read_source"]

PEEK = 100
"""Rows looked at to learn the columns of a file that has no header."""

STRICT_SHOWN = 10
"""Problems listed by a strict reading."""


def parse_columns(text: str) -> dict[str, str]:
    """``"prompt=question,chosen=best"`` as a mapping of our column names to the data's."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    wrong = [f"{ours}{sign}{theirs}" for ours, sign, theirs in pairs if not (ours.strip() and theirs.strip())]
    if wrong:
        raise UsageError(f"--columns {wrong[0]!r} is not of the form ours=theirs, as in prompt=question")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def open_source(spec: SourceSpec) -> Source:
    """Find the data, detect their format, and check columns and score before any row is converted.

    Raises:
        DataError: nothing there, unreadable, empty, or columns that are missing.
        UsageError: an unknown format, column or option.
    """
    table = open_table(spec)
    peeked = [row for _, row in islice(table.rows(), PEEK)]
    if not peeked:
        raise DataError(f"{spec.path}: empty, there is no row in it")
    keys = (key for row in peeked if isinstance(row, Mapping) for key in row)
    theirs = list(dict.fromkeys([*(table.columns or ()), *keys]))
    if not theirs:
        raise DataError(
            f"{spec.path}: rows must be objects with named columns; the first is {type(peeked[0]).__name__}"
        )
    columns = _column_map(spec, theirs)
    present = frozenset((*theirs, *columns))
    chosen = _choose_format(spec, present)
    return Source(spec, table, chosen, columns, present)


def _column_map(spec: SourceSpec, theirs: Sequence[str]) -> dict[str, str]:
    """Our names -> the data's: what ``--columns`` says, and an alias where our own name is missing."""
    columns = dict(spec.columns or {})
    known = {*CARRIED}
    for entry in [get_format(spec.format)] if spec.format else FORMATS.values():
        known |= {*entry.needs, *entry.takes}
    problems = [
        f"{ours!r} is not a column of ours{_near(ours, known)} ({', '.join(sorted(known))})"
        for ours in columns
        if ours not in known
    ] + [
        f"{name!r} is not in the data{_near(name, theirs)} ({', '.join(theirs)})"
        for name in columns.values()
        if name not in theirs
    ]
    raise_all(problems, UsageError, f"{spec.path}: --columns takes ours=theirs, and")
    for ours, aliases in ALIASES.items():
        if ours not in theirs and ours not in columns:
            found = next((name for name in aliases if name in theirs), None)
            if found is not None:
                columns[ours] = found
    return columns


def _near(name: str, among: Sequence[str] | set[str]) -> str:
    near = get_close_matches(name, sorted(among), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _choose_format(spec: SourceSpec, columns: frozenset[str]) -> Format:
    if {"goal", "half", "chosen"} <= columns:
        raise DataError(
            f"{spec.path}: these rows are relabelled already (columns goal and half); give the folder "
            "`mlxpref relabel` wrote, or the data it was made from"
        )
    if spec.format:
        wanted = get_format(spec.format)
        lacking = [name for name in wanted.needs if name not in columns]
        if lacking:
            raise DataError(_missing(spec, columns, wanted, lacking))
        return wanted
    found = next((entry for entry in FORMATS.values() if entry.fits(columns)), None)
    if found is None:
        raise DataError(_unrecognised(spec, columns))
    return found


def _unrecognised(spec: SourceSpec, columns: frozenset[str]) -> str:
    """What the nearest format lacks; when no format has any column in common, what each needs."""
    general_first = reversed(FORMATS.values())
    lacks = {entry: [name for name in entry.needs if name not in columns] for entry in general_first}
    nearest = max(lacks, key=lambda entry: (len(entry.needs) - len(lacks[entry]), -len(lacks[entry])))
    if len(lacks[nearest]) < len(nearest.needs):
        return _missing(spec, columns, nearest, lacks[nearest])
    known = "; ".join(f"{entry.name} ({', '.join(entry.needs)})" for entry in FORMATS.values())
    return (
        f"{spec.path}: no known format fits the columns {', '.join(sorted(columns))}. Known: {known}. "
        "Say which column is which: --columns prompt=NAME,chosen=NAME,rejected=NAME"
    )


def _missing(spec: SourceSpec, columns: frozenset[str], wanted: Format, lacking: Sequence[str]) -> str:
    asked = "format" if spec.format else "no known format fits; nearest is"
    return (
        f"{spec.path}: {asked} {wanted.name!r}, which needs the columns {', '.join(wanted.needs)}; "
        f"missing: {', '.join(lacking) or 'a score'}. The data have: {', '.join(sorted(columns))}. "
        f"Say which column is which: --columns {(lacking or ['score'])[0]}=NAME"
    )


class Source:
    """One data set, opened; iterating it gives one example or one counted drop after the other.

    Every pass starts over and gives the same. Rows of a list that lose single responses give a
    ``Dropped`` for each of those, beside the ``Scored`` with the rest.

    Attributes:
        spec: what was asked for.
        format: name of the format.
        scales: lowest and highest possible value, in the data's units, of each score whose format fixes them.
        said: what was detected, in words, a line each.
        split, splits: the split that is read; all there are.
    """

    def __init__(
        self,
        spec: SourceSpec,
        table: Table,
        form: Format,
        columns: Mapping[str, str],
        present: frozenset[str],
    ) -> None:
        self.spec, self.format = spec, form.name
        self.split, self.splits = table.split, table.splits
        self._table, self._format, self._columns, self._present = table, form, columns, present
        self.scales: dict[str, Range] = {}
        self._score, attributes = self._peek()
        self.said = tuple(self._describe(attributes))

    @property
    def scale(self) -> Range | None:
        """The scale of the score, in the data's units; None where the format fixes none."""
        return self.scales.get(self._score or "")

    def __iter__(self) -> Iterator[Scored | Dropped]:
        return self.read(set())

    def read(self, taken: set[str]) -> Iterator[Scored | Dropped]:
        """All examples; ``taken`` holds the ids used so far and gets the new ones."""
        left = self.spec.limit
        for where, row in self._rows():
            if left is not None:
                if left == 0:
                    return
                left -= 1
            try:
                draft = self._draft(row)
                scored, left_out = checked(draft, row, score=self._score, taken=taken)
            except Unusable as unusable:
                yield Dropped(unusable.reason, where, unusable.detail)
                continue
            for fault in left_out:
                yield Dropped(LEFT_OUT + fault.reason, where, fault.detail)
            yield dataclasses.replace(scored, where=where)

    # --- rows ---

    def _rows(self) -> Rows:
        """Rows under our column names; for a grouped format the rows of one group as one."""
        rows = ((where, self._renamed(row)) for where, row in self._table.rows())
        key = self._format.group_by
        if key is None:
            return rows
        groups = groupby(rows, key=lambda pair: pair[1].get(key) if isinstance(pair[1], Mapping) else pair[0])
        return (_merged(list(group)) for _, group in groups)

    def _renamed(self, row: Any) -> Any:
        if not isinstance(row, Mapping) or not self._columns:
            return row
        return {**row, **{ours: row.get(theirs) for ours, theirs in self._columns.items()}}

    def _draft(self, row: Any) -> Draft:
        if not isinstance(row, Mapping):
            raise Unusable("row is not an object", type(row).__name__)
        lacking = [name for name in self._format.needs if name not in row]
        if lacking:
            raise Unusable(f"missing column: {', '.join(lacking)}")
        columns = self._present if row.keys() <= self._present else self._present.union(row)
        draft = self._format.read(row, columns)
        system = row.get("system")
        if isinstance(system, str) and system.strip() and draft.prompt and draft.prompt[0].role != "system":
            draft.prompt.insert(0, Message("system", system))
        return draft

    # --- detection ---

    def _peek(self) -> tuple[str | None, list[str]]:
        """Name of the score and the attributes, as the first readable rows have them; notes the scales.

        Raises:
            UsageError: the score asked for is not among them.
        """
        names: dict[str, None] = {}
        default: str | None = None
        for _, row in islice(self._rows(), PEEK):
            try:
                draft = self._draft(row)
            except Unusable:
                continue
            default = default or draft.score
            for name, (low, high) in draft.scales.items():
                known = self.scales.get(name, (low, high))
                self.scales[name] = float(min(low, known[0])), float(max(high, known[1]))
            names |= dict.fromkeys(
                name
                for answer in draft.answers
                for name, value in answer.attributes.items()
                if isinstance(as_number(value), float)
            )
        wanted = self.spec.score
        if wanted is not None and wanted != default and wanted not in names:
            there = [*([default] if default else []), *names]
            raise UsageError(
                f"{self.spec.path}: --score {wanted!r} is not in the data{_near(wanted, there)} "
                f"(there is: {', '.join(there) or 'none, they are unscored'})"
            )
        return wanted or default, list(names)

    def _describe(self, attributes: Sequence[str]) -> Iterator[str]:
        how = "as asked" if self.spec.format else "detected"
        yield f"{self.spec.path}: format {self.format} ({how}): {self._format.summary}"
        others = [name for name in self.splits if name != self.split]
        yield f"split {self.split}" + (f" (there are also {', '.join(others)})" if others else "")
        for ours, theirs in self._columns.items():
            yield f"{ours} is read from the column {theirs!r}"
        if self._score is None:
            yield "no scores: the pairs are unscored, and can only be trained on without goals"
        else:
            scale = "" if self.scale is None else ", on a scale of {:g}-{:g}".format(*self.scale)
            yield f"score: {self._score}, higher is better{scale}"
        if attributes:
            yield f"attributes: {', '.join(attributes)}"


def _merged(group: Sequence[tuple[str, Any]]) -> tuple[str, Any]:
    where, first = group[0]
    if not isinstance(first, Mapping):
        return where, first
    return where, {**first, "rows": [row for _, row in group]}


# --- several together ------------------------------------------------------------------------------


def read_source(
    specs: SourceSpec | Source | Sequence[SourceSpec | Source], *, strict: bool = False, seed: int = 0
) -> tuple[Sequence[Scored], Counts]:
    """All examples of one or several sources, in their order, with the count of what was dropped.

    A source of weight w gives each of its usable examples floor(w) times, and a random share of them,
    w - floor(w), once more, in the order of the data; which ones depends on ``seed`` alone. A repeated
    example's id ends in "#2", "#3", …, so ids stay unique. Left out by a weight counts as dropped.

    Args:
        strict: any unusable row or response is an error.

    Raises:
        DataError: a source cannot be read; nothing usable in it; ``strict`` and something unusable,
            listing the first ten (ScoreError if all of them are about scores).
    """
    given = [specs] if isinstance(specs, SourceSpec | Source) else list(specs)
    sources = [entry if isinstance(entry, Source) else open_source(entry) for entry in given]
    counts, taken = Counts(), set[str]()
    parts: list[Sequence[Scored]] = []
    problems: list[Dropped] = []

    def passed(source: Source, own: Counts) -> Iterator[Scored]:
        for row in source.read(taken):
            if isinstance(row, Scored):
                yield row
            else:
                own.drop(row)
                counts.drop(row)
                if strict:
                    problems.append(row)

    for place, source in enumerate(sources):
        own = Counts()
        usable = gather(passed(source, own))
        if not usable:
            raise_all(list(own.lines()), DataError, f"{source.spec.path}: no row of it can be used")
        mixed = _weighted(usable, source.spec.weight, np.random.default_rng([seed, place]), taken)
        if len(mixed) < len(usable):
            reason = f"left out by weight {source.spec.weight:g} of {source.spec.path}"
            counts.dropped[reason] = counts.dropped.get(reason, 0) + len(usable) - len(mixed)
        parts.append(mixed)
    if strict and problems:
        _raise_strict(problems)
    examples = parts[0] if len(parts) == 1 else gather(chain.from_iterable(parts))
    if not examples:
        raise DataError("no example is left: the weights of the sources are too small for their rows")
    counts.kept = len(examples)
    return examples, counts


def _weighted(
    rows: Sequence[Scored], weight: float, rng: np.random.Generator, taken: set[str]
) -> Sequence[Scored]:
    whole, part = divmod(weight, 1)
    again = np.sort(rng.permutation(len(rows))[: round(part * len(rows))])
    if whole == 1 and not len(again):
        return rows

    def picked() -> Iterator[Scored]:
        yield from rows if whole else ()
        for extra in [*(rows for _ in range(int(whole) - 1)), (rows[i] for i in again)]:
            for row in extra:
                if whole:
                    row = dataclasses.replace(row, example_id=unlike(row.example_id, taken))
                    taken.add(row.example_id)
                yield row

    return gather(picked())


def _raise_strict(problems: Sequence[Dropped]) -> None:
    shown = problems[:STRICT_SHOWN]
    lines = [f"{row.where}: {row.reason}" + (f" ({row.detail})" if row.detail else "") for row in shown]
    if len(problems) > STRICT_SHOWN:
        lines.append(f"… and {len(problems) - STRICT_SHOWN} more")
    about_scores = all(row.reason.removeprefix(LEFT_OUT) in SCORE_REASONS for row in problems)
    raise_all(
        lines,
        ScoreError if about_scores else DataError,
        f"{counted(len(problems), 'row')} cannot be used; mend the data, or leave --strict out to drop and "
        "count such rows",
    )
