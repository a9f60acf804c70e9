"""Diagnosis: of runs broken on purpose the right sentence comes first, and nothing is said of healthy ones."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_runs
import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.data.door import LEFT_OUT
from mlxpref.data.overview import overview
from mlxpref.data.tokens import TOO_LONG
from mlxpref.diagnosis import diagnose, read_record
from mlxpref.errors import DataError, RunError
from mlxpref.records import Tokenized

ROOT = Path(__file__).resolve().parent.parent


def said(folder: Path) -> list[tuple[str, str]]:
    return [(one.name, one.severity) for one in diagnose(read_record(folder))]


def at_end(**values: Any) -> Callable[[int, int], dict[str, float]]:
    """These from half of the run on."""
    return lambda step, n: {key.replace("__", "/"): value for key, value in values.items()} if 2 * step > n else {}


def test_nothing_is_said_of_a_healthy_run(tmp_path: Path) -> None:
    assert said(fake_runs.write_run(tmp_path / "run")) == []


APART = {"rewards/chosen": -8.0, "rewards/rejected": -8.0, "loss": 7.0}
FAINT = {"rewards/chosen": -1e-3, "rewards/rejected": -1.1e-3, "loss": 0.693}
STILL = {"rewards/chosen": 1e-5, "rewards/rejected": -1e-5, "rewards/accuracies": 0.52}
OF_FOUR = {"chosen_half/rewards/accuracies": 1.0, "rejected_half/rewards/accuracies": 1 / 3}  # by score, goal or not
ONE_SIDED = {"chosen_half/rewards/accuracies": 0.9, "rejected_half/rewards/accuracies": 0.12}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("learning-rate-too-high", {"metrics": at_end(**APART), "evaluated": at_end(**APART)}),
        (
            "no-warm-up",
            {
                "metrics": lambda step, n: APART if step > 2 else {}, "evaluated": at_end(**APART),
                "settings": {"optimizer.schedule.warmup_ratio": 0},
            },
        ),
        (
            "beta-too-small",
            {
                "metrics": at_end(**FAINT), "evaluated": at_end(**FAINT),
                "settings": {"objective": {"name": "dpo", "beta": 1e-5}},
            },
        ),
        ("learning-rate-too-low", {"metrics": at_end(**STILL), "evaluated": at_end(**STILL)}),
        ("nothing-trained", {"metrics": lambda step, n: {"grad_norm": 0.0}}),
        ("labels-flipped", {"evaluated": at_end(rewards__accuracies=0.2)}),
        ("goal-ignored", {"evaluated": at_end(**ONE_SIDED)}),
        ("other-reference", {"metrics": lambda step, n: {"rewards/chosen": -0.9}}),
        ("skipped-steps", {"metrics": at_end(skipped_steps=7)}),
        ("too-long", {"evaluated": lambda step, n: {"loss": 1.2 + 0.4 * (step / n - 0.25)}}),
        (
            "margins-saturated",
            {
                "metrics": at_end(rewards__accuracies=1.0),
                "evaluated": lambda step, n: {"loss": 1.2 + 0.4 * (step / n - 0.25)},
            },
        ),
        ("chosen-less-likely", {"metrics": at_end(rewards__chosen=-1.2), "evaluated": at_end(rewards__chosen=-1.2)}),
        (
            "learning-rate-too-high",
            {
                "metrics": at_end(**{"logps/chosen": -600.0, "logps/rejected": -590.0, "loss": 9.0}), "every": 0,
                "settings": {"objective": {"name": "simpo"}},
            },
        ),
        ("goal-ignored", {"evaluated": at_end(**OF_FOUR), "data": {"responses_each": 4.0}}),
        ("contradicting-rows", {"data": {"contradicting": 80}}),
        ("responses-cut", {"data": {"cut": {"prompts": 0, "responses": 200}}}),
        ("length-decides", {"data": {"chosen_longer": 0.95, "equally_long": 0.0}}),
        ("length-decides", {"data": {"chosen_longer": 0.02, "equally_long": 0.01}}),
        ("most-rows-dropped", {"counts": {"read/train": {"kept": 10, "dropped": {"empty response": 11}}}}),
        (
            "one-length",
            {"data": {"tokens": {"responses": {"p5": 10.0, "p50": 10.0, "p95": 11.0, "max": 30.0}}}},
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_comes_first(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Finds a rule that never fires, one that another drowns, and cause and effect in the wrong order."""
    found = said(fake_runs.write_run(tmp_path / "run", **options))
    assert found and found[0][0] == name and found[0][1] != "note"


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"counts": {"relabel/train": {"kept": 10, "dropped": {"tie: equal scores": 50}}}}, []),  # asked for
        ({"data": {"contradicting": 3}}, ["contradicting-rows"]),
        ({"evaluated": at_end(rewards__chosen=-0.3)}, ["chosen-less-likely"]),  # usual, and no fault
        ({"done": 20}, []),  # still going on
        ({"every": 0}, []),
        ({"settings": {"objective": {"name": "orpo"}}}, []),  # no reference: log-ratios mean nothing
        # a mean of log-probs has a β on another scale
        (
            {
                "settings": {"objective": {"name": "ipo_norm"}}, "metrics": at_end(rewards__chosen=0.07),
                "evaluated": at_end(rewards__chosen=0.07),
            },
            [],
        ),
        # within the warm-up
        ({"n_steps": 1000, "done": 120, "every": 0, "metrics": lambda step, n: STILL}, []),
        # a reference that follows the policy is near it, and ties with it
        (
            {
                "settings": {"reference.update": "hard", "reference.sync_steps": 10},
                "evaluated": lambda step, n: {**STILL, **ONE_SIDED, "rewards/accuracies": 0.0},
            },
            [],
        ),
        ({"counts": {"read/train": {"kept": 10, "dropped": {LEFT_OUT + "empty": 50}}}}, []),  # the examples are kept
        ({"data": {"chosen_longer": 1.0, "equally_long": 0.0, "examples": 3}}, []),
        ({"evaluated": at_end(rewards__accuracies=0.2), "n_valid": 4}, []),
        ({"evaluated": at_end(**ONE_SIDED), "n_valid": 4}, []),
        ({"evaluated": at_end(loss=1.22)}, []),
    ],
)
def test_no_wolf_is_cried(tmp_path: Path, options: dict[str, Any], notes: list[str]) -> None:
    assert said(fake_runs.write_run(tmp_path / "run", **options)) == [(name, "note") for name in notes]


# --- what was measured afterwards ---


BOTH = {value: {"form": value, "content": value} for value in (1, 8, 10)}


def goal(value: Any, mean: float, **more: Any) -> dict[str, Any]:
    return {
        "goal": value, "n": 40, "prompts": 40, "mean": mean, "interval": [mean - 0.5, mean + 0.5], "spread": [1, 9],
        "words": 20.0, "distinct": 0.9, **more,
    }  # fmt: skip


def stage(step: int, mean: float, nats: float, less_end: Any = None) -> dict[str, Any]:
    return {"step": step, "mean": mean, "interval": None, "nats": nats, "less_end": less_end}


def control(**changes: Any) -> dict[str, Any]:
    text = "one two three four five six seven eight nine ten"
    return {
        "per_goal": [goal(1, 2.0), goal(10, 8.0)], "spearman": 0.8,
        "recipe": {"goal_range": [1, 10], "top_goal": 10},
        "base": {"per_goal": [goal(None, 5.0)], "samples": [{"index": 0, "goal": None, "text": text, "score": 5}]},
        "samples": [{"index": 0, "goal": 10, "text": text, "score": 8}],
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, None),
        ({"spearman": 0.03}, "goal-does-not-steer"),
        ({"spearman": {"form": 0.02, "content": 0.05}}, "goal-does-not-steer"),
        ({"spearman": {"form": 0.02, "content": 0.7}}, None),
        ({"per_goal": [goal(1, 2.0), goal(10, 3.0)]}, "worse-than-base"),
        ({"per_goal": [goal(10, 8.0, words=50.0), goal(1, 2.0)]}, "length-drift"),
        ({"per_goal": [goal(10, 8.0), goal(1, 2.0, words=50.0)]}, None),
        ({"per_goal": [goal(1, 2.0), goal(10, 8.0, distinct=0.1)]}, "same-response"),
        ({"checkpoints": [stage(50, 7.0, 2.0, [-2, -1]), stage(100, 8.0, 9.0)]}, None),
        ({"checkpoints": [stage(50, 8.1, 2.0, [-0.2, 0.4]), stage(100, 8.0, 9.0)]}, None),
        ({"checkpoints": [stage(50, 9.0, 2.0, [0.2, 1.8]), stage(100, 8.0, 9.0)]}, "over-optimised"),
        ({"per_goal": [goal(None, 3.0)], "spearman": None, "recipe": None}, "worse-than-base"),
        ({"per_goal": [goal(None, 3.0)], "spearman": None}, None),  # not what it was trained to do
        ({"per_goal": [goal(1, 1.5), goal(3, 3.0)]}, None),  # asked for 3, it writes 3: better was not asked for
        ({"spearman": -1.0, "per_goal": [goal(1, 8.4, prompts=1), goal(10, 8.5, prompts=1)]}, "too-few-goals"),
        ({"spearman": 0.0, "per_goal": [goal(9, 8.4), goal(10, 8.5)]}, "too-few-goals"),
        ({"spearman": {"form": 0.0}, "per_goal": [goal(BOTH[8], 8), goal(BOTH[10], 8)]}, "too-few-goals"),
        ({"spearman": {"form": 0.0}, "per_goal": [goal(BOTH[1], 8), goal(BOTH[10], 8)]}, "goal-does-not-steer"),
        ({"per_goal": [goal(10, 3.0, prompts=3, distinct=0.1)]}, None),
        ({"samples": [{"index": 0, "goal": 10, "text": "so it was " * 9, "score": 8}]}, "repetition"),
    ],
)
def test_what_is_written(tmp_path: Path, changes: dict[str, Any], name: str | None) -> None:
    folder = fake_runs.write_run(tmp_path / "run")
    (folder / "control.json").write_text(json.dumps(control(**changes)))
    assert [one for one, _ in said(folder)] == ([] if name is None else [name])


@pytest.mark.parametrize(
    ("nats", "said_so"),
    [((2.0, 9.0), "(over-optimisation)"), ((9.0, 2.0), "learning rate")],
)
def test_the_checkpoint_to_use_is_named(tmp_path: Path, nats: tuple[float, float], said_so: str) -> None:
    folder = fake_runs.write_run(tmp_path / "run")
    stages = [stage(50, 6.0, 1.0, [-3, -1]), stage(100, 9.0, nats[0], [0.2, 1.8]), stage(150, 8.0, nats[1])]
    (folder / "control.json").write_text(json.dumps(control(checkpoints=stages)))
    (found,) = diagnose(read_record(folder))
    assert "9.00 at step 100" in found.evidence and "8.00 at step 150" in found.evidence
    assert "checkpoints/step-000100" in found.change and said_so in found.what + found.cause


@pytest.mark.parametrize(
    ("sensitivity", "change", "names"),
    [
        ({"mean": 4.0, "error": 0.3, "examples": 50}, 0.1, []),
        ({"mean": 0.1, "error": 0.3, "examples": 50}, 0.1, ["goal-ignored"]),
        ({"mean": 4.0, "error": 2.1, "examples": 5}, 0.1, ["too-few-examples"]),
        ({"mean": 4.0, "error": 0.3, "examples": 50}, -0.2, ["good-responses-unlearnt"]),
        ({"mean": -6.0, "error": 0.3, "examples": 50}, 0.1, ["goal-reversed"]),
        ({"mean": -1.5, "error": 0.3, "examples": 50}, 0.1, ["goal-reversed"]),
        ({"mean": -0.9, "error": 0.1, "examples": 50}, 0.1, ["goal-ignored"]),
        ({"mean": -1.5, "error": 0.9, "examples": 50}, 0.1, ["goal-ignored"]),
        ({"mean": None, "error": None, "examples": 0}, None, []),
    ],
)
def test_what_is_preferred(tmp_path: Path, sensitivity: Any, change: float | None, names: list[str]) -> None:
    folder = fake_runs.write_run(tmp_path / "run")
    view = {"change": {"high_score_rejected": {"responses": 40, "sum": change, "per_token": change}}}
    found: Any = {"views": {"unconditioned": view}, "goal_sensitivity": sensitivity, "high_score": 8.0}
    (folder / "evaluation.json").write_text(json.dumps(found))
    found["views"]["rejected"] = {"change": {"high_score_rejected": {"responses": 40, "sum": 1.0, "per_token": 0.1}}}
    kept = folder.with_name("with-goals")
    fake_runs.write_run(kept)
    (kept / "evaluation.json").write_text(json.dumps(found))
    assert "good-responses-unlearnt" not in [name for name, _ in said(kept)]  # likely under their own score
    found = said(folder)
    assert [name for name, _ in found] == names
    assert all((severity == "note") == (sensitivity["examples"] == 5) for _, severity in found)  # too few to tell


@pytest.mark.parametrize(
    ("responses", "others", "cause"),
    [(40, -0.2, "All responses have become less likely"), (40, 0.3, "Perhaps few rows ask for such"), (9, -0.2, None)],
)
def test_why_good_responses_are_unlearnt(tmp_path: Path, responses: int, others: float, cause: str | None) -> None:
    """Finds a cause that was never looked at, and an alarm over a handful of responses."""
    folder = fake_runs.write_run(tmp_path / "run")
    change = {"high_score_rejected": {"responses": responses, "sum": -2.0, "per_token": -0.1}}
    change |= {"rejected": {"per_token": others}, "chosen": {"per_token": -0.4}}  # is meant to fall: not its goal
    chosen = {"change": {"chosen": {"per_token": others}}}
    sensitivity = {"mean": 4.0, "error": 0.3, "examples": 50}
    views = {"rejected": {"change": change}, "chosen": chosen}
    found = {"views": views, "goal_sensitivity": sensitivity, "high_score": 8.0}
    (folder / "evaluation.json").write_text(json.dumps(found))
    causes = [one.cause for one in diagnose(read_record(folder))]
    assert (not causes) if cause is None else causes[0].startswith(cause)


# --- reading ---


def test_a_line_being_written_is_no_line_yet(tmp_path: Path) -> None:
    folder = fake_runs.write_run(tmp_path / "run", done=7)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert read_record(folder).step == 7
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 8"):
        read_record(folder)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config.yaml and no run.json"):
        read_record(tmp_path)
    with pytest.raises(RunError, match="no step was made"):
        read_record(fake_runs.write_run(tmp_path / "run", done=0))
    folder = fake_runs.write_run(tmp_path / "older")
    (folder / "run.json").write_text('{"starts": [1]}')
    with pytest.raises(RunError, match="no data, model, plan"):
        read_record(folder)
    folder = fake_runs.write_run(tmp_path / "other")
    (folder / "evaluation.json").write_text('{"rate": 1}')
    with pytest.raises(DataError, match="not what mlxpref evaluate --json writes now"):
        read_record(folder)


# --- the data's figures ---


def row(name: str, prompt: int, responses: list[list[int]], **more: Any) -> Tokenized:
    ids = tuple(np.array(one, np.int32) for one in responses)
    return Tokenized(np.array([prompt], np.int32), ids, name, **more)


def test_figures_of_rows() -> None:
    """Finds halves counted as contradictions (their prompts differ), lists compared with themselves, scores swapped."""
    rows = [
        row("a", 1, [[1, 2, 3], [4]], scores=(8.0, 2.0), half="chosen"),
        row("a", 2, [[4], [1, 2, 3]], scores=(2.0, 8.0), half="rejected"),
        row("b", 3, [[5], [6]], scores=(5.0, 5.0), half="chosen", response_cut=(0, 1)),
        row("b", 3, [[6], [5]], scores=(5.0, 5.0), half="rejected", prompt_cut=2),
        row("c", 4, [[7], [7, 7], [7, 7, 7]], scores=(1.0, 8.0, 2.0)),
    ]
    found = overview(rows)
    assert (found["rows"], found["examples"], found["contradicting"]) == (5, 3, 2)
    assert found["cut"] == {"prompts": 1, "responses": 1}
    assert found["chosen_longer"] == pytest.approx(2 / 4) and found["equally_long"] == pytest.approx(1 / 4)
    assert found["tokens"]["chosen"]["max"] == 3 and found["tokens"]["rejected"]["p50"] == 1
    edges, chosen = found["scores"]["edges"], found["scores"]["chosen"]
    assert len(edges) == 5 and chosen == [0, 0, 1, 2] and found["scores"]["rejected"] == [1, 2, 1, 0]
    assert found["scores"]["values"] == [1, 2, 5, 8]
    assert all(low < value < high for low, value, high in zip(edges, (1, 2, 5, 8), edges[1:], strict=False))
    assert overview([row("u", 1, [[1], [2]])])["scores"] is None


# --- the command, and runs of the sandbox ---


def test_of_one_kind_the_worst_is_kept(tmp_path: Path) -> None:
    """Finds a warning of the curves that hides the evaluation's alarm."""
    both = {f"{name}_half/rewards/accuracies": 0.54 for name in ("chosen", "rejected")}
    folder = fake_runs.write_run(tmp_path / "run", evaluated=at_end(**both))
    assert said(folder) == [("goal-ignored", "warning")]
    sensitivity = {"mean": 0.0, "error": 0.01, "examples": 500}
    (folder / "evaluation.json").write_text(json.dumps({"views": {}, "goal_sensitivity": sensitivity}))
    assert said(folder) == [("goal-ignored", "alarm")]


def test_the_remedy_is_for_what_was_dropped(tmp_path: Path) -> None:
    counts = {"tokenize/train": {"kept": 10, "dropped": {TOO_LONG: 50}}}
    (found,) = diagnose(read_record(fake_runs.write_run(tmp_path / "run", counts=counts)))
    assert "tokenization.max_length" in found.change and "columns" not in found.change


def test_the_command_says_it(tmp_path: Path) -> None:
    from mlxpref.cli import main

    good = fake_runs.write_run(tmp_path / "good")
    bad = fake_runs.write_run(tmp_path / "bad", data={"contradicting": 500})
    ran = CliRunner().invoke(main, ["diagnose", str(good), str(bad), "--json", str(tmp_path / "found.json")])
    assert ran.exit_code == 0 and "Nothing looks wrong" in ran.stdout
    assert "wrong: Rows contradict each other" in ran.stdout and "relabel.ties: drop" in ran.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(one["findings"]) for one in found] == [0, 1]
    assert CliRunner().invoke(main, ["diagnose", str(tmp_path)]).exit_code == 1


@pytest.mark.mlx
@pytest.mark.slow
def test_runs_broken_on_purpose_are_told_apart(tmp_path: Path) -> None:
    """The real thing: what a rule was tried on by hand may be nothing a run ever does."""
    pytest.importorskip("mlx.core")
    spec = importlib.util.spec_from_file_location("broken_runs", ROOT / "scripts" / "broken_runs.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    names = ("healthy", "beta-tiny", "labels-flipped", "goals-shuffled", "no-warm-up", "ties-kept")
    found = {}
    for name in names:
        run = read_record(script.make(name, tmp_path))
        loud = [one.name for one in diagnose(run) if one.severity != "note"]
        found[name] = loud[0] if loud else None
    assert found == {name: script.RUNS[name].wanted for name in names}
