"""The quickstart stage by stage, without training.

Finds: held-out requests that are not, goals that were not shuffled, figures of another view, goal or scorer, a run or
measurement taken for one of other data, settings or weights.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_quickstart import BASE, DEAF, STEERED, measured

from mlxpref.data.recipe import Recipe
from mlxpref.data.relabel_sources import relabel_sources
from mlxpref.data.relabelled import read_relabelled, write_relabelled
from mlxpref.data.sources import SourceSpec
from mlxpref.evaluate.control import Sample, curve_of, spearman
from mlxpref.runs import RunFolder
from mlxpref.sandbox import findings, gold, quickstart, trials, world
from mlxpref.sandbox.measured import TOP, Measured, keep, kept


def stage(tmp_path: Path, size: trials.Size = trials.QUICK, seed: int = 3) -> Any:
    return quickstart._Quickstart(tmp_path, seed, size, trials.TRIALS, quickstart.Watch())


def test_held_out_requests_are_of_scenes_that_are_held_out() -> None:
    for n in (60, 200):
        found = quickstart.held_out(n)
        assert len(found) == n
        assert {world.read_scene(e.prompt[-1].content).split for e in found} == {"test"}


def test_shuffled_goals_say_nothing_and_nothing_else_changes(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(quickstart.clear_pairs(600))
    done = relabel_sources([SourceSpec(path=str(tmp_path / "pairs.jsonl"))], {"mapping": "identity"})
    write_relabelled(tmp_path / "a", done.splits, done.recipe)
    quickstart.write_shuffled(tmp_path / "a", tmp_path / "b", seed=1)
    before, after = (read_relabelled(tmp_path / name).read() for name in "ab")
    assert Counter(row.goal for row in before) == Counter(row.goal for row in after)
    assert [(r.example_id, r.half, r.responses) for r in before] == [(r.example_id, r.half, r.responses) for r in after]
    assert all(row.prompt[0].content.endswith(f"Overall score: {row.goal:g}.") for row in after)
    own = [row.scores[0] for row in after]
    assert spearman([row.goal for row in before], own) == pytest.approx(1)
    assert abs(spearman([row.goal for row in after], own)) < 0.12  # 4 standard errors of 1200 rows


def test_controls_change_what_they_are_named_for(tmp_path: Path) -> None:
    main = trials.REWARD_AUGMENTED
    assert (
        replace(trials.SHUFFLED, name=main.name, title=main.title, shuffled=False)
        == main
        != replace(trials.SHUFFLED, name=main.name, title=main.title)
    )
    together = {}
    for trial in (*trials.TRIALS, *trials.CONTROLS):
        config = trials.configuration(trial, tmp_path, tmp_path, trials.QUICK, seed=0, store=tmp_path)
        together[trial.name] = config.batching.keep_together
    assert [name for name, kept_ in together.items() if not kept_] == ["apart"]


@pytest.mark.parametrize(("trial", "wanted"), [(trials.REWARD_AUGMENTED, -2.0), (trials.DPO, -4.0)])
def test_displacement_is_of_good_rejected_as_the_model_is_asked(
    tmp_path: Path, monkeypatch: Any, trial: Any, wanted: float
) -> None:
    def change(sum_: float) -> dict[str, Any]:
        return {
            "change": {
                "high_score_rejected": {"sum": sum_, "per_token": 91.0, "responses": 28},
                "rejected": {"sum": 92.0},
                "chosen": {"sum": 93.0},
            }
        }

    seen: list[Any] = []

    def evaluate(examples: Any, *args: Any, **options: Any) -> Any:
        seen.append((len(examples), min(min(one.scores) for one in examples), options["high_score"]))
        views = {"chosen": change(-1.0), "rejected": change(-2.0), "top": change(-3.0), "unconditioned": change(-4.0)}
        return SimpleNamespace(metrics={"goal_sensitivity": {"mean": 5.0, "error": 0.5}, "views": views})

    monkeypatch.setattr(quickstart, "evaluate", evaluate)
    found = stage(tmp_path)._judged(None, SimpleNamespace(fingerprint="x"), Recipe(), trial)
    assert found == {"sensitivity": (5.0, 0.5), "displaced": (wanted, 28)}
    assert [n for n, _, _ in seen] == [trials.QUICK.judged, len(quickstart.good_losers())]
    assert seen[1][1:] == (quickstart.HIGH, quickstart.HIGH) and seen[0][1] < quickstart.HIGH


def test_good_losers_lose_and_are_good() -> None:
    pairs = quickstart.good_losers()
    assert len(pairs) > 20
    assert all(quickstart.HIGH <= min(one.scores) < max(one.scores) for one in pairs)
    assert {world.read_scene(one.prompt[-1].content).split for one in pairs} == {"test"}


def test_answers_are_asked_and_judged_as_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    def control_curve(questions: Any, goals: Any, scorer: Any, *args: Any, **options: Any) -> None:
        seen.update(options, n=len(questions), goals=goals, scorer=scorer)

    monkeypatch.setattr(quickstart, "control_curve", control_curve)
    stage(tmp_path)._curve(None, None, Recipe(), (None, 2.0))
    assert seen["scorer"] is gold.score and seen["goals"] == (None, 2.0)
    assert (seen["n"], seen["seed"], seen["top"], seen["temperature"]) == (60, 3, TOP, quickstart.TEMPERATURE)


def test_other_pairs_other_runs(tmp_path: Path, monkeypatch: Any) -> None:
    """Finds: a finished run taken for one of other pairs."""
    one, two = stage(tmp_path), stage(tmp_path)
    first = one._data()
    assert first == two._data()
    monkeypatch.setattr(quickstart, "GAP", 4)
    assert not set(first) & set(two._data())


def test_a_measurement_is_known_again_by_all_that_made_it(tmp_path: Path, monkeypatch: Any) -> None:
    at = stage(tmp_path)
    config = trials.configuration(trials.DPO, tmp_path, tmp_path, trials.QUICK, seed=3, store=tmp_path)
    weights = tmp_path / "adapters.safetensors"
    weights.write_bytes(b"one")
    keys = [at._key(config, Recipe()), at._key(None, Recipe()), stage(tmp_path, seed=4)._key(config, Recipe())]
    for name, value in {"TEMPERATURE": 0.1, "MAX_TOKENS": 9, "HIGH": 8.0, "GOALS": (None, 1.0)}.items():
        with monkeypatch.context() as patch:
            patch.setattr(quickstart, name, value)
            keys.append(at._key(config, Recipe()))
    weights.write_bytes(b"two")
    keys.append(at._key(config, Recipe()))
    assert len(set(keys)) == len(keys)
    weights.write_bytes(b"one")
    assert at._key(config, Recipe()) == keys[0]


def test_samples_of_another_measurement_are_not_taken(tmp_path: Path) -> None:
    keep(STEERED, "key", tmp_path)
    figures = (tmp_path / "ra-dpo.json").read_text()
    keep(DEAF, "another key", tmp_path)
    (tmp_path / "ra-dpo.json").write_text(figures)
    with pytest.raises(quickstart.RunError, match="of another measurement"):
        kept("ra-dpo", "key", tmp_path, seed=0)


@pytest.mark.parametrize("lines", [0, 100])
def test_samples_cut_off_at_a_line_are_not_taken(tmp_path: Path, lines: int) -> None:
    keep(STEERED, "key", tmp_path)
    file = tmp_path / "ra-dpo.samples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(quickstart.RunError, match="delete it, and it is measured again"):
        kept("ra-dpo", "key", tmp_path, seed=0)


def test_a_cut_file_of_pairs_is_made_anew(tmp_path: Path) -> None:
    at = stage(tmp_path)
    pairs, _ = at._data()
    whole = pairs.read_bytes()
    for damaged in (whole[:1000], b"\xff\xfe"):
        pairs.write_bytes(damaged)
        assert at._data()[0].read_bytes() == whole


def test_intervals_and_top_shares_come_back(tmp_path: Path) -> None:
    samples = [Sample(i, None, "", float(i % 10)) for i in range(50)]
    curve = curve_of(samples, top=TOP, seed=7)
    keep(Measured("m", "M", False, curve), "key", tmp_path)
    again = kept("m", "key", tmp_path, seed=7)
    assert again is not None and again.curve == curve


def test_others_are_compared_by_what_they_score_without_a_goal() -> None:
    base, other = measured("base", "base", {None: 4.5, 10.0: 1.0}), measured("dpo", "DPO", {None: 8.0, 10.0: 2.0})
    said = " ".join(findings.sentences(base, STEERED, [other]))
    assert "10.00 against 4.50" in said and "10.00 against 8.00" in said


@pytest.mark.parametrize("turned", [False, True])
def test_a_weak_or_turned_dial_is_no_obedience(turned: bool) -> None:
    slope = -1.0 if turned else 0.1
    at = {None: 5.0, **{float(g): 5.0 + slope * (g - 5) for g in range(1, 11)}}
    said = " ".join(findings.sentences(BASE, measured("ra-dpo", "RA-DPO", at), []))
    assert "does not obey" in said


def found_of(tmp_path: Path) -> quickstart.Found:
    base, plain = measured("base", "base", {None: 4.5, 10.0: 1.0}), measured("dpo", "DPO", {None: 8.0, 10.0: 2.0})
    requests = tuple(f"request {i}" for i in range(20))
    return quickstart.Found(
        tmp_path, tmp_path / "p.jsonl", (base, STEERED, plain), requests, tmp_path / "c.png", ("one.",)
    )


def test_what_is_shown(tmp_path: Path, capsys: Any) -> None:
    """Finds: figures of another goal, model or request; a whole interval after ±; another adapter."""
    from mlxpref.cli.quickstart import show

    show(found_of(tmp_path))
    said = capsys.readouterr().out
    assert "> request 1\n  base (4): base None 1\n  asked for 2 (2): RA-DPO 2.0 1\n" in said
    half = (lambda i: (i[1] - i[0]) / 2)(STEERED.at(10).interval)
    rows = [line.split() for line in said.splitlines()]
    assert ["10", "10.00", "±", f"{half:.1f}", "100%"] in [row[:5] for row in rows]
    assert [row[2] for row in rows if row[:2] in (["base", "–"], ["DPO", "–"])] == ["4.50", "8.00"]
    assert "ra-dpo --goal 1 --goal 10" in said and "request 2" in said


def test_the_picture_has_the_others_without_a_goal(tmp_path: Path, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(quickstart, "draw_control_curve", lambda curves, file, **more: seen.update(more, curves=curves))
    stage(tmp_path)._found(tmp_path / "p", list(found_of(tmp_path).models))
    assert [(line.name, round(line.value, 2)) for line in seen["lines"]] == [("base", 4.5), ("DPO", 8.0)]
    assert [curve.name for curve in seen["curves"]] == ["RA-DPO"]
    assert json.loads((tmp_path / "seed-3-quick" / "results.json").read_text())["seed"] == 3


def write_adapter(folder: Path) -> None:
    """The smallest safetensors file, and a config."""
    (folder / "adapters.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (folder / "adapter_config.json").write_text("{}")


def test_a_run_with_other_settings_is_refused_and_a_finished_one_kept(tmp_path: Path, monkeypatch: Any) -> None:
    begun: list[Any] = []

    def train(config: Any, **options: Any) -> Any:
        begun.append(options["resume"])
        return SimpleNamespace(interrupted=None)

    monkeypatch.setattr(quickstart, "train", train)
    at = stage(tmp_path)
    config = trials.configuration(trials.DPO, tmp_path, tmp_path / "dpo", trials.QUICK, seed=3, store=tmp_path)
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "config.yaml").write_text(json.dumps(config.as_dict()))
    at._train(config)
    run = RunFolder(tmp_path / "dpo")
    run.save(trials.QUICK.steps, write_adapter, {}, keep_last=1)
    at._train(config)
    assert begun == [True], "a finished run is not begun again"
    (run.path / "adapters.safetensors").write_bytes(b"cut off")
    at._train(config)
    assert begun == [True, True], "an adapter that is not the last checkpoint's is put back"
    other = trials.configuration(trials.DPO, tmp_path, tmp_path / "dpo", trials.QUICK, seed=4, store=tmp_path)
    with pytest.raises(quickstart.RunError, match="other settings"):
        at._train(other)
