"""Sources in, relabelled splits out: read, part by prompt, fit the recipe once, relabel each split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxpref.data.recipe import Recipe
from mlxpref.data.relabel import check_options, fit_recipe, relabel_all, split_by_prompt
from mlxpref.data.sources import Source, SourceSpec, find_split, open_source, read_source
from mlxpref.errors import DataError, ScoreError, UsageError, raise_all
from mlxpref.records import Conditioned, Counts, Scored

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class RelabelledSplits:
    """What came of it.

    Attributes:
        splits: split → rows, halves of one example together.
        recipe: as fitted on the training examples, or as given.
        counts: ``read/train``, ``relabel/train``, …: examples kept and dropped.
        notes: what the user should look at, a sentence each.
    """

    splits: dict[str, list[Conditioned]]
    recipe: Recipe
    counts: dict[str, Counts]
    notes: tuple[str, ...]


def relabel_sources(
    specs: Sequence[SourceSpec],
    recipe: Recipe | Mapping[str, Any],
    *,
    fractions: Mapping[str, float] | None = None,
    strict: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> RelabelledSplits:
    """Relabel data from where they lie.

    Args:
        specs: one source or several, mixed by weight. Without a ``split`` each source's train, valid
            and test are all taken.
        recipe: one to use as it is, or the arguments to fit one with.
        fractions: parts of the training data to hold out, by prompt, before anything is relabelled.
        strict: a row that cannot be used, in reading or relabelling, is an error.
        say: gets what was detected, a line at a time.
        options: halves, ties, min_gap, plain_share and num_proc of
            :func:`mlxpref.data.relabel.relabel_all`.

    Raises:
        UsageError: options out of range, or a fraction for a split the data have themselves.
        DataError: see :func:`mlxpref.data.sources.read_source`; ScoreError: nothing is scored.
    """
    check_options(**options)
    examples, counts = _read(specs, strict=strict, seed=seed, say=say)
    if fractions:
        examples = _held_out(examples, fractions, seed)
    fitted_on = examples.get("train") or next(iter(examples.values()))
    fitted = recipe if isinstance(recipe, Recipe) else fit_recipe(fitted_on, **recipe)
    if all(example.scores is None and not example.attributes for example in fitted_on):
        raise ScoreError(
            "the data have no scores, so there is no goal to write (name their column with --score)"
        )
    rows: dict[str, list[Conditioned]] = {}
    empty = []
    for name, found in examples.items():
        rows[name], counts[f"relabel/{name}"] = relabel_all(
            found, fitted, strict=strict, seed=seed, **options
        )
        if not rows[name]:
            empty += [f"{name}: {line}" for line in counts[f"relabel/{name}"].lines()]
    raise_all(empty, DataError, "no row is left of a split:")
    every = [example for found in examples.values() for example in found]
    notes = [*_notes(every), *(() if isinstance(recipe, Recipe) else _scale_notes(every, fitted))]
    return RelabelledSplits(rows, fitted, counts, tuple(notes))


def _read(
    specs: Sequence[SourceSpec], *, strict: bool, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, list[Scored]], dict[str, Counts]]:
    """split → examples, ``read/split`` → counts."""
    opened = [open_source(spec) for spec in specs]
    for line in (line for source in opened for line in source.said):
        say(line)
    wanted: dict[str, list[Source]] = {}
    for source in opened:
        for name in _splits_of(source):
            wanted.setdefault(name, []).append(_at(source, name))
    examples, counts = {}, {}
    for name in (split for split in SPLITS if split in wanted):
        examples[name], counts[f"read/{name}"] = read_source(wanted[name], strict=strict, seed=seed)
    return examples, counts


def _splits_of(source: Source) -> list[str]:
    """Our names of the splits to take from a source: the one it was opened at, or all it has."""
    own = [name for name in SPLITS if find_split(name, (source.split,))] or ["train"]
    if source.spec.split is not None:
        return own
    return [name for name in SPLITS if find_split(name, source.splits)] or own


def _at(source: Source, name: str) -> Source:
    """The source, opened at its split of this name."""
    there = find_split(name, source.splits)
    if source.spec.split is not None or there in (None, source.split):
        return source
    return open_source(dataclasses.replace(source.spec, split=there))


def _held_out(
    examples: dict[str, list[Scored]], fractions: Mapping[str, float], seed: int
) -> dict[str, list[Scored]]:
    there = [name for name in fractions if name in examples]
    if there or "train" not in examples:
        raise UsageError(
            f"the data have their own {', '.join(there or examples)}: a fraction parts training data into "
            "splits that are not there (choose what to read with --split)"
        )
    rest = {name: rows for name, rows in examples.items() if name != "train"}
    return split_by_prompt(examples["train"], fractions=fractions, seed=seed) | rest


def _notes(examples: Sequence[Scored]) -> Iterator[str]:
    unscored = sum(e.scores is None and not e.attributes for e in examples)
    if unscored:
        yield f"{unscored} examples have no scores and pass through without a goal"
    pairs = [e.scores for e in examples if e.scores is not None and len(e.scores) == 2]
    turned = sum(scores[0] < scores[1] for scores in pairs)
    if turned:
        yield f"in {turned} pairs the data's chosen response has the lower score; the score decides"


def _scale_notes(examples: Sequence[Scored], recipe: Recipe) -> Iterator[str]:
    """What is doubtful about a scale nobody declared.

    A map over the range seen hangs on its two extremes; scores taken as they are that fill only the
    lower half of the prompt's scale are probably on another one.
    """
    if recipe.score_range is not None:
        return
    scale = "the prompt's scale, {:g}-{:g}".format(*recipe.goal_range)
    remedy = "if their scale is another, say so: --score-range LOW HIGH"
    maps = recipe.attribute_mappings or {"score": recipe.mapping}
    for name, fitted in maps.items():
        if fitted.kind == "affine":
            seen = f"{fitted.knots[0][0]:g} to {fitted.knots[-1][0]:g}"
            yield f"{name}: the scale seen, {seen}, is stretched onto {scale}; {remedy}"
    goals = [g for e in examples for own in _goals(e, recipe) for g in own]
    as_they_are = all(fitted.kind == "identity" for fitted in maps.values())
    if as_they_are and goals and max(goals) <= sum(recipe.goal_range) / 2:
        seen = f"{min(goals):g} to {max(goals):g}"
        yield f"scores go from {seen} and are taken as they are on {scale}; {remedy}"


def _goals(example: Scored, recipe: Recipe) -> tuple[tuple[float, ...], ...]:
    try:
        return recipe.goals(example) or ()
    except DataError:  # counted where it is relabelled
        return ()
