"""Rows too many for memory: the same rows, counts and words as of few, from disk and from several processes.

Finds: a row, a column's type, a count or a place that depends on how many rows there are or on who read them; files and
processes left behind; memory that grows with the data.
"""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from conftest import CHATML, make_tokenizer

from mlxpref.config_layers import load_config
from mlxpref.data import relabel, relabelled, stored, tokenization, tokens
from mlxpref.data.columns import available_columns
from mlxpref.data.plan import plan_pass, plan_steps
from mlxpref.data.relabel_sources import relabel_sources
from mlxpref.data.relabelled import read_relabelled, write_relabelled
from mlxpref.data.sizes import measure, sizes_of
from mlxpref.data.sources import SourceSpec
from mlxpref.data.stored import Joined, Stored, gather
from mlxpref.data.tokenization import tokenize_all
from mlxpref.errors import DataError, RunError
from mlxpref.prepare import Prepared, prepare
from mlxpref.records import Conditioned, Message, Scored, Tokenized

FEW = 10**9


@pytest.fixture
def keep_in_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """How many rows stay a list from here on, and how many processes share what is more."""
    import mlxpref.prepare as preparing

    def keep(n: int, cores: int = 1) -> None:
        for module in (stored, tokenization, relabel, preparing):
            monkeypatch.setattr(module, "IN_MEMORY", n)
        for module in (tokenization, relabel):
            monkeypatch.setattr(module, "cores", lambda: cores)

    return keep


def nasty(n: int) -> list[dict[str, Any]]:
    """Pairs of every kind: long, empty, odd characters, ties, no score, several turns, columns of objectives."""
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "More \u2028 please\x85"},
    ]  # fmt: skip
    prompts: list[Any] = ["What is it?", "  x ", "你好 🙂 é", "<|im_end|> <|im_start|>", "long " * 90, turns]
    texts = ["Paris.", "I do not know. " * 40, "\u2029\u2028", "🙂" * 60, "a\x00b", "<|im_end|>", "ok  then", "你" * 30]
    found = []
    for at in range(n):
        chosen, rejected = f"{texts[at % 8]} {at}", texts[(at * 3 + 1) % 8]
        prompt = prompts[at % 6]
        row: dict[str, Any] = {
            "prompt": f"{prompt} {at // 7}" if isinstance(prompt, str) else prompt,
            "chosen": "" if at % 41 == 5 else chosen, "rejected": chosen if at % 37 == 6 else rejected,
            "score_chosen": None if at % 29 == 8 else (at % 10) + (at % 3) / 3 + 0.5,
            "score_rejected": 5 if at % 4 else 3.5,
            "third": 7 if at % 31 == 2 else f"third {at}", "group": ["a", "b", 3][at % 3],
            "previous": [at if at < n // 2 else at + 0.5, 2], "helpfulness_chosen": at % 5, "helpfulness_rejected": 2,
            "token_weights_chosen": [{"text": chosen, "weight": at % 3}],
            "token_weights_rejected": [{"text": rejected, "weight": 1.5}],
        }  # fmt: skip
        found.append(row | ({"id": f"r{at % 90}"} if at % 5 else {}))
    return found


def lists(n: int) -> list[dict[str, Any]]:
    """Lists of two to four responses, and some of which single ones are left out."""
    return [
        {
            "prompt": f"question {at}",
            "responses": [
                {"text": f"answer {k} to {at}", "score": None if at % 17 == k else (at * k) % 10}
                for k in range(2 + at % 3)
            ],
        }
        for at in range(n)
    ]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return file


def plain(value: Any) -> Any:
    """A value in which equal things of different types differ."""
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Tokenized):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (type(value).__name__, [plain(item) for item in value])
    return (type(value).__name__, value)


def everything(found: Prepared) -> dict[str, Any]:
    rows = {name: [plain(row) for row in getattr(found, name)] for name in ("train", "valid")}
    counts = {
        name: (own.kept, list(own.dropped.items()), own.first, list(own.notes.items()))
        for name, own in found.counts.items()
    }
    return {**rows, "counts": counts, "said": found.said, "hash": found.fingerprint, "groups": found.groups}


# --- the same rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "section", "needs", "data"),
    [
        (nasty, {"score_range": [0, 11]}, (), {}),
        (nasty, {"score_range": [0, 11], "plain_share": 0.2}, ("reference", "scores"), {"valid_fraction": 0.2}),
        (nasty, None, ("third_reference", "mismatched", "previous"), {}),
        (nasty, None, ("token_weights", "groups", "divergence"), {"limit": 180}),
        (nasty, {"score_range": [0, 11], "ties": "keep", "halves": "rejected"}, ("win_rates",), {}),
        (lists, {}, ("scores", "goal_distances"), {"valid_fraction": 0.1}),
    ],
)
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_many_rows_are_the_rows_of_few(
    keep_in_memory: Callable[..., None], tmp_path: Path,
    kind: Any, section: Any, needs: Any, data: Any, template: str,
) -> None:  # fmt: skip
    """Finds rows, types, order, counts, places or words that change where rows go over disk and through processes."""
    tokenizer = make_tokenizer(CHATML if template == "chat" else None)
    source = write(tmp_path / "in.jsonl", kind(230))

    def read() -> Prepared:
        found = {"source": str(source), **data}
        tokens = {"max_length": 160}
        config = load_config(
            base={"model": {"path": "nowhere"}, "data": found, "relabel": section, "tokenization": tokens}
        )
        return prepare(config, tokenizer=tokenizer, needs=needs)

    few = read()
    keep_in_memory(40, 2 if "mismatched" in needs else 1)
    many = read()
    assert isinstance(few.train, tuple) and isinstance(many.train, Stored)
    assert everything(many) == everything(few)
    assert len({row.example_id for row in many.train}) > 100, "the witness has too few rows to say anything"
    if needs:
        assert available_columns(many.train) == available_columns(few.train)
    if any(any(row.response_cut) for row in few.train):
        assert any(row.prompt_cut for row in few.train)


def test_a_relabelled_folder_is_the_same_from_many_rows(
    keep_in_memory: Callable[..., None], tmp_path: Path
) -> None:
    """Finds a file, a recipe or counts that depend on how many rows there were, in either format; and reading them."""
    source = write(tmp_path / "in.jsonl", nasty(230))
    options: list[dict[str, Any]] = [
        {"fractions": {"valid": 0.2, "test": 0.1}, "plain_share": 0.1, "seed": 3},
        {"min_gap": 1.0, "ties": "keep"},
        {"scoring": {"score_from": ["helpfulness"]}, "picking": {"drop_top": "helpfulness:0.2"}},
    ]
    tokenizer = make_tokenizer(CHATML)

    def folders(name: str) -> Iterator[Path]:
        for at, some in enumerate(options):
            for kind in ("jsonl", "parquet"):
                done = relabel_sources([SourceSpec(str(source), weight=1.5)], {"mapping": "quantile"}, **some)
                folder = tmp_path / name / f"{at}-{kind}"
                write_relabelled(
                    folder, done.splits, done.recipe, file_format=kind,  # type: ignore[arg-type]  # one of the two
                    counts=done.counts, written_with=done.options, num_proc=2,
                )  # fmt: skip
                (folder / "notes").write_text(repr(done.notes))
                yield folder

    def read(folder: Path) -> dict[str, Any]:
        config = load_config(base={"model": {"path": "nowhere"}, "data": {"source": str(folder)}})
        return everything(prepare(config, tokenizer=tokenizer, needs=("reference",)))

    few = list(folders("few"))
    prepared = [read(folder) for folder in few]
    keep_in_memory(40)
    for one, other, found in zip(few, folders("many"), prepared, strict=True):
        assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
        for file in one.iterdir():
            if file.suffix == ".parquet":
                continue  # bytes of the writer; its rows are compared below
            assert file.read_bytes() == (other / file.name).read_bytes(), file
        assert list(read_relabelled(one).stream()) == read_relabelled(other).read()
        again = read(other)
        assert [line.replace(str(other), str(one)) for line in again.pop("said")] == list(found.pop("said"))
        assert again == found


def test_wrong_rows_are_reported_as_of_few(keep_in_memory: Callable[..., None], tmp_path: Path) -> None:
    """Finds messages that name other rows, or none, where many are read."""
    source = write(tmp_path / "in.jsonl", nasty(230))
    said = []
    for in_memory in (FEW, 40):
        keep_in_memory(in_memory)
        with pytest.raises(DataError) as of_relabelling:
            relabel_sources([SourceSpec(str(source))], {"score_range": [0, 11]}, strict=True)
        with pytest.raises(DataError) as of_tokens:
            rows = relabel_sources([SourceSpec(str(source))], {"score_range": [0, 11]}).splits["train"]
            tokenize_all(rows, make_tokenizer(CHATML), max_length=80, truncation="drop", strict=True)
        said.append((str(of_relabelling.value), str(of_tokens.value)))
    assert said[0] == said[1]
    assert "in.jsonl:" in said[0][0] and "longer than max_length" in said[0][1]


def test_a_plan_of_stored_rows_is_that_of_rows_in_memory(keep_in_memory: Callable[..., None]) -> None:
    """Finds lengths kept beside the rows that are not those of the rows."""
    rows = [
        Conditioned((Message("user", "why " * (1 + at % 30)),), ("yes " * (1 + at % 17), f"no {at}"), None, None, None,
                    None, f"e{at // 2}", extras={"third": "it " * (1 + at % 9)})
        for at in range(300)
    ]  # fmt: skip
    few, _ = tokenize_all(rows, make_tokenizer(CHATML), texts=("third",))
    keep_in_memory(40)
    many, _ = tokenize_all(iter(rows), make_tokenizer(CHATML), texts=("third",))
    assert isinstance(many, Stored) and isinstance(few, list)
    for one, other in zip(sizes_of(many), measure(few), strict=True):
        assert np.array_equal(one, other)
    assert sizes_of(many).tokens.tolist() == [row.n_tokens for row in few]
    for workers in (1, 3):
        options = {"batch_size": 6, "epochs": 1.5, "micro_batch_tokens": 400, "n_workers": workers}
        assert plan_steps(many, **options) == plan_steps(few, **options)
    assert plan_pass(many) == plan_pass(few)


# --- rows on disk --------------------------------------------------------------------------------


def token_rows(n: int, width: int = 50) -> Iterator[Tokenized]:
    for at in range(n):
        ids = np.arange(at, at + width, dtype=np.int32)
        weights = (np.ones(3, np.float32), np.zeros(width, np.float32))
        extras = {"token_weights": weights, "n": at}
        yield Tokenized(ids, (ids[:3], ids), f"e{at}", (1.0, float(at)), None, extras=extras)


@pytest.mark.parametrize("together", [True, False])
def test_stored_rows_are_a_sequence(together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds an index, a slice or an order that is not a list's; and a file left in the temporary folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = list(token_rows(1000))
    kept = gather(iter(rows), in_memory=100, together=together)
    assert isinstance(kept, Stored) and len(kept) == 1000
    wanted = [plain(row) for row in rows]
    assert [plain(row) for row in kept] == wanted
    for at in (0, 255, 256, 257, 999, -1, -1000):
        assert plain(kept[at]) == wanted[at]
    assert [plain(row) for row in kept[250:700:3]] == wanted[250:700:3]
    for at in (1000, -1001):
        with pytest.raises(IndexError):
            kept[at]
    assert [plain(row) for row in pickle.loads(pickle.dumps(kept))] == wanted
    both = Joined(kept, rows[:3])
    assert (len(both), plain(both[1001]), plain(both[-1])) == (1003, wanted[1], wanted[2])
    assert [plain(row) for row in both] == wanted + wanted[:3]
    assert list(tmp_path.iterdir()) == [], "the file has a name"
    assert gather(iter(rows), in_memory=1000) == rows


def test_read_only_mappings_travel() -> None:
    """Finds records that cannot be stored because a mapping of theirs is only a view."""
    kept = gather([MappingProxyType({"a": 1})] * 3, in_memory=1)
    assert kept[2] == {"a": 1} and isinstance(kept[2], MappingProxyType)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a traceback, or silence, where the temporary folder has no room."""

    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(RunError, match=r"No space left on device.*TMPDIR"):
        gather(token_rows(10), in_memory=5)


def test_nothing_half_written_is_left(keep_in_memory: Callable[..., None], tmp_path: Path) -> None:
    """Finds a folder that is there although a late row could not be written, by another process."""
    rows = nasty(230)
    rows[-1] |= {"third": "half \ud83d", "score_chosen": 9, "id": "last"}
    source = write(tmp_path / "in.jsonl", rows)
    keep_in_memory(40)
    done = relabel_sources([SourceSpec(str(source))], {"score_range": [0, 11]})
    with pytest.raises(DataError, match="'last' cannot be written as JSON"):
        write_relabelled(tmp_path / "out", done.splits, done.recipe, num_proc=2)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys
import numpy as np
from pathlib import Path
from mlxpref.data.stored import gather
from mlxpref.records import Tokenized

n, in_memory = int(sys.argv[1]), int(sys.argv[2])
answers = (np.arange(500, dtype=np.int32), np.ones(500, np.int32))
made = (Tokenized(np.arange(at, at + 1000, dtype=np.int32), tuple(a + at for a in answers), "") for at in range(n))
rows = gather(made, in_memory=in_memory, together=False)
assert sum(int(row.prompt_ids[0]) for row in rows) == n * (n - 1) // 2
for at in np.random.default_rng(0).permutation(n)[:4000]:
    assert rows[at].prompt_ids[0] == at
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the largest size of a process is read from /proc")
def test_stored_rows_take_no_memory() -> None:
    """Finds rows that are kept in memory after all, or pages that are never given back: 16,000 more rows are 128 MB."""

    def peak(n: int, in_memory: int) -> float:
        command = [sys.executable, "-c", MEASURE, str(n), str(in_memory)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        return int(done.stdout) / 1e3

    assert peak(20_000, 1000) - peak(4000, 1000) < 40
    assert peak(20_000, FEW) - peak(4000, FEW) > 100, "the measure does not show what is in memory"


def test_no_stage_collects_all_rows(
    keep_in_memory: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Finds a stage on the way of many rows that makes a list of them."""
    alive: list[int] = []
    calls = 0

    def counting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 97 == 0:
                alive.append(sum(type(one) in (Scored, Conditioned, Tokenized) for one in gc.get_objects()))
            return function(*args, **kwargs)

        return call

    for module, name in ((relabel, "relabel"), (relabelled, "_to_row"), (tokens.Reader, "read")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    for module, name in ((stored, "BLOCK"), (relabel, "CHUNK"), (tokenization, "_AT_ONCE")):
        monkeypatch.setattr(module, name, 16)
    source = write(tmp_path / "in.jsonl", [{**row, "id": f"r{at}"} for at, row in enumerate(nasty(500))])
    most = []
    for in_memory in (FEW, 50):
        keep_in_memory(in_memory)
        alive.clear()
        done = relabel_sources([SourceSpec(str(source))], {"score_range": [0, 11]})
        write_relabelled(tmp_path / f"{in_memory}", done.splits, done.recipe)
        del done
        base = {"model": {"path": "nowhere"}, "data": {"source": str(tmp_path / f"{in_memory}")}}
        found = prepare(load_config(base=base), tokenizer=make_tokenizer(CHATML), needs=("reference", "scores"))
        assert len(found.train) > 600 and len(alive) > 10
        del found
        most.append(max(alive))
    assert most[0] > 600, "the witness has too few rows to say anything"
    assert most[1] < 250
