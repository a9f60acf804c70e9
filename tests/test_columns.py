"""Columns that objectives ask for beside responses and scores: from a row of data to an array, or a clear refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.config_layers import load_config
from mlxpref.data.batching import collate
from mlxpref.data.columns import available_columns, texts_of, unusable, widths_of
from mlxpref.data.plan import plan_pass
from mlxpref.data.relabel import relabel_all, unconditioned
from mlxpref.data.relabelled import read_relabelled, write_relabelled
from mlxpref.data.sources import SourceSpec, open_source
from mlxpref.errors import DataError
from mlxpref.prepare import Prepared, prepare
from mlxpref.records import Conditioned, Message, MicroBatch, Scored, Tokenized

Preparer = Callable[..., Prepared]

PIECES = [{"text": "go", "weight": 0.5}, {"text": "od", "weight": 2.0}]
WORSE = [{"text": "bad", "weight": 1.0}]

ONE_LIST = {
    "prompt": "Sky?",
    "responses": ["blue", "green", "grey"],
    "scores": [9, 2, 5],
    "previous": [-1.5, -2, "-3"],
    "aligned_logps": [-0.1, -0.2, -0.3],
    "win_rates": [1, 0, 0.5],
    "margin_rewards": [[1, 2], [3, 4], [5, 6]],
    "token_weights": [[{"text": text, "weight": n}] for n, text in enumerate(("blue", "green", "grey"))],
    "confidence": "0.25",
    "group": "sea",
    "third": "red",
    "gold": [{"role": "assistant", "content": "azure"}],
    "rationale": "It is.",
}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return file


def pair(n: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"prompt": f"question {n}", "chosen": "good", "rejected": "bad", "score_chosen": 9, "score_rejected": 4}
    return {**row, "id": f"r{n}", **changes}


def read(tmp_path: Path, *rows: dict[str, Any]) -> list[Scored]:
    found = list(open_source(SourceSpec(str(write(tmp_path / "rows.jsonl", list(rows))))))
    assert all(isinstance(row, Scored) for row in found), found
    return [row for row in found if isinstance(row, Scored)]


@pytest.fixture
def ready(chat_tokenizer: Any, tmp_path: Path) -> Preparer:
    """``prepare`` of these rows."""

    def make(rows: list[dict[str, Any]], *needs: str, relabel: Any = None, **data: Any) -> Prepared:
        file = write(tmp_path / "in" / "rows.jsonl", rows)
        config = load_config(
            base={"model": {"path": "nowhere"}, "data": {"source": str(file), **data}, "relabel": relabel}
        )
        return prepare(config, tokenizer=chat_tokenizer, needs=needs)

    return make


def one_batch(rows: Any, *columns: str) -> MicroBatch:
    """All rows, of one K, in one micro-batch, in order of the rows."""
    (step,) = plan_pass(list(rows)).steps
    return collate(list(rows), replace(step[0], rows=tuple(range(len(rows)))), columns=columns)


# --- at the door ---------------------------------------------------------------------------------


def test_every_column_is_read_as_what_it_is(tmp_path: Path) -> None:
    """Finds: a column lost at the door, text left where a number belongs, a column taken for a score."""
    (example,) = read(tmp_path, ONE_LIST)
    assert example.extras == {
        "previous": (-1.5, -2.0, -3.0),
        "aligned_logps": (-0.1, -0.2, -0.3),
        "win_rates": (1.0, 0.0, 0.5),
        "margin_rewards": ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]),
        "token_weights": tuple([{"text": t, "weight": float(n)}] for n, t in enumerate(example.responses)),
        "confidence": 0.25,
        "group": "sea",
        "third": "red",
        "gold": "azure",
        "rationale": "It is.",
    }
    assert example.attributes == {}


def test_a_list_beside_the_row_and_columns_of_its_sides_say_the_same(tmp_path: Path) -> None:
    """Finds: previous_chosen taken for an attribute, and so for a reward."""
    listed = pair(previous=[-1, -2], margin_rewards=[[1, 2], [3, 4]], token_weights=[PIECES, WORSE], wit_chosen=1)
    sided = pair(
        previous_chosen=-1, previous_rejected=-2, margin_rewards_chosen=[1, 2], margin_rewards_rejected=[3, 4],
        token_weights_chosen=PIECES, token_weights_rejected=WORSE, wit_chosen=1, wit_rejected=2,
    )  # fmt: skip
    one, other = read(tmp_path, listed)[0], read(tmp_path, sided)[0]
    assert one.extras == other.extras
    assert one.extras["previous"] == (-1.0, -2.0)
    assert other.attributes == {"wit": (1.0, 2.0)}


def test_values_inside_the_objects_of_responses(tmp_path: Path) -> None:
    """Finds: what stands beside each response in a list taken for a score of it, or lost."""
    item = {"previous": -1, "margin_rewards": [1, 2], "wit": 3}
    row = {"prompt": "q", "responses": [{"text": "a", "score": 1, **item}, {"text": "b", "score": 2, **item}]}
    (example,) = read(tmp_path, row)
    assert example.extras == {"previous": (-1.0, -1.0), "margin_rewards": ([1.0, 2.0], [1.0, 2.0])}
    assert example.attributes == {"wit": (3.0, 3.0)}


def test_the_entry_of_a_response_left_out_goes_with_it(tmp_path: Path) -> None:
    """Finds: a column moved by one place against its responses."""
    row = {**ONE_LIST, "scores": [9, None, 5]}
    example = next(x for x in open_source(SourceSpec(str(write(tmp_path / "r.jsonl", [row])))) if isinstance(x, Scored))
    assert example.responses == ("blue", "grey")
    assert example.extras["previous"] == (-1.5, -3.0)
    assert example.extras["margin_rewards"] == ([1.0, 2.0], [5.0, 6.0])
    assert [own[0]["text"] for own in example.extras["token_weights"]] == ["blue", "grey"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"previous": [-1, float("nan")]}, "previous is not a finite number"),
        ({"previous": [-1, "high"]}, "previous is not a finite number"),
        ({"previous": [-1]}, "previous has no entry for each response"),
        ({"previous": -1}, "previous has no entry for each response"),
        ({"previous_chosen": -1, "previous_rejected": None}, "previous is not a finite number"),
        ({"aligned_logps": [[-1], [-2]]}, "aligned_logps is not a finite number"),
        ({"win_rates": [0.5, 1.5]}, "win_rates is not between 0 and 1"),
        ({"margin_rewards": [[1, 2], [3]]}, "margin_rewards has not as many numbers for each response"),
        ({"margin_rewards": [[1, 2], 3]}, "margin_rewards has not as many numbers for each response"),
        ({"confidence": "high"}, "confidence is not a finite number"),
        ({"confidence": True}, "confidence is not a finite number"),
        ({"confidence": -0.1}, "confidence is not between 0 and 1"),
        ({"group": ["a"]}, "group is neither text nor a finite number"),
        ({"third": 3}, "third is not text"),
        ({"gold": [{"role": "user", "content": "x"}]}, "gold: response is not the assistant's"),
        ({"token_weights": [PIECES, [{"text": "ba", "weight": 1}]]}, "the pieces do not make up the response"),
        ({"token_weights": [PIECES, [{"text": "bad"}]]}, "the weight of a piece is not a finite number"),
        ({"token_weights": [[1.0, 2.0], [1.0]]}, "token_weights are not pieces"),
    ],
)
def test_what_cannot_be_used_drops_its_row_where_it_is_asked_for(
    ready: Preparer, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """Finds: a wrong value trained on; and a row lost for a column that nobody reads."""
    column = next(iter(changes)).removesuffix("_chosen")
    whole = {"token_weights": [PIECES, WORSE], "third": "c", "gold": "d", "group": 1, "confidence": 1}
    numbers = {name: [0, 1] for name in ("previous", "aligned_logps", "win_rates", "margin_rewards")}
    (example,) = read(tmp_path, pair(**changes))
    assert reason in str(unusable(example.extras[column]))
    good = pair(1, **whole, **numbers)
    assert len(ready([pair(**changes), good]).train) == 2
    needs = "groups" if column == "group" else column
    found = ready([pair(**changes), good], needs)
    assert [row.example_id for row in found.train] == ["r1"]
    (line,) = found.counts["columns/train"].lines()
    assert line.startswith("dropped 1: ") and reason in line and "rows.jsonl:1" in line
    with pytest.raises(DataError, match="strict"):
        ready([pair(**changes), good], needs, strict=True)


def test_columns_stay_with_their_responses_when_these_are_reordered(tmp_path: Path) -> None:
    """Finds: the rejected half trained with the chosen response's column."""
    examples = read(tmp_path, ONE_LIST)
    rows, _ = relabel_all(examples, _recipe(examples))
    own = dict(zip(examples[0].responses, examples[0].extras["previous"], strict=True))
    assert {row.half for row in rows} == {"chosen", "rejected"}
    for row in rows:
        assert row.extras["previous"] == tuple(own[text] for text in row.responses)
        assert [weights[0]["text"] for weights in row.extras["token_weights"]] == list(row.responses)


def _recipe(examples: list[Scored], **given: Any) -> Any:
    from mlxpref.data.fitting import fit_recipe

    return fit_recipe(examples, score_range=(1, 10), **given)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_columns_survive_relabelled_folders(tmp_path: Path, file_format: Any) -> None:
    """Finds: nested numbers, pieces, prompts of a side, or reasons that a file gives back as something else."""
    joint = {"i_chosen": "Sky?", "r_chosen": "Blue.", "i_rejected": "Sea?", "r_rejected": "Blue.", "group": 2}
    faulty = {**ONE_LIST, "previous": [1, 2], "third": 5, "group": None}
    several = [[ONE_LIST, faulty], [pair(margin_rewards=[1, 2], group="b"), pair(1)], [joint]]
    for at, raw in enumerate(several):
        examples = read(tmp_path, *raw)
        rows = [unconditioned(example) for example in examples]
        if at < 2:
            rows, _ = relabel_all(examples, _recipe(examples))
        write_relabelled(tmp_path / str(at), {"train": rows}, None, file_format=file_format)
        again = read_relabelled(tmp_path / str(at)).read()
        assert again == rows
        assert all("train." in row.place and row.place.rpartition(":")[2].isdigit() for row in again)


# --- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "remedy"),
    [
        ("third", "a text third"),
        ("third_reference", "a text third"),
        ("rationale", "why the better response is better"),
        ("previous", "previous_chosen"),
        ("groups", "a text or number group"),
        ("token_weights", '"weight"'),
        ("margins", "or another objective"),
        ("instructions", "i_chosen"),
        ("attributes", "NAME_chosen"),
    ],
)
def test_a_missing_column_is_named_with_its_remedy(ready: Preparer, column: str, remedy: str) -> None:
    """Finds: a run that starts, or rows silently lost, where the data lack what the objective reads."""
    given = {
        "third": "x", "rationale": "x", "previous": [1, 2], "group": 1, "token_weights": [PIECES, WORSE], "margins": 1,
    }  # fmt: skip
    rows = [pair(0, **given), pair(1), pair(2)]
    n = 3 if column in ("instructions", "attributes") else 2
    with pytest.raises(DataError) as error:
        ready(rows, "policy", "reference", column)
    name = column.removesuffix("_reference")
    assert f"{name}: {n} of 3 rows (first rows.jsonl:{4 - n}): " in str(error.value)
    assert remedy in str(error.value)


def test_all_missing_columns_are_said_at_once(ready: Preparer) -> None:
    with pytest.raises(DataError, match=r"(?s)gold: 1 of 1 row .*third: 1 of 1 row"):
        ready([pair()], "third", "gold", "state", "overlap", "token_kl", "weights", "lengths")


def test_unscored_data_have_no_scores_and_no_win_rates_of_their_own(ready: Preparer) -> None:
    """Finds: zeros in the place of scores."""
    plain = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    for column in ("scores", "win_rates"):
        with pytest.raises(DataError, match=f"{column}: 1 of 1 row"):
            ready([plain], column)
    (row,) = ready([{**plain, "win_rates": [0.75, 0.25]}], "win_rates").train
    assert row.extras["win_rates"] == (0.75, 0.25)


def test_texts_of_one_prompt_are_refused_where_each_response_has_its_own(ready: Preparer) -> None:
    joint = {"i_chosen": "Sky?", "r_chosen": "Blue.", "i_rejected": "Sea?", "r_rejected": "Grey."}
    for column in ("third", "mismatched"):
        with pytest.raises(DataError, match="the responses have two"):
            ready([{**joint, "third": "x"}] * 2, column)
    scores = {"score_chosen": 9, "score_rejected": 2}
    with pytest.raises(DataError, match=r"cannot state a goal.*relabel out"):
        ready([{**joint, **scores}], "reference", relabel={})
    (row,) = ready([joint], "reference", "instructions", "instructions_reference").train
    assert list(row.texts) == ["instructions"] and not row.extras


def test_a_rationale_of_more_than_two_responses_is_refused(ready: Preparer) -> None:
    with pytest.raises(DataError, match="compares two responses"):
        ready([ONE_LIST], "rationale")


# --- what is derived -----------------------------------------------------------------------------


def test_a_group_that_is_not_trained_on_is_refused(ready: Preparer, tmp_path: Path) -> None:
    """Finds a weight for a group that no step ever sees, which takes its share of every loss."""
    valid = write(tmp_path / "valid.jsonl", [pair(9, group="sea"), pair(10, group="air")])
    with pytest.raises(DataError, match=r"1 row \(first .*:2\) of a group that is not trained on; there is sea"):
        ready([pair(n, group="sea") for n in range(3)], "groups", valid=str(valid))


def test_groups_are_counted_over_all_splits(ready: Preparer, tmp_path: Path) -> None:
    """Finds: an index that depends on the split, on a hash seed, or on how a file writes a number."""
    valid = write(tmp_path / "valid.jsonl", [pair(9, group=2), pair(10, group="10")])
    found = ready([pair(n, group=g) for n, g in enumerate((30, 2.0, 10))], "groups", valid=str(valid))
    assert found.groups == ("2", "10", "30")
    assert [row.extras["groups"] for row in found.train] == [2, 0, 1]
    assert [row.extras["groups"] for row in found.valid] == [0, 1]
    named = ready([pair(n, group=g) for n, g in enumerate(("sea", 3, "air"))], "groups")
    assert named.groups == ("3", "air", "sea")
    batch = one_batch(named.train, "groups")
    assert batch.extras["groups"].tolist() == [2, 0, 1] and batch.extras["groups"].dtype == np.int32
    assert ready([pair(group="a")]).groups == ()


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_win_rates_are_those_of_the_rewards(ready: Preparer) -> None:
    """Finds: raw scores under a goal, which would call the response that was not asked for the winner."""
    row = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 1, 2]}
    (plain,) = ready([row], "win_rates").train
    s = (3, 2, 1)
    expected = [sum(sigma(a - b) for b in s) / 3 for a in s]
    np.testing.assert_allclose(plain.extras["win_rates"], expected, rtol=1e-12)
    options = {"mapping": "identity", "score_range": [1, 3]}
    for found in ready([row], "win_rates", relabel=options).train:
        rewards = [-((found.goal - score) ** 2) for score in found.scores]
        expected = [sum(sigma(a - b) for b in rewards) / 3 for a in rewards]
        np.testing.assert_allclose(found.extras["win_rates"], expected, rtol=1e-12)


def test_win_rates_of_the_data_say_nothing_of_a_goal(ready: Preparer) -> None:
    given = pair(win_rates=[0.9, 0.1])
    found = ready([given], "win_rates", relabel={})
    for row in found.train:
        assert row.extras["win_rates"] == pytest.approx((0.75, 0.25), abs=1e-6)
    assert any("not the data's" in line for line in found.said)
    found = ready([given], "win_rates")
    assert found.train[0].extras["win_rates"] == (0.9, 0.1)
    assert not any("not the data's" in line for line in found.said)


def attributed(n: int = 0, **changes: Any) -> dict[str, Any]:
    return pair(n, wit_chosen=5, wit_rejected=1, art_chosen=2, art_rejected=4.5, **changes)


def test_attributes_stand_by_name(ready: Preparer) -> None:
    (row,) = ready([attributed(previous=[1, 2])], "attributes").train
    assert row.extras["attributes"] == ((2.0, 5.0), (4.5, 1.0))  # art, wit
    batch = one_batch([row, row], "attributes", "scores")
    assert batch.extras["attributes"].shape == (2, 2, 2) and batch.extras["attributes"].dtype == np.float32
    with pytest.raises(DataError, match=r"1 of 2 rows \(first rows.jsonl:2\): no art, wit: every row must have"):
        ready([attributed(), pair(1)], "attributes")


def test_attributes_under_a_goal_add_up_to_the_reward(ready: Preparer) -> None:
    """Finds: raw attributes, or those of another scale, where rewards under the goal are meant."""
    options = {"attributes": ["wit", "overall", "art"], "score_range": [1, 5], "number_format": 1}
    found = ready([attributed()], "attributes", "scores", relabel=options).train
    assert len(found) == 2
    for row in found:
        by_name = np.array(row.extras["attributes"])
        assert by_name.shape == (2, 3)
        np.testing.assert_allclose(by_name.sum(1), -np.array(row.extras["goal_distances"]), atol=1e-6)
        np.testing.assert_allclose(one_batch([row], "scores").scores[0], by_name.sum(1), rtol=1e-6)
        assert not by_name[0].any() and by_name[1].all()


def test_a_goal_of_one_number_has_no_attributes(ready: Preparer) -> None:
    with pytest.raises(DataError, match="a goal that is one number says nothing of other scores"):
        ready([attributed()], "attributes", relabel={})


def test_scores_are_rewards_under_the_goal(ready: Preparer) -> None:
    """Finds: a preferred response with the lower reward in every rejected half."""
    chosen, rejected = ready([pair()], "scores", relabel={"mapping": "identity"}).train
    batch = one_batch([chosen, rejected], "scores")
    assert batch.scores.tolist() == [[0.0, -25.0], [0.0, -25.0]]
    assert (chosen.scores, rejected.scores) == ((9.0, 4.0), (4.0, 9.0))
    assert one_batch(ready([pair()], "scores").train, "scores").scores.tolist() == [[9.0, 4.0]]


# --- arrays --------------------------------------------------------------------------------------


def tokens(*ids: list[int], **extras: Any) -> Tokenized:
    found = tuple(np.array(one, np.int32) for one in ids)
    return Tokenized(np.array([1, 2], np.int32), found, "x", extras=extras)


def test_divergence_begins_where_the_responses_part() -> None:
    """Finds: a shared beginning that counts, or the first token that differs left out."""
    rows = [tokens([5, 6, 7, 9], [5, 6, 8]), tokens([4, 9], [5, 9, 9]), tokens([5, 6], [5, 6, 6])]
    batch = one_batch(rows, "divergence")
    found = batch.extras["divergence"]
    assert found.dtype == np.float32 and found.shape == batch.mask.shape
    expected = [[[0, 0, 1, 1], [0, 0, 1]], [[1, 1], [1, 1, 1]], [[0, 0], [0, 0, 1]]]
    for b, k in np.ndindex(3, 2):
        n = len(rows[b].response_ids[k])
        assert found[b, k, :n].tolist() == expected[b][k]
        assert not found[b, k, n:].any()
    (three,) = one_batch([tokens([5, 6, 7], [5, 6, 8], [5, 1, 1])], "divergence").extras["divergence"]
    assert three[:, :3].tolist() == [[0, 1, 1]] * 3


def test_weights_of_tokens_are_laid_out_only_when_asked_for() -> None:
    weights = (np.array([0.5, 1.5], np.float32), np.array([2.0], np.float32))
    rows = [tokens([5, 6], [7], token_weights=weights), tokens([7], [5, 6], token_weights=weights[::-1])]
    batch = one_batch(rows, "token_weights")
    assert batch.extras["token_weights"][:, :, :3].tolist() == [
        [[0.5, 1.5, 0], [2, 0, 0]],
        [[2, 0, 0], [0.5, 1.5, 0]],
    ]
    assert one_batch(rows).extras == {}
    with pytest.raises(DataError, match="'token_weights'"):
        one_batch([tokens([5], [7])], "token_weights")


def test_margin_rewards_of_several_objectives(ready: Preparer) -> None:
    rows = [pair(0, margin_rewards=[[1, 2], [3, 4]]), pair(1, margin_rewards=[[5, 6], [7, 8]])]
    found = ready(rows, "margin_rewards").train
    assert one_batch(found, "margin_rewards").extras["margin_rewards"].tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert widths_of(found[0]) == {"margin_rewards": 2, "goal_distances": 0}
    uneven = [*rows, pair(2, margin_rewards=[1, 2])]
    with pytest.raises(DataError, match=r"1 \(first rows.jsonl:3\) and 2 \(first rows.jsonl:1\)"):
        ready(uneven, "margin_rewards")
    assert len(ready(uneven).train) == 3


def test_columns_every_row_has() -> None:
    ids = (np.array([1], np.int32),)
    rows = [replace(tokens([1], [2], a=1, b=2), texts={"third": ids, "gold": ids}), tokens([1], [2], b=3)]
    assert available_columns(rows) == {"b", "divergence"}
    assert available_columns(rows[:1]) == {
        "a", "b", "divergence", "third", "third_reference", "gold", "gold_reference",
    }  # fmt: skip
    assert "scores" in available_columns([replace(rows[0], scores=(1.0, 2.0))])
    assert texts_of(["policy", "third_reference", "scores", "gold", "third"]) == ("gold", "third")


def test_places_of_rows_are_no_part_of_them() -> None:
    row = Conditioned((Message("user", "q"),), ("a", "b"), None, None, None, None, "e")
    assert row == replace(row, where="x:1") and (row.place, replace(row, where="x:1").place) == ("e", "x:1")
