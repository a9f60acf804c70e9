"""The study's script: worlds are what they are called, arms can be trained, tables say what was measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import study_seed  # noqa: E402 - found by the line above
from study import arms, measuring, worlds  # noqa: E402 - found by the line above

N = 60


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds of few pairs."""
    monkeypatch.setattr(worlds, "N_PAIRS", N)
    drawn = worlds.pairs(3000, "train", seed=77)
    monkeypatch.setattr(worlds, "pairs", lambda n, split, seed: drawn)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


CONDITIONS: dict[str, Any] = {
    "clear": lambda row: row["gap"] >= 3,
    "other": lambda row: row["gap"] >= 3,
    "odd": lambda row: row["score_chosen"] % 2 == row["score_rejected"] % 2 == 1,
    "near": lambda row: row["gap"] == 1,
    "natural": lambda row: row["gap"] >= 1,
    "noisy-4": lambda row: row["gap"] >= 3,
    "conflict": lambda row: (
        (row["content_chosen"] > row["content_rejected"]) != (row["form_chosen"] > row["form_rejected"])
    ),
    "ties": lambda row: row["gap"] == 0 or row["gap"] >= 3,
    "peak": lambda row: row["gap"] >= 3 and len(row["rejected"].split()) < len(row["chosen"].split()) <= worlds.WORDS,
    "sparse": lambda row: row["score_chosen"] <= 6 or row["score_chosen"] >= 8,
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_world_is_what_it_is_called(name: str, small: None, tmp_path: Path) -> None:
    rows = rows_of(worlds.write_world(name, tmp_path))
    assert len(rows) >= N and len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        row["gap"] = row["score_chosen"] - row["score_rejected"]
        assert CONDITIONS[name](row), row
    if name == "ties":
        assert sum(row["gap"] == 0 for row in rows) == N // 2
    if name == "sparse":
        assert sum(row["score_chosen"] >= 8 for row in rows) == round(worlds.RARE * N)
    for file in tmp_path.iterdir():
        file.unlink()
    assert rows_of(worlds.write_world(name, tmp_path)) == [{k: v for k, v in row.items() if k != "gap"} for row in rows]


def test_a_judge_that_errs_prefers_what_it_takes_for_better(small: None, tmp_path: Path) -> None:
    """Finds noise in the scores alone, with the labels left right."""
    score = worlds_score()
    wrong = sum(score(row["prompt"], row["chosen"]) < score(row["prompt"], row["rejected"]) for row in
                rows_of(worlds.write_world("noisy-4", tmp_path)))  # fmt: skip
    assert 0.1 * N < wrong < 0.5 * N


def worlds_score() -> Any:
    from mlxpref.sandbox.gold import gold

    return lambda prompt, text: gold(prompt, text).score


def test_responses_of_the_base_are_judged_beside_each_other(small: None, tmp_path: Path) -> None:
    """Finds a response scored for another request than it answers."""
    drawn = worlds.pairs(0, "train", seed=0)
    texts = {row["prompt"]: [row["chosen"], row["rejected"]] for row in drawn}
    file = worlds.write_world("own", tmp_path, base=lambda prompts: [texts[prompt].pop() for prompt in prompts])
    for row in rows_of(file):
        score = worlds_score()
        assert row["score_chosen"] == score(row["prompt"], row["chosen"]) >= row["score_rejected"] + 3
        assert row["score_rejected"] == score(row["prompt"], row["rejected"])


def test_every_arm_can_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a key that no configuration has, a rival or a rate of an arm that is nowhere."""
    monkeypatch.setenv("MLXPREF_ASSETS", str(tmp_path))
    known = measuring.arms()
    for table in arms.TABLES.values():
        for arm in table.arms:
            assert arm.world in worlds.WORLDS and arm.rate > 0
            assert {arm.rival, arm.judge, arm.like} <= {"", *known}
            assert arm.rates or arm.like in known
            if arm.steps:
                config = measuring._config(arm, tmp_path / "w.jsonl", tmp_path / arm.name, tmp_path, 1, arm.rate)
                assert config.training.iters == arm.steps and (config.relabel is None) == (arm.relabel is None)
    assert set(arms.CHOSEN) <= set(known)
    by_name: dict[str, Any] = {}
    for table in arms.TABLES.values():
        for arm in table.arms:  # one name is one arm, whatever it is compared with
            assert by_name.setdefault(arm.name, replace(arm, rival="")) == replace(arm, rival="")


def figures(scores: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    return {"asked": {"scores": scores}, "seconds": {"all": 7.0}, **more}


def test_a_difference_is_of_the_same_requests() -> None:
    mine = [figures({"none": [0, 0], "10": [8, 4]}), figures({"none": [0, 0], "10": [10, 6]})]
    other = [figures({"none": [7, 3]}), figures({"none": [7, 3]})]
    assert study_seed._difference(mine, "10", other, "none") == "+2.00 (+1.00, +3.00; requests ± 0.00)"


def test_rates_are_tried_until_the_best_lies_between_others() -> None:
    assert study_seed._beyond({1e-3: 5.0, 3e-3: 6.0, 1e-2: 5.0}) is None
    assert study_seed._beyond({1e-3: 7.0, 3e-3: 6.0, 1e-2: 5.0}) == 3e-4
    assert study_seed._beyond({1e-3: 5.0, 3e-3: 6.0, 1e-2: 7.0}) == 3e-2


def test_a_table_from_the_first_step_to_the_last(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finds an arm that cannot be measured, or is measured twice."""
    short = {"steps": 2, "rates": (1e-3,)}
    table = arms.Table("?", tuple(replace(arm, **short) for arm in (arms.SAME, replace(arms.RA, goals=(10.0,)))))
    monkeypatch.setitem(study_seed.TABLES, "top", table)
    monkeypatch.setattr(measuring, "REQUESTS", 3)
    monkeypatch.setattr(measuring, "JUDGED", 5)
    monkeypatch.setattr(measuring, "LOSERS", 5)
    monkeypatch.setattr(study_seed, "ProcessPoolExecutor", lambda *_: Here())
    assert study_seed.main(["top", "--seeds", "1", "2", "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows] == ["arm", "---", "dpo-same-loss", "ra"] and len({len(row) for row in rows}) == 1
    monkeypatch.setattr(measuring, "train", None)
    assert study_seed.main(["top", "--seeds", "1", "2", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == first
    monkeypatch.setattr(measuring, "code", lambda: "another")
    with pytest.raises(TypeError, match="NoneType"):  # what another code has measured is none of this one's
        study_seed.main(["top", "--seeds", "1", "2", "--out", str(tmp_path)])


class Here:
    """A pool of no processes."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def map(self, function: Any, jobs: Any) -> Any:
        return map(function, jobs)
