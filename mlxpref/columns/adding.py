"""The whole way: check, read, tokenize, ask the models, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref import backends
from mlxpref.columns.folders import Found, read_data, read_folder, with_columns, write_folder
from mlxpref.columns.making import make_columns
from mlxpref.columns.measures import Report, Tools, adapter_folder, measure_all, plain_tokens, special_tokens
from mlxpref.columns.rows import Example, Row, check_alike, check_left, sift, tokenized
from mlxpref.columns.wanted import SCORES, Base, Wanted
from mlxpref.data.relabelled import FileFormat, is_relabelled
from mlxpref.data.sources import SourceSpec
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.errors import RunError, UsageError, raise_all
from mlxpref.files import check_free
from mlxpref.generate import adapter_facts
from mlxpref.records import Counts

SILENT = "third: the model answered with nothing"
TWO_PROMPTS = "third belongs to one prompt, and the responses have two"
SPECIAL_ONLY = "density_ratio: a response holds special tokens alone"


@dataclass(frozen=True)
class Added:
    """What came of it.

    Attributes:
        rows: split → rows written.
        counts: rows kept and dropped, by stage and split, with reasons.
        replaced: columns that the data had before, in some row.
    """

    rows: dict[str, int]
    counts: dict[str, Counts]
    replaced: tuple[str, ...] = ()


def add_columns(
    spec: SourceSpec,
    out: Path,
    wanted: Wanted,
    *,
    backend: str = "auto",
    store: Path | None = None,
    dtype: str | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "cut",
    micro_batch_tokens: int = 8192,
    file_format: FileFormat | None = None,
    strict: bool = False,
    say: Callable[[str], None] = lambda line: None,
    report: Report = lambda what, done, total: None,
) -> Added:
    """Write the data at ``spec.path`` again, with more columns.

    Args:
        spec: relabelled data, or any other; without a split all of them.
        out: folder to write; it must be free.
        wanted: which columns, and which models say them.
        store: folder of reference log-probs; None keeps and uses none.
        dtype: of unquantised weights; None keeps the checkpoint's.
        max_length, max_prompt_length, truncation: as in ``tokenize``; those of the training to come.
        micro_batch_tokens: padded tokens of one forward pass.
        file_format: None: that of relabelled data, else JSONL.
        strict: a row that cannot be used is an error instead of a count.
        say: gets what was detected and what is done, a line at a time.
        report: called with (what is computed, rows done, rows to do).

    Raises:
        UsageError: all that is wrong with what was asked for, models and folders included.
        DataError: the data cannot be read, or no row of a split is left.
        ModelError, AdapterError: a model cannot be loaded.
        RunError: ``out`` is occupied, a log-prob is not finite, or the disk is full.
    """
    raise_all(list(_problems(spec, out, wanted)), UsageError, "columns cannot be added like that:")
    _check_free(out)
    room = backends.get(backend)
    found = read_folder(spec) if is_relabelled(spec.path) else read_data(spec, strict=strict)
    for line in (*found.said, *_remarks(found, wanted)):
        say(line)
    bases = {place: place.base() for place in wanted.measures()}
    tokenizers = {base: load_tokenizer(base[0], revision=base[1]) for base in dict.fromkeys(bases.values())}
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation": truncation}
    rows, counts = tokenized(found.splits, tokenizers, strict=strict, **lengths)
    if "density_ratio" in wanted.add:
        check_alike(rows, [bases[place] for place in wanted.siblings])
    rows = [rows[at] for at in sift(rows, counts, _before(wanted, tokenizers), strict=strict)]
    check_left(rows, found.splits, counts)
    tools = Tools(
        room, bases, tokenizers, store=store, dtype=dtype, micro_batch_tokens=micro_batch_tokens,
        max_tokens=wanted.max_tokens or Tools.max_tokens, normalised=wanted.normalised, say=say, report=report,
    )  # fmt: skip
    made = make_columns(wanted, measure_all(wanted.measures(), rows, tools), rows)
    stay = sift(rows, counts, lambda at, row: _after(made, at), strict=strict)
    check_left([rows[at] for at in stay], found.splits, counts)
    splits: dict[str, list[Example]] = {name: [] for name in found.splits}
    for at in stay:
        values = {name: column[at] for name, column in made.items()}
        splits[rows[at].split].append(with_columns(rows[at].example, values))
    counts = {**found.counts, **counts}
    write_folder(out, found, splits, counts, {**wanted.as_dict(), "tokenization": lengths}, file_format)
    return Added({name: len(some) for name, some in splits.items()}, counts, _replaced(found, wanted))


# --- what is checked first -----------------------------------------------------------------------


def _problems(spec: SourceSpec, out: Path, wanted: Wanted) -> Iterator[str]:
    """Everything that can be known before data are read and models loaded."""
    problems = list(wanted.problems())
    yield from problems
    if not problems:
        yield from wanted.unusable_policies()
    source = Path(spec.path).expanduser()
    if source.exists() and source.resolve() in (out.resolve(), *out.resolve().parents):
        yield f"--out {out} is, or lies in, what is read: choose another folder"
    early = [name for name in wanted.add if name in SCORES]
    if early and is_relabelled(spec.path):
        yield (
            f"{', '.join(early)}: `mlxpref relabel` reads them before it writes goals, and {spec.path} is relabelled: "
            "give the data it was made from"
        )


def _check_free(out: Path) -> None:
    """RunError, with a remedy that `mlxpref columns` has, if anything is there."""
    try:
        check_free(out)
    except RunError as error:
        raise RunError(f"--out {out}: is there already, and nothing is overwritten; choose another folder") from error


def _remarks(found: Found, wanted: Wanted) -> Iterator[str]:
    """What columns are measured of and against, where that may not be what is meant."""
    of_prompts = [name for name in wanted.add if name not in SCORES]
    if of_prompts and found.relabelled is None:
        yield f"{', '.join(of_prompts)}: of prompts without goals; to train with goals relabel first, then add columns"
    for place, what in wanted.measures().items():
        if place.adapter is None or "base" not in what:
            continue
        if start := adapter_facts(adapter_folder(place)).get("init_from"):
            yield f"warning: {place.adapter} was trained against adapter {start}; it is measured against the base"


# --- rows that have to go ------------------------------------------------------------------------


def _before(wanted: Wanted, tokenizers: Mapping[Base, Any]) -> Callable[[int, Row], str | None]:
    """Why a row cannot get a column, as far as its tokens say."""
    special = {base: special_tokens(tokenizer) for base, tokenizer in tokenizers.items()}

    def reason(at: int, row: Row) -> str | None:
        if "third" in wanted.add and "instructions" in row.text.extras:
            return TWO_PROMPTS
        if "density_ratio" in wanted.add and not all(
            plain_tokens(ids, special[base]).any() for base, tokens in row.tokens.items() for ids in tokens.response_ids
        ):
            return SPECIAL_ONLY
        return None

    return reason


def _after(made: Mapping[str, Sequence[Any]], at: int) -> str | None:
    """Why a row cannot keep what was made for it."""
    return SILENT if "third" in made and not made["third"][at].strip() else None


def _replaced(found: Found, wanted: Wanted) -> tuple[str, ...]:
    there = {name for rows in found.splits.values() for row in rows for name in (*row.extras, *row.attributes)}
    return tuple(name for name in wanted.add if name in there)
