"""From the data sections of a configuration to tokenized rows: read, condition, split, tokenize.

What was found and what was dropped is gathered on the way; nothing here loads a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlxpref.config import Config, RelabelSection
from mlxpref.data.cards import Made
from mlxpref.data.columns import texts_of
from mlxpref.data.goal_template import check_states_none
from mlxpref.data.recipe import Recipe, resolve_carrier
from mlxpref.data.relabel_sources import RelabelledSplits, relabel_splits
from mlxpref.data.relabelled import Relabelled, is_relabelled, read_relabelled
from mlxpref.data.sources import Source, SourceSpec, find_split, open_source
from mlxpref.data.splitting import Leaks
from mlxpref.data.stored import IN_MEMORY
from mlxpref.data.supply import Rows, supply
from mlxpref.data.tokenization import load_tokenizer, tokenize_all
from mlxpref.data.tokens import Limits
from mlxpref.errors import ConfigError, DataError, raise_all
from mlxpref.records import Conditioned, Counts, Tokenized

WRITTEN_WITH = ("halves", "ties", "min_gap", "plain_share", "seed", "scoring", "picking")
"""What a relabelled folder says of how, besides its recipe, other rows become like its own."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows ready to be planned.

    Attributes:
        train, valid: tokenized rows; ``valid`` is empty where there are none. Some thousands are a tuple; more lie on
            disk, are read when they are asked for, and keep their lengths at hand (``data.sizes``).
        recipe: how goals were written; None for unconditioned rows.
        counts: rows kept and dropped, by split and stage, in order.
        said: what was detected, in words.
        fingerprint: hash of every id, score, goal and weight, in order.
        groups: the distinct values of the column ``group``, whose places in here are the column ``groups``;
            () where nothing asked for it.
        scoring: how scores were made before they became goals, as ``Scoring.as_dict`` has it; None if as they are.
    """

    train: Sequence[Tokenized]
    valid: Sequence[Tokenized]
    recipe: Recipe | None
    counts: Mapping[str, Counts]
    said: tuple[str, ...]
    fingerprint: str
    groups: tuple[str, ...] = ()
    scoring: Mapping[str, Any] | None = None


@dataclass(slots=True)
class _Found:
    """What a preparation gathers on its way."""

    said: list[str] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=dict)
    recipe: Recipe | None = None
    scoring: Mapping[str, Any] | None = None
    columns: list[Made] = field(default_factory=list)
    groups: tuple[str, ...] = ()


def prepare(config: Config, *, tokenizer: Any = None, needs: Collection[str] = ()) -> Prepared:
    """Tokenized training and validation rows of a configuration.

    Args:
        tokenizer: to use instead of loading the model's.
        needs: columns and further texts an objective asks for, by the names it declares; they are in the rows
            then. Those that the steps make (``reference``, ``lengths``, …) are no matter here.

    Raises:
        ConfigError: the data sections contradict what the source is.
        DataError: the source cannot be read, rows lack what is needed, or nothing is left to train on.
        ModelError: the model folder has no tokenizer.
    """
    found = _Found()
    relabelled = isinstance(config.data.source, str) and is_relabelled(config.data.source)
    if relabelled:
        raise_all(_unused_beside_relabelled(config), ConfigError, f"{config.data.source} is relabelled already:")
    if tokenizer is None:
        tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    if relabelled or config.relabel is not None:
        check_states_none(tokenizer)
    conditioned = _from_folder(config, found) if relabelled else _from_sources(config, tokenizer, found)
    raise_all(
        list(dict.fromkeys(_made_otherwise(config, needs, found.columns))), ConfigError,
        "columns were computed of other tokens than this run reads (compute them again, or read as they were made):",
    )  # fmt: skip
    if needs:
        conditioned = _supply(config, conditioned, needs, found)
    leaks = Leaks(found.recipe) if "valid" in conditioned else None
    rows = {}
    for name, split in conditioned.items():
        watched = split if leaks is None else leaks.watch(name, split)
        rows[name] = _tokenize(config, name, watched, tokenizer, needs, found)
    if leaks is not None:
        found.said.extend(leaks.said())
    if not rows["train"]:
        lines = [f"{stage}: {line}" for stage, counts in found.counts.items() for line in counts.lines()]
        raise DataError("\n  ".join([f"{_named(config)}: no row is left to train on", *lines]))
    return Prepared(
        train=rows["train"],
        valid=rows.get("valid", ()),
        recipe=found.recipe,
        counts=found.counts,
        said=tuple(found.said),
        fingerprint=fingerprint(rows),
        groups=found.groups,
        scoring=found.scoring,
    )


# --- relabelled folders ---


def _unused_beside_relabelled(config: Config) -> list[str]:
    """What was decided when the folder was written, or says how to read other data than such a folder."""
    data = config.data
    problems = []
    if config.relabel is not None:
        problems.append("leave the section relabel out, or give the data it was made from")
    if data.valid_fraction is not None:
        problems.append(
            "data.valid_fraction: it was split when it was relabelled; relabel it again with another share, or "
            "name other rows in data.valid"
        )
    reads = ["config", "revision", "streaming"]
    if data.valid is None or is_relabelled(data.valid):
        reads += ["format", "score", "columns"]
    problems += [
        f"data.{key} says how other data are read: leave it out"
        for key in reads
        if getattr(data, key) not in (None, False)
    ]
    return problems


def _from_folder(config: Config, found: _Found) -> dict[str, Rows]:
    """Rows of a relabelled folder; its recipe was fitted there."""
    data = config.data
    folder = read_relabelled(str(data.source))
    found.recipe, found.scoring = folder.recipe, folder.options.get("scoring")
    found.columns += folder.options.get("columns", ())
    available = tuple(folder.splits)
    train = find_split(data.split or "train", available) or data.split or "train"
    splits = {"train": _few_or_streamed(folder, train, data.limit)}
    found.said.append(f"{data.source}: relabelled rows, splits {', '.join(available)}; training on {train}")
    valid = find_split("valid", available)
    if data.valid is not None:
        splits["valid"] = _from_valid(config, folder, train, found)
    elif valid not in (None, train):
        splits["valid"] = _few_or_streamed(folder, str(valid), data.limit)
    return splits


def _made_otherwise(config: Config, needs: Collection[str], columns: Sequence[Made]) -> Iterator[str]:
    """Columns an objective needs that models computed of other tokens than this run reads."""
    own = config.tokenization.model_dump(mode="json")
    for made in columns:
        names = sorted({*made.get("add", ())} & {*needs} - {"third"})
        here, theirs = _limits(own), _limits(made.get("tokenization", own))
        other = [key for key in here if theirs[key] != here[key]]
        if names and not made.get("goals", True):
            yield f"{', '.join(names)}: of prompts without goals; relabel first, then compute them"
        elif names and other:
            said = "; ".join(f"{key} {theirs[key]}, here {here[key]}" for key in other)
            yield f"{', '.join(names)}: {said}"


def _limits(tokenization: Mapping[str, Any]) -> dict[str, int]:
    """What is cut. Rows that ``truncation: drop`` leaves are whole either way."""
    limits = Limits(*(tokenization[key] for key in ("max_length", "max_prompt_length", "truncation")))
    return {"max_length": limits.length, "max_prompt_length": limits.prompt}


def first_examples(rows: Iterable[Conditioned], limit: int | None) -> list[Conditioned]:
    """The rows of the first ``limit`` examples; None: all. ``rows`` can be gone through twice."""
    if limit is None:
        return list(rows)
    kept = set(islice(dict.fromkeys(row.example_id for row in rows), limit))
    return [row for row in rows if row.example_id in kept]


def _few_or_streamed(folder: Relabelled, split: str, limit: int | None = None) -> Rows:
    """A list of some thousands of rows; more are read from the file each time they are gone through."""
    rows = folder.stream(split)
    return rows if limit is None and len(rows) > IN_MEMORY else first_examples(rows, limit)


def _from_valid(config: Config, folder: Relabelled, train: str, found: _Found) -> Rows:
    """``data.valid`` beside a relabelled folder: as the folder was relabelled."""
    path = str(config.data.valid)
    if is_relabelled(path):
        return _read_valid(config, found, taken=train if _same(path, str(folder.folder)) else None)
    if not folder.options and folder.recipe is not None:
        raise DataError(
            f"{folder.folder} does not say which ties, gaps and halves it was relabelled with: relabel "
            f"data.valid {path} too, by `mlxpref relabel --recipe {folder.folder}`"
        )
    source = _valid_source(config, [], found)
    options = {key: folder.options[key] for key in WRITTEN_WITH if key in folder.options}
    result = relabel_splits({"valid": [source]}, folder.recipe, strict=config.data.strict, **options)
    _note(result, found)
    return result.splits["valid"]


def _read_valid(config: Config, found: _Found, *, taken: str | None = None) -> Rows:
    """A relabelled ``data.valid``; ``taken`` is the split that is trained on, if it is the same folder."""
    folder = read_relabelled(str(config.data.valid))
    if folder.recipe != found.recipe:
        raise ConfigError(
            f"data.valid {folder.folder} was relabelled by another recipe than {_named(config)}"
        )
    found.columns += folder.options.get("columns", ())
    split = _held_out_split(config, tuple(folder.splits), "train")
    if split == taken:
        raise _no_valid_split(config, split)
    found.said.append(f"{folder.folder}: validation rows from its split {split}")
    return _few_or_streamed(folder, split)


def _named(config: Config) -> str:
    """What is trained on, as the user named it."""
    source = config.data.source
    return source if isinstance(source, str) else ", ".join(one.path for one in source)


# --- scored and unscored sources ---


def source_specs(config: Config) -> list[SourceSpec]:
    """The data section as the sources it names."""
    data = config.data
    if not isinstance(data.source, str):
        return [SourceSpec(**source.model_dump()) for source in data.source]
    shared = set(SourceSpec.__dataclass_fields__) - {"path", "weight"}
    return [SourceSpec(path=data.source, **{key: getattr(data, key) for key in shared})]


def _from_sources(config: Config, tokenizer: Any, found: _Found) -> dict[str, Rows]:
    """Choose what each split is read from, then relabel all as `mlxpref relabel` does."""
    data = config.data
    sources = [open_source(spec) for spec in source_specs(config)]
    for source in sources:
        found.said.extend(source.said)
    wanted = {"train": sources}
    relabelled_valid = data.valid is not None and is_relabelled(data.valid)
    if data.valid is not None and not relabelled_valid:
        wanted["valid"] = [_valid_source(config, sources, found)]
    elif data.valid is None:  # a fraction of a split that was named leaves the data's other splits alone
        parted = data.valid_fraction is not None
        wanted |= _own_valid([s for s in sources if not (parted and s.spec.split is not None)], found)
    given = config.relabel
    result = relabel_splits(
        wanted,
        None if given is None else _recipe_arguments(given, tokenizer),
        fractions=None if data.valid_fraction is None else {"valid": data.valid_fraction},
        strict=data.strict,
        seed=config.training.seed,
        **({} if given is None else given.model_dump(include={"halves", "ties", "min_gap", "plain_share"})),
    )
    _note(result, found)
    found.recipe, found.scoring = result.recipe, result.options.get("scoring")
    splits: dict[str, Rows] = {**result.splits}
    if relabelled_valid:
        splits["valid"] = _read_valid(config, found)
    return splits


def _own_valid(sources: Sequence[Source], found: _Found) -> dict[str, list[Source]]:
    """The sources' own validation splits, where they have some that are not trained on."""
    own = []
    for source in sources:
        name = find_split("valid", source.splits)
        if name not in (None, source.split):
            own.append(open_source(replace(source.spec, split=name)))
            found.said.append(f"{source.spec.path}: validation rows from its split {name}")
    return {"valid": own} if own else {}


def _valid_source(config: Config, trained: Sequence[Source], found: _Found) -> Source:
    """``data.valid``, opened. ConfigError if its rows are those that are trained on."""
    data = config.data
    path = str(data.valid)
    same = next((source for source in trained if _same(source.spec.path, path)), None)
    plain = SourceSpec(path, format=data.format, columns=data.columns, score=data.score)
    spec = plain if same is None else replace(same.spec, weight=1.0)
    source = open_source(replace(spec, split=data.valid_split))
    split = _held_out_split(config, source.splits, source.split)
    if split in [other.split for other in trained if _same(other.spec.path, path)]:
        raise _no_valid_split(config, split)
    found.said.append(f"{path}: validation rows from its split {split}")
    return source if split == source.split else open_source(replace(spec, split=split))


def _same(one: str, other: str) -> bool:
    """Whether two paths, or two hub ids, are the same."""
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _held_out_split(config: Config, available: Sequence[str], otherwise: str) -> str:
    """The split of ``data.valid`` to read: the one named, else its validation or test split, else this one."""
    named = config.data.valid_split
    if named is not None:
        return find_split(named, available) or named
    own = (find_split(kind, available) for kind in ("valid", "test"))
    return next((name for name in own if name is not None), otherwise)


def _no_valid_split(config: Config, split: str) -> ConfigError:
    return ConfigError(
        f"data.valid {config.data.valid} is the source itself, and its split {split!r} is trained on: name "
        "another in data.valid_split, or hold rows out with data.valid_fraction"
    )


def _note(result: RelabelledSplits, found: _Found) -> None:
    found.counts |= result.counts
    found.columns += result.options.get("columns", ())
    found.said += [f"warning: {note}" for note in result.notes]


def _recipe_arguments(relabel: RelabelSection, tokenizer: Any) -> dict[str, Any]:
    """The arguments of ``fit_recipe``."""
    own = {"halves", "ties", "min_gap", "plain_share", "carrier"}
    carrier = resolve_carrier(tokenizer) if relabel.carrier == "auto" else relabel.carrier
    return {**relabel.model_dump(exclude=own), "carrier": carrier}


# --- columns and tokens ---


def _supply(
    config: Config, splits: dict[str, Rows], needs: Collection[str], found: _Found
) -> dict[str, Rows]:
    """The rows with what an objective needs of them."""
    supplied = supply(splits, needs, found.recipe)
    if config.data.strict:
        problems = [f"{stage}: {line}" for stage, counts in supplied.counts.items() for line in counts.lines()]
        raise_all(problems, DataError, "rows cannot be used (strict):")
    found.counts |= supplied.counts
    found.said += supplied.said
    found.groups = supplied.groups
    return {**supplied.splits}


def _tokenize(
    config: Config,
    split: str,
    examples: Iterable[Conditioned],
    tokenizer: Any,
    needs: Collection[str],
    found: _Found,
) -> Sequence[Tokenized]:
    given = config.tokenization
    rows, counts = tokenize_all(
        examples,
        tokenizer,
        max_length=given.max_length,
        max_prompt_length=given.max_prompt_length,
        truncation=given.truncation,
        strict=config.data.strict,
        texts=texts_of(needs),
        token_weights="token_weights" in needs,
    )
    found.counts[f"tokenize/{split}"] = counts
    return tuple(rows) if isinstance(rows, list) else rows


def fingerprint(splits: Mapping[str, Sequence[Tokenized]]) -> str:
    """sha256 of everything an update can depend on, in order."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name}:{len(rows)}\n".encode())
        for row in rows:
            for part in _parts(row):
                digest.update(part)
    return digest.hexdigest()


def _parts(row: Tokenized) -> Iterator[bytes]:
    yield row.prompt_ids.astype("<i4").tobytes()
    for ids in row.response_ids:
        yield b"|" + ids.astype("<i4").tobytes()
    for name in sorted(row.texts):
        for ids in row.texts[name]:
            yield f"|{name}|".encode() + ids.astype("<i4").tobytes()
    for lead in row.leads:
        yield b"|lead|" + lead.astype("<i4").tobytes()
    goal = dict(row.goal) if isinstance(row.goal, Mapping) else row.goal
    facts = [row.example_id, row.scores, goal, row.half, row.weight, dict(row.extras)]
    yield json.dumps(facts, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
