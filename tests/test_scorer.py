"""Scorers: found by name, handed what they should see, and checked before their numbers are used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import ScoreError, UsageError
from mlxpref.records import Message
from mlxpref.rewards import load_scorer, score_all

MODULE = """
HALF = 0.5

def longer(prompts, responses):
    return [len(prompt[0].content) + HALF * len(text) for prompt, text in zip(prompts, responses)]

class Judge:
    def __call__(self, prompts, responses):
        return [1.0 for _ in responses]

    def twice(self, prompts, responses):
        return [2.0 for _ in responses]

judge = Judge()
"""

PROMPTS = [(Message("user", "Why?"),), (Message("user", "How so?"),)]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of scorers that Python finds."""
    names = {"spare_scores": MODULE, "needy_scores": "import no_such_package\n", "broken_scores": "1 / 0\n"}
    for name, text in names.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("spare_scores:longer", [5.0, 9.0]),  # 4 + 2/2, 7 + 4/2
        ("spare_scores:judge", [1.0, 1.0]),
        ("spare_scores:judge.twice", [2.0, 2.0]),
    ],
)
def test_a_scorer_by_its_name(modules: Path, name: str, scores: list[float]) -> None:
    """Finds: prompts and responses in the wrong order or place; the object instead of its method."""
    scorer = load_scorer(name)
    assert score_all(scorer, PROMPTS, ["So", "Thus"]) == scores


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spare_scores", "module:function"),
        (":longer", "module:function"),
        ("spare_scores:", "module:function"),
        ("no_such_scores:f", "no module no_such_scores.*PYTHONPATH"),
        ("spare_scores.inner:f", "no module spare_scores.inner"),
        ("needy_scores:f", "no module no_such_package.*needy_scores needs it"),
        ("broken_scores:f", "ZeroDivisionError.*mend"),
        ("spare_scores:shorter", "no shorter in spare_scores.*longer"),
        ("spare_scores:judge.thrice", "no thrice"),
        ("spare_scores:HALF", "of type float"),
        ("spare_scores:Judge", "a class"),
    ],
)
def test_what_is_no_scorer(modules: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_scorer(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("returned", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), map(float, (1, 2.5))])
def test_numbers_of_any_kind(returned: Any) -> None:
    scores = score_all(lambda prompts, responses: returned, PROMPTS, ["a", "b"])
    assert scores == [1.0, 2.5] and {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "1 scores for 2"),
        ([1.0, 2.0, 3.0], "3 scores for 2"),
        (None, "NoneType"),
        (1.0, "float"),
        ([1.0, float("nan")], r"response 1 \('the second'\): nan"),
        ([float("-inf"), 1.0], r"response 0 \('the first'\): -inf"),
        ([1.0, None], "response 1.*None"),
        ([1.0, "7"], "response 1.*'7'"),
        ([1.0, [2.0]], r"response 1.*\[2.0\]"),
        ([1.0, np.ones(1)], "response 1"),
    ],
)
def test_what_is_no_score(returned: Any, words: str) -> None:
    """Finds: a score used that is missing, not finite or somebody else's."""

    def judge(prompts: Any, responses: Any) -> Any:
        return returned

    with pytest.raises(ScoreError, match=words) as caught:
        score_all(judge, PROMPTS, ["the first", "the second"])
    assert "judge" in str(caught.value)


def test_many_wrong_scores_are_counted() -> None:
    with pytest.raises(ScoreError, match="and 7 more") as caught:
        score_all(lambda prompts, responses: [float("nan")] * 12, PROMPTS * 6, ["x" * 500] * 12)
    assert len(str(caught.value)) < 500


def test_a_prompt_for_each_response() -> None:
    with pytest.raises(ScoreError, match="2 prompts for 1"):
        score_all(lambda prompts, responses: [1.0], PROMPTS, ["a"])
