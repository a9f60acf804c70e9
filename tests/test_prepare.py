"""From the data sections of a configuration to rows: training reads and relabels as `mlxpref relabel` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxpref.config_layers import load_config
from mlxpref.data.relabel_sources import relabel_sources
from mlxpref.data.relabelled import write_relabelled
from mlxpref.data.sources import SourceSpec
from mlxpref.errors import ConfigError, DataError, ScoreError, UsageError
from mlxpref.prepare import Prepared, prepare

Preparer = Callable[..., Prepared]


def row(i: int, chosen: float = 9, rejected: float | None = None) -> dict[str, Any]:
    return {
        "prompt": f"question {i}",
        "chosen": f"good {i}",
        "rejected": f"bad {i}",
        "score_chosen": chosen,
        "score_rejected": 1 + i % 5 if rejected is None else rejected,
        "id": f"r{i}",
    }


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return file


@pytest.fixture
def ready(chat_tokenizer: Any) -> Preparer:
    """``prepare`` of a data section; relabelled unless ``relabel`` is None."""

    def make(relabel: dict[str, Any] | None = None, **data: Any) -> Prepared:
        found = {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}
        config = load_config(base={"model": {"path": "nowhere"}, "data": found, "relabel": relabel})
        return prepare(config, tokenizer=chat_tokenizer)

    return make


def ids(rows: Any) -> list[str]:
    return list(dict.fromkeys(row.example_id for row in rows))


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A folder with train (r0-r9), dev (r10-r12) and test (r13, r14)."""
    write(tmp_path / "in/train.jsonl", [row(i) for i in range(10)])
    write(tmp_path / "in/dev.jsonl", [row(i) for i in range(10, 13)])
    write(tmp_path / "in/test.jsonl", [row(i) for i in range(13, 15)])
    return tmp_path / "in"


def relabelled(source: Path, out: Path, **options: Any) -> Path:
    result = relabel_sources([SourceSpec(str(source))], {}, **options)
    write_relabelled(out, result.splits, result.recipe, written_with=result.options)
    return out


# --- where validation rows come from ---


def test_own_validation_split_goes_by_any_of_its_names(ready: Preparer, splits: Path) -> None:
    found = ready({}, source=splits)
    assert ids(found.train) == [f"r{i}" for i in range(10)] and ids(found.valid) == ["r10", "r11", "r12"]
    assert any("its split dev" in line for line in found.said)
    assert ids(ready({}, source=splits, split="dev").train) == ["r10", "r11", "r12"]


def test_a_fraction_beside_the_datas_own_split_is_refused(ready: Preparer, splits: Path) -> None:
    """Train would be parted silently, and the rows meant for validation left out."""
    with pytest.raises(UsageError, match="have their own valid"):
        ready({}, source=splits, valid_fraction=0.3)
    chosen = ready({}, source=splits, split="train", valid_fraction=0.3)
    assert len(ids(chosen.train)) == 7 and len(ids(chosen.valid)) == 3


def test_valid_names_the_source_itself(ready: Preparer, splits: Path, tmp_path: Path) -> None:
    """It read the training split of its source before, and evaluated on what was learnt."""
    assert ids(ready({}, source=splits, valid=splits).valid) == ["r10", "r11", "r12"]
    assert ids(ready({}, source=splits, valid=splits, valid_split="test").valid) == ["r13", "r14"]
    file = write(tmp_path / "pairs.jsonl", [row(i) for i in range(4)])
    for data in ({"source": file, "valid": file}, {"source": splits, "valid": splits, "valid_split": "train"}):
        with pytest.raises(ConfigError, match=r"'train' is trained on: name another in data\.valid_split"):
            ready({}, **data)
    with pytest.raises(DataError, match="no split 'eval2'"):
        ready({}, source=splits, valid=splits, valid_split="eval2")
    with pytest.raises(ConfigError, match=r"data.valid_split names a split of data\.valid"):
        ready({}, source=splits, valid_split="test")


def test_valid_of_other_data_reads_their_held_out_split(ready: Preparer, splits: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", [row(i) for i in range(20, 24)])
    assert ids(ready({}, source=file, valid=splits).valid) == ["r10", "r11", "r12"]
    assert ids(ready({}, source=splits, valid=file).valid) == [f"r{i}" for i in range(20, 24)]


# --- one pipeline ---


@pytest.mark.parametrize(("shared", "said"), [(1, "1 prompt in"), (2, "2 prompts in"), (0, None)])
def test_validation_prompts_that_are_trained_on_are_counted(
    ready: Preparer, tmp_path: Path, shared: int, said: str | None
) -> None:
    """Finds figures that are too good in silence; and "1 prompts"."""
    train = write(tmp_path / "train.jsonl", [row(i) for i in range(4)])
    valid = write(tmp_path / "valid.jsonl", [row(i) for i in range(4 - shared, 6)])
    warnings = [line for line in ready({}, source=train, valid=valid).said if "both training" in line]
    assert [line.startswith(f"warning: {said}") for line in warnings] == [True] * bool(said)


def test_training_says_what_relabel_says(ready: Preparer, tmp_path: Path) -> None:
    stars = write(tmp_path / "stars.jsonl", [row(i, 5, 1) for i in range(4)])
    found = ready({}, source=stars)
    assert any("warning: score: the scale seen, 1 to 5, is stretched" in line for line in found.said)
    assert {r.goal for r in found.train} == {1, 10}
    assert not any("warning" in line for line in ready({"score_range": [1, 5]}, source=stars).said)


def test_a_scale_the_format_fixes_is_used(ready: Preparer, tmp_path: Path) -> None:
    ranks = {"prompt": "Sky?", "answers": [{"answer": f"{n}.", "rank": n} for n in range(1, 8)]}
    steer = [{"prompt": "Sky?", "response": f"{n}.", "helpfulness": n} for n in (3, 1)]
    nectar, helpsteer = write(tmp_path / "n.jsonl", [ranks]), write(tmp_path / "h.jsonl", steer)
    assert [r.goal for r in ready({}, source=nectar).train] == [10, 8.5, 7, 5.5, 4, 2.5, 1]
    with pytest.raises(ScoreError, match="different scales"):
        ready({}, source=[str(nectar), str(helpsteer)])


def test_training_makes_the_rows_relabel_writes(ready: Preparer, splits: Path, tmp_path: Path) -> None:
    options = {"min_gap": 5.0, "halves": "both", "ties": "drop", "plain_share": 0.3}
    folder = relabelled(splits, tmp_path / "out", seed=0, **options)
    own, stored = ready(options, source=splits), ready(source=folder)
    assert own.fingerprint == stored.fingerprint and own.recipe == stored.recipe


def test_a_share_of_one_trains_without_goals_on_the_filtered_pairs(ready: Preparer, splits: Path) -> None:
    """The baseline's pairs are those of the run it is compared with; its adapter asks for no goal."""
    goals = ready({"min_gap": 6.0}, source=splits)
    plain = ready({"min_gap": 6.0, "plain_share": 1.0}, source=splits)
    assert ids(plain.train) == ids(goals.train) and len(ids(plain.train)) < 10
    assert plain.recipe is None and {r.goal for r in plain.train} == {None}


def test_without_relabel_nothing_is_filtered(ready: Preparer, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", [row(0, 7, 7), row(1)])
    found = ready(source=file)
    assert ids(found.train) == ["r0", "r1"] and found.recipe is None


# --- relabelled folders ---


def test_valid_beside_a_relabelled_folder_is_relabelled_alike(
    ready: Preparer, splits: Path, tmp_path: Path
) -> None:
    """Default halves and no gap there measured another task than the one that is trained."""
    folder = relabelled(splits, tmp_path / "out", halves="chosen", ties="drop", min_gap=5.0)
    more = write(tmp_path / "more.jsonl", [row(20, 9, 3), row(21, 9, 8)])
    found = ready(source=folder, valid=more)
    assert [(r.example_id, r.half) for r in found.valid] == [("r20", "chosen")]
    card = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({k: v for k, v in card.items() if k != "options"}))
    with pytest.raises(DataError, match="does not say which ties"):
        ready(source=folder, valid=more)


def test_a_relabelled_folder_is_its_own_validation_data(ready: Preparer, splits: Path, tmp_path: Path) -> None:
    folder = relabelled(splits, tmp_path / "out")
    assert ids(ready(source=folder).valid) == ["r10", "r11", "r12"]
    assert ids(ready(source=folder, valid=folder, valid_split="test").valid) == ["r13", "r14"]
    with pytest.raises(ConfigError, match="'train' is trained on"):
        ready(source=folder, valid=folder, valid_split="train")


def test_a_list_of_sources_is_called_by_its_paths(ready: Preparer, splits: Path, tmp_path: Path) -> None:
    """Finds: a message that shows the user how a configuration looks from inside."""
    folder, train = relabelled(splits, tmp_path / "out"), tmp_path / "in/train.jsonl"
    with pytest.raises(ConfigError, match=rf"by another recipe than {train}, {train}$"):
        ready({"goal_range": [1, 5]}, source=[{"path": str(train)}, {"path": str(train)}], valid=folder)


def test_limit_of_a_relabelled_folder_counts_examples(ready: Preparer, splits: Path, tmp_path: Path) -> None:
    found = ready(source=relabelled(splits, tmp_path / "out"), limit=2)
    assert [(r.example_id, r.half) for r in found.train] == [
        ("r0", "chosen"),
        ("r0", "rejected"),
        ("r1", "chosen"),
        ("r1", "rejected"),
    ]
    assert ids(found.valid) == ["r10", "r11"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "preference"),
        ("score", "score"),
        ("columns", {"prompt": "p"}),
        ("config", "c"),
        ("revision", "main"),
        ("streaming", True),
        ("valid_fraction", 0.1),
    ],
)
def test_what_cannot_act_on_a_relabelled_folder_is_refused(
    ready: Preparer, splits: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = relabelled(splits, tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"data\.{key}"):
        ready(source=folder, **{key: value})
