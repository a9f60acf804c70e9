"""Sources in, conditioned splits out: read, part by prompt, shape, fit the recipe once, relabel each split.

The one pipeline of `mlxpref relabel` and of training. What a split is read from is chosen before it,
by :func:`own_splits` or by the configuration of a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxpref.data.cards import column_cards
from mlxpref.data.formats import FORMATS
from mlxpref.data.picking import Picking
from mlxpref.data.recipe import OVERALL, Recipe
from mlxpref.data.relabel import check_options, fit_recipe, relabel_all, split_by_prompt, unconditioned
from mlxpref.data.scoring import Scoring
from mlxpref.data.shaping import PICKING, SCORING, Shaping, shape_splits
from mlxpref.data.sources import Source, SourceSpec, find_split, open_source, read_source
from mlxpref.data.stored import Joined, gather
from mlxpref.errors import DataError, ScoreError, UsageError, raise_all
from mlxpref.records import Conditioned, Counts, Scored
from mlxpref.rewards.directions import direction_words

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class RelabelledSplits:
    """What came of it.

    Attributes:
        splits: split → rows, halves of one example together; some thousands are a list, more lie on disk.
        recipe: as fitted on the training examples, or as given; None if no row states a goal.
        counts: ``read/train``, ``shape/train`` (where something was), ``relabel/train``, …: examples kept and dropped.
        notes: what the user should look at, a sentence each.
        options: what the rows were made from and with, JSON-safe: "sources", "seed", the options of
            ``relabel_all`` that were given, "scoring" and "picking" as fitted, where they act, and "columns", how
            those that models computed were made (:mod:`mlxpref.data.cards`), where there are some.
    """

    splits: dict[str, Sequence[Conditioned]]
    recipe: Recipe | None
    counts: dict[str, Counts]
    notes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def relabel_sources(
    specs: Sequence[SourceSpec],
    recipe: Recipe | Mapping[str, Any],
    *,
    fractions: Mapping[str, float] | None = None,
    scoring: Scoring | Mapping[str, Any] | None = None,
    picking: Picking | Mapping[str, Any] | None = None,
    strict: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> RelabelledSplits:
    """Relabel data from where they lie: :func:`relabel_splits` of each source's own splits.

    Args:
        specs: one source or several, mixed by weight. Without a ``split`` each source's train, valid
            and test are all taken.
        say: gets what was detected, a line at a time.
    """
    arguments, shaping = _shaping(recipe, scoring, picking, options)
    opened = [open_source(spec) for spec in specs]
    for line in (line for source in opened for line in source.said):
        say(line)
    return relabel_splits(
        own_splits(opened),
        arguments,
        fractions=fractions,
        scoring=shaping.scoring,
        picking=shaping.picking,
        strict=strict,
        seed=seed,
        **options,
    )


def own_splits(opened: Sequence[Source]) -> dict[str, list[Source]]:
    """Split → the sources to read it from: of each source the split that was asked for, else all it has."""
    wanted: dict[str, list[Source]] = {}
    for source in opened:
        for name in _splits_of(source):
            wanted.setdefault(name, []).append(at_split(source, name))
    return wanted


def _splits_of(source: Source) -> list[str]:
    own = [name for name in SPLITS if find_split(name, (source.split,))] or ["train"]
    if source.spec.split is not None:
        return own
    return [name for name in SPLITS if find_split(name, source.splits)] or own


def at_split(source: Source, name: str) -> Source:
    """The source, opened at its split of this name; as it is if it was asked for another, or has none."""
    there = find_split(name, source.splits)
    if source.spec.split is not None or there in (None, source.split):
        return source
    return open_source(dataclasses.replace(source.spec, split=there))


def relabel_splits(
    wanted: Mapping[str, Sequence[Source]],
    recipe: Recipe | Mapping[str, Any] | None,
    *,
    fractions: Mapping[str, float] | None = None,
    scoring: Scoring | Mapping[str, Any] | None = None,
    picking: Picking | Mapping[str, Any] | None = None,
    strict: bool = False,
    seed: int = 0,
    **options: Any,
) -> RelabelledSplits:
    """Read each split, hold out what is asked, shape and fit the recipe on the training examples, relabel.

    Args:
        wanted: split → its sources, mixed by weight.
        recipe: one to use as it is, or the arguments to fit one with; None leaves every row without a goal. Among
            the arguments may be the fields of a scoring and a picking, as in the section ``relabel`` of a run.
        fractions: parts of the training data to hold out, by prompt, before anything is relabelled.
        scoring, picking: how scores are made, and what stays (:mod:`mlxpref.data.shaping` has the order); as
            values, or as a relabelled folder's options hold them.
        strict: a row that cannot be used, in reading or relabelling, is an error.
        options: halves, ties, min_gap, plain_share and num_proc of
            :func:`mlxpref.data.relabel.relabel_all`.

    Raises:
        UsageError: options out of range or in contradiction, or a fraction for a split the data have themselves.
        DataError: see :func:`mlxpref.data.sources.read_source`, or no row is left of a split.
        ScoreError: nothing is scored, or the sources' scores are on different scales.
    """
    given, shaping = _shaping(recipe, scoring, picking, options)
    fitted = _with_scale(given, wanted, shaping.scoring) if isinstance(given, Mapping) else given
    examples: dict[str, Sequence[Scored]] = {}
    counts: dict[str, Counts] = {}
    for name in (split for split in SPLITS if split in wanted):
        examples[name], counts[f"read/{name}"] = read_source(wanted[name], strict=strict, seed=seed)
    if fractions:
        examples = _held_out(examples, fractions, seed)
    shaped = shape_splits(examples, shaping, seed=seed, strict=strict)
    examples = shaped.splits
    counts |= shaped.counts
    stored = {"sources": _described(wanted), "seed": seed} | shaped.shaping.as_dict()
    cards = _cards(wanted)
    if fitted is None:
        plain = {name: gather(map(unconditioned, found)) for name, found in examples.items()}
        return RelabelledSplits(plain, None, counts, shaped.notes, stored | ({"columns": cards} if cards else {}))
    used = _fit(examples.get("train") or next(iter(examples.values())), fitted)
    rows: dict[str, Sequence[Conditioned]] = {}
    for name, found in examples.items():
        rows[name], counts[f"relabel/{name}"] = relabel_all(found, used, strict=strict, seed=seed, **options)
    lines = [
        f"{name}: {line}" for name in rows if not rows[name] for line in counts[f"relabel/{name}"].lines()
    ]
    raise_all(lines, DataError, "no row is left of a split:")
    every = Joined(*examples.values())
    named = all("chosen" in FORMATS[source.format].needs for found in wanted.values() for source in found)
    notes = (*shaped.notes, *_notes(every, named_chosen=named))
    notes += tuple(_scale_notes(every, used)) if isinstance(recipe, Mapping) else ()
    plain_only = options.get("plain_share") == 1
    kept = {name: value for name, value in options.items() if name != "num_proc"}
    if cards:
        stored["columns"] = cards if plain_only else [{**card, "goals": False} for card in cards]
    return RelabelledSplits(rows, None if plain_only else used, counts, notes, stored | kept)


def _shaping(
    recipe: Recipe | Mapping[str, Any] | None,
    scoring: Scoring | Mapping[str, Any] | None,
    picking: Picking | Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> tuple[Recipe | Mapping[str, Any] | None, Shaping]:
    """The recipe's own arguments, and the shaping, all checked: nothing was read so far.

    Raises:
        UsageError: options out of range, or in contradiction.
    """
    check_options(**options)
    given = Scoring.from_dict(scoring) if isinstance(scoring, Mapping) else scoring
    picked = Picking.from_dict(picking) if isinstance(picking, Mapping) else picking
    shaping = Shaping(given or Scoring(), picked or Picking())
    if isinstance(recipe, Mapping):
        own = Shaping.of(recipe)
        if own.as_dict() and (given or picked):
            raise UsageError("how scores are made and picked is said twice: among the recipe's arguments, and beside")
        shaping = own if own.as_dict() else shaping
        recipe = {name: value for name, value in recipe.items() if name not in (*SCORING, *PICKING)}
        if shaping.scoring.direction is not None:
            recipe |= {"called": f"Weighted rating {direction_words(shaping.scoring.weights)}"}
    attributes = recipe.attributes if isinstance(recipe, Recipe) else (recipe or {}).get("attributes") or ()
    problems = list(shaping.problems(ties=options.get("ties", "drop"), attributes=attributes))
    raise_all(problems, UsageError, "options contradict each other:")
    return recipe, shaping


def _fit(examples: Sequence[Scored], recipe: Recipe | Mapping[str, Any]) -> Recipe:
    if all(example.scores is None and not example.attributes for example in examples):
        raise ScoreError(
            "the data have no scores, so there is no goal to write: name their columns with --columns "
            "(of pairs score_chosen=…,score_rejected=…), or train on them as they are, leaving --relabel out"
        )
    return recipe if isinstance(recipe, Recipe) else fit_recipe(examples, **recipe)


def _held_out(
    examples: dict[str, Sequence[Scored]], fractions: Mapping[str, float], seed: int
) -> dict[str, Sequence[Scored]]:
    there = [name for name in fractions if name in examples]
    if there or "train" not in examples:
        raise UsageError(
            f"the data have their own {', '.join(there or examples)}: a fraction parts training data into "
            "splits that are not there (choose what to read with --split)"
        )
    rest = {name: rows for name, rows in examples.items() if name != "train"}
    return split_by_prompt(examples["train"], fractions=fractions, seed=seed) | rest


def _described(wanted: Mapping[str, Sequence[Source]]) -> list[dict[str, Any]]:
    """What each split was read from: what was asked of the source, and the name of the split there."""
    given = [(source.spec, source.split) for sources in wanted.values() for source in sources]
    defaults = {entry.name: entry.default for entry in dataclasses.fields(SourceSpec)}
    return [
        {key: getattr(spec, key) for key in defaults if getattr(spec, key) != defaults[key]} | {"split": split}
        for spec, split in given
    ]


def _cards(wanted: Mapping[str, Sequence[Source]]) -> list[dict[str, Any]]:
    """How the sources' computed columns were made, each folder's once."""
    paths = dict.fromkeys(source.spec.path for sources in wanted.values() for source in sources)
    return [dict(card) for path in paths for card in column_cards(path)]


# --- scales ---


def _with_scale(
    arguments: Mapping[str, Any], wanted: Mapping[str, Sequence[Source]], scoring: Scoring
) -> Mapping[str, Any]:
    """Arguments of ``fit_recipe`` whose score range, if none is given, is the one the formats declare.

    Scores that were made of others are on those others' scale, or on none that is known.
    """
    names = [name for name in arguments.get("attributes") or () if name != OVERALL]
    if arguments.get("score_range") is not None or not (names or scoring.keeps_units):
        return arguments
    names = names or [None if name == OVERALL else name for name in scoring.names]
    sources = [source for found in wanted.values() for source in found]
    scales = {
        (source.spec.path, name): source.scales.get(name) if name else source.scale
        for source in sources
        for name in names or [None]
    }
    distinct = set(scales.values())
    if None in distinct or not distinct:
        return arguments
    if len(distinct) > 1:
        listed = "; ".join(
            f"{path}{f', {name}' if name else ''}: {scale[0]:g}-{scale[1]:g}"
            for (path, name), scale in scales.items()
            if scale
        )
        raise ScoreError(
            f"scores on different scales cannot share a map ({listed}): bring them to one scale first, or "
            "declare one score_range that is true of all"
        )
    return {**arguments, "score_range": next(iter(distinct))}


def _notes(examples: Sequence[Scored], *, named_chosen: bool) -> Iterator[str]:
    """``named_chosen``: the first response of a pair is the one its data call chosen."""
    unscored = turned = 0
    for example in examples:
        scores = example.scores
        unscored += scores is None and not example.attributes
        turned += scores is not None and len(scores) == 2 and scores[0] < scores[1]
    if unscored:
        yield f"{unscored} {'example has' if unscored == 1 else 'examples have'} no scores and no goal"
    if turned and named_chosen:
        what = "pair" if turned == 1 else "pairs"
        yield f"in {turned} {what} the data's chosen response has the lower score; the score decides"


def _scale_notes(examples: Sequence[Scored], recipe: Recipe) -> Iterator[str]:
    """What is doubtful about a scale nobody declared.

    A map over the range seen hangs on its two extremes; scores taken as they are that fill only the
    lower half of the prompt's scale are probably on another one.
    """
    if recipe.score_range is not None:
        return
    scale = "the prompt's scale, {:g}-{:g}".format(*recipe.goal_range)
    remedy = "if their scale is another, declare it (--score-range LOW HIGH, in a configuration score_range)"
    maps = recipe.attribute_mappings or {"score": recipe.mapping}
    for name, fitted in maps.items():
        if fitted.kind == "affine":
            seen = f"{fitted.knots[0][0]:g} to {fitted.knots[-1][0]:g}"
            yield f"{name}: the scale seen, {seen}, is stretched onto {scale}; {remedy}"
    if not all(fitted.kind == "identity" for fitted in maps.values()):
        return
    lowest, highest = math.inf, -math.inf
    for goal in (goal for example in examples for own in _goals(example, recipe) for goal in own):
        lowest, highest = min(lowest, goal), max(highest, goal)
    if -math.inf < highest <= sum(recipe.goal_range) / 2:
        seen = f"{lowest:g} to {highest:g}"
        yield f"scores go from {seen} and are taken as they are on {scale}; {remedy}"


def _goals(example: Scored, recipe: Recipe) -> tuple[tuple[float, ...], ...]:
    try:
        return recipe.goals(example) or ()
    except DataError:  # counted where it is relabelled
        return ()
