"""From the data sections of a configuration to tokenized rows: read, condition, split, tokenize.

What was found and what was dropped is gathered on the way; nothing here loads a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxpref.config import Config, RelabelSection
from mlxpref.data.recipe import Recipe, resolve_carrier
from mlxpref.data.relabel import fit_recipe, relabel_all, split_by_prompt, unconditioned
from mlxpref.data.relabelled import is_relabelled, read_relabelled
from mlxpref.data.sources import Source, SourceSpec, open_source, read_source
from mlxpref.data.tokenization import load_tokenizer, tokenize_all
from mlxpref.errors import ConfigError, DataError
from mlxpref.records import Conditioned, Counts, Scored, Tokenized

VALID_SPLITS = ("valid", "validation")
"""Names under which a source's own validation rows are found."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows ready to be planned.

    Attributes:
        train, valid: tokenized rows; ``valid`` is empty where there are none.
        recipe: how goals were written; None for unconditioned rows.
        counts: rows kept and dropped, by split and stage, in order.
        said: what was detected, in words.
        fingerprint: hash of every id, score, goal and weight, in order.
    """

    train: tuple[Tokenized, ...]
    valid: tuple[Tokenized, ...]
    recipe: Recipe | None
    counts: Mapping[str, Counts]
    said: tuple[str, ...]
    fingerprint: str


@dataclass(slots=True)
class _Found:
    """What a preparation gathers on its way."""

    said: list[str] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=dict)
    recipe: Recipe | None = None


def prepare(config: Config, *, tokenizer: Any = None) -> Prepared:
    """Tokenized training and validation rows of a configuration.

    Args:
        tokenizer: to use instead of loading the model's.

    Raises:
        ConfigError: the data sections contradict what the source is.
        DataError: the source cannot be read, or nothing is left to train on.
        ModelError: the model folder has no tokenizer.
    """
    found = _Found()
    relabelled = isinstance(config.data.source, str) and is_relabelled(config.data.source)
    if relabelled:
        _check_relabelled(config)
    if tokenizer is None:
        tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    conditioned = (_from_folder if relabelled else _from_sources)(config, tokenizer, found)
    rows = {name: _tokenize(config, name, split, tokenizer, found) for name, split in conditioned.items()}
    _warn_of_leaks(conditioned, found)
    if not rows["train"]:
        lines = [f"{stage}: {line}" for stage, counts in found.counts.items() for line in counts.lines()]
        raise DataError("\n  ".join([f"{config.data.source}: no row is left to train on", *lines]))
    return Prepared(
        train=rows["train"],
        valid=rows.get("valid", ()),
        recipe=found.recipe,
        counts=found.counts,
        said=tuple(found.said),
        fingerprint=fingerprint(rows),
    )


# --- relabelled folders ---


def _check_relabelled(config: Config) -> None:
    if config.relabel is not None:
        raise ConfigError(
            f"data.source {config.data.source} is relabelled already: leave the section relabel out, or give "
            "the data it was made from"
        )
    if config.data.valid_fraction is not None:
        raise ConfigError(
            f"data.valid_fraction: {config.data.source} was split when it was relabelled; relabel it again "
            "with another share, or name other rows in data.valid"
        )


def _from_folder(config: Config, tokenizer: Any, found: _Found) -> dict[str, list[Conditioned]]:
    """Rows of a relabelled folder; its recipe was fitted there."""
    data = config.data
    folder = read_relabelled(str(data.source))
    found.recipe = folder.recipe
    train = data.split or "train"
    splits = {"train": folder.read(train)}
    names = ", ".join(folder.splits)
    found.said.append(f"{data.source}: relabelled rows, splits {names}; training on {train}")
    valid = next((name for name in VALID_SPLITS if name in folder.splits and name != train), None)
    if data.valid is not None:
        splits["valid"] = _from_valid(config, found)
    elif valid is not None:
        splits["valid"] = folder.read(valid)
    return splits


def _from_valid(config: Config, found: _Found) -> list[Conditioned]:
    """``data.valid``: relabelled rows as they are, others with the recipe at hand."""
    path = str(config.data.valid)
    if is_relabelled(path):
        folder = read_relabelled(path)
        if folder.recipe != found.recipe:
            raise ConfigError(f"data.valid {path} was relabelled by another recipe than {config.data.source}")
        names = [name for name in (*VALID_SPLITS, "test", "train") if name in folder.splits]
        return folder.read(names[0])
    spec = SourceSpec(
        path=path,
        format=config.data.format,
        columns=config.data.columns,
        score=config.data.score,
    )
    return _condition(config, "valid", _read(config, "valid", [open_source(spec)], found), found)


# --- scored and unscored sources ---


def source_specs(config: Config) -> list[SourceSpec]:
    """The data section as the sources it names."""
    data = config.data
    if not isinstance(data.source, str):
        return [SourceSpec(**source.model_dump()) for source in data.source]
    shared = set(SourceSpec.__dataclass_fields__) - {"path", "weight"}
    return [SourceSpec(path=data.source, **{key: getattr(data, key) for key in shared})]


def _from_sources(config: Config, tokenizer: Any, found: _Found) -> dict[str, list[Conditioned]]:
    """Read and split, then fit the recipe on the training rows alone, then condition."""
    data = config.data
    sources = [open_source(spec) for spec in source_specs(config)]
    for source in sources:
        found.said.extend(source.said)
    examples = {"train": _read(config, "train", sources, found)}
    if data.valid_fraction is not None:
        examples = split_by_prompt(
            examples["train"], fractions={"valid": data.valid_fraction}, seed=config.training.seed
        )
    elif data.valid is None:
        own = _own_valid(sources, found)
        if own is not None:
            examples["valid"] = _read(config, "valid", [own], found)
    if config.relabel is not None:
        found.recipe = _fit(config.relabel, examples["train"], tokenizer)
    splits = {name: _condition(config, name, rows, found) for name, rows in examples.items()}
    if data.valid is not None:
        splits["valid"] = _from_valid(config, found)
    return splits


def _own_valid(sources: Sequence[Source], found: _Found) -> Source | None:
    """A single source's own validation split, where it has one."""
    if len(sources) != 1:
        return None
    source = sources[0]
    name = next((name for name in VALID_SPLITS if name in source.splits and name != source.split), None)
    if name is None:
        return None
    found.said.append(f"{source.spec.path}: validation rows from its split {name}")
    return open_source(replace(source.spec, split=name, limit=None))


def _read(config: Config, split: str, sources: Sequence[Source], found: _Found) -> list[Scored]:
    examples, counts = read_source(sources, strict=config.data.strict, seed=config.training.seed)
    found.counts[f"{split}, read"] = counts
    return examples


def _fit(relabel: RelabelSection, examples: Sequence[Scored], tokenizer: Any) -> Recipe:
    carrier = resolve_carrier(tokenizer) if relabel.carrier == "auto" else relabel.carrier
    return fit_recipe(
        examples,
        template=relabel.template,
        carrier=carrier,
        score_range=relabel.score_range,
        goal_range=relabel.goal_range,
        mapping=relabel.mapping,
        attributes=relabel.attributes,
        number_format=relabel.number_format,
        top_goal=relabel.top_goal,
    )


def _condition(
    config: Config, split: str, examples: Sequence[Scored], found: _Found
) -> list[Conditioned]:
    relabel = config.relabel
    if found.recipe is None:
        return [unconditioned(example) for example in examples]
    options = relabel or RelabelSection()
    rows, counts = relabel_all(
        examples,
        found.recipe,
        halves=options.halves,
        ties=options.ties,
        min_gap=options.min_gap,
        plain_share=options.plain_share,
        seed=config.training.seed,
        strict=config.data.strict,
    )
    found.counts[f"{split}, relabelled"] = counts
    return rows


def _tokenize(
    config: Config, split: str, examples: Sequence[Conditioned], tokenizer: Any, found: _Found
) -> tuple[Tokenized, ...]:
    given = config.tokenization
    rows, counts = tokenize_all(
        examples,
        tokenizer,
        max_length=given.max_length,
        max_prompt_length=given.max_prompt_length,
        truncation=given.truncation,
        strict=config.data.strict,
    )
    found.counts[f"{split}, tokenized"] = counts
    return tuple(rows)


def _warn_of_leaks(splits: Mapping[str, Sequence[Conditioned]], found: _Found) -> None:
    """Say when validation prompts are trained on: their figures would be too good."""
    recipe = found.recipe

    def asked(rows: Sequence[Conditioned]) -> set[tuple[str, ...]]:
        prompts = (row.prompt if recipe is None else recipe.erase(row.prompt) for row in rows)
        return {tuple(message.content for message in prompt) for prompt in prompts}

    shared = asked(splits["train"]) & asked(splits.get("valid", ()))
    if shared:
        found.said.append(
            f"warning: {len(shared)} prompts are among both training and validation rows; "
            "data.valid_fraction splits by prompt"
        )


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
    goal = dict(row.goal) if isinstance(row.goal, Mapping) else row.goal
    facts = [row.example_id, row.scores, goal, row.half, row.weight, dict(row.extras)]
    yield json.dumps(facts, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
