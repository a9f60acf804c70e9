"""A sweep: what is varied, what is refused, what survives a stop, and what stands in its table.

Finds: a comma that cuts a value in two, an option that reaches an objective it was not meant for, a combination that
is refused only after hours, seeds that change the data, a figure that depends on how often the sweep was stopped,
a failure that ends it, a change nobody notices.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_backend
import numpy as np
import pytest
from click.testing import CliRunner
from fake_backend import calls

from mlxpref import backends, cli
from mlxpref.ablate import Choices, Grid, Result, Sweep, Watch, asking, make_grid, parse_seeds, parse_vary
from mlxpref.ablate import sweep as sweep_module
from mlxpref.ablate.asked import folder_names, short_names
from mlxpref.ablate.measure import figures, rows_to_measure
from mlxpref.ablate.table import Table
from mlxpref.config_layers import parse_setting
from mlxpref.errors import ConfigError, DataError, MlxprefError, RunError, UsageError
from mlxpref.locks import locked
from mlxpref.records import Tokenized
from mlxpref.report import dots
from mlxpref.train import train

FILES = ("table.json", "table.csv", "table.md", "picture.png")
BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "d"}}


def grid_of(*vary: str, base: dict[str, Any] | None = None, settings: Any = (), seeds: str = "1", **more: Any) -> Grid:
    return make_grid(base or BASE, [parse_setting(text) for text in settings], parse_vary(vary), seeds, **more)


def labels(grid: Grid) -> list[str]:
    return [one.label for one in grid.combinations]


# --- what is varied ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("dpo,simpo", ["dpo", "simpo"]),
        ("null,{}", [None, {}]),
        ("[content, form],[form]", [["content", "form"], ["form"]]),
        ("{a: 1, b: 2}, {a: 3}", [{"a": 1, "b": 2}, {"a": 3}]),
        ("'a,b',c", ["a,b", "c"]),
        ("0.05,1", [0.05, 1]),
        ("true,", [True]),
    ],
)
def test_commas_part_values_but_not_what_is_inside_one(text: str, values: list[Any]) -> None:
    assert list(parse_vary([f"section.key={text}"])[0].values) == values


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["objective.beta"], "section.key=value"),
        (["objective.beta="], "section.key=value"),
        (["objective.beta=[0.1"], "not YAML"),
        (["objective.beta=0.1,,0.2"], "not YAML"),
        (["objective.beta=0.1", "objective.beta=0.2"], "given twice"),
        (["objective=dpo", "objective.name=ipo"], "keep one"),
        (["training.seed=1,2"], "--seeds"),
        (["output.adapter_path=a,b"], "--out"),
    ],
)
def test_what_cannot_be_varied(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_vary(texts)


def test_seeds_are_a_number_of_them_or_a_list() -> None:
    assert parse_seeds("3", 5) == (5, 6, 7)
    assert parse_seeds("1,5,7", 0) == (1, 5, 7)
    assert parse_seeds("9,", 0) == (9,)
    for wrong in ("0", "1,1", "x", "-1", "4294967296,", ","):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(wrong, 0)


def test_every_combination_runs_with_the_first_seed_before_any_runs_with_the_next() -> None:
    grid = grid_of("objective.name=dpo,ipo", "objective.beta=0.05,0.1", seeds="2")
    assert [point.name for point in grid.points] == [
        f"objective={name},beta={beta},seed={seed}"
        for seed in (0, 1) for name in ("dpo", "ipo") for beta in ("0.05", "0.1")
    ]  # fmt: skip
    config = grid.points[-1].config(Path("/s"))
    assert (config.objective, config.training.seed) == ({"name": "ipo", "beta": 0.1}, 1)
    assert config.output.adapter_path == "/s/runs/objective=ipo,beta=0.1,seed=1"
    assert config.reference.store == "/s/reference"
    kept = grid_of("objective.beta=0.1,1", base=BASE | {"reference": {"store": "/mine"}})
    assert kept.points[0].config(Path("/s")).reference.store == "/mine"


def test_names_of_folders_are_readable_and_differ() -> None:
    assert short_names(["objective.beta", "optimizer.options.beta", "objective.name", "x.seed"]) == {
        "objective.beta": "objective.beta", "optimizer.options.beta": "optimizer.options.beta",
        "objective.name": "objective", "x.seed": "x.seed",
    }  # fmt: skip
    values = ["a/b c", "a_b_c", "A_b_c", {}, None, True, ["a", "b"], "../..", "x" * 300, "x" * 301, "é"]
    names = folder_names([{"key": value} for value in values])
    assert len({name.casefold() for name in names}) == len(values)
    assert all(len(name) < 200 and "/" not in name and name.isascii() for name in names)
    assert names[1] == "key=a_b_c," and names[3:6] == ["key={},", "key=null,", "key=true,"]
    many = folder_names([{f"key{i}": i for i in range(60)}, {f"key{i}": i + (i == 59) for i in range(60)}])
    assert many[0] != many[1] and max(map(len, many)) < 200
    assert labels(grid_of("optimizer.learning_rate=1e-5,0.001")) == ["learning_rate=1e-05", "learning_rate=0.001"]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("vary", "words"),
    [
        (["objectiv.beta=0.1,1"], "did you mean objective"),
        (["optimizer.learning_rate=1e-5,fast"], "learning_rate: a number is needed.*\n    in learning_rate=fast"),
        (["objective.name=dpo,dop"], "dop: no such objective; did you mean"),
        (["objective.betta=0.1,1"], "dpo takes no option betta; did you mean beta"),
        (["objective.name=dpo,ipo", "objective.beta=0.1,-1"], "beta"),
        (["objective.name=sft", "objective.beta=0.1,1"], "sft takes no option beta"),
    ],
)
def test_what_no_combination_can_have_is_refused_whatever_is_skipped(vary: list[str], words: str, skip: bool) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        grid_of(*vary, skip_impossible=skip)
    assert "--skip-impossible" not in str(error.value)


def test_options_an_objective_does_not_take_are_refused_with_every_combination() -> None:
    vary = ("objective.name=dpo,sft", "objective.beta=0.05,0.1")
    with pytest.raises(ConfigError) as error:
        grid_of(*vary)
    for words in ("2 of 4 combinations", "--skip-impossible", "sft takes no option beta",
                  "in objective=sft, beta=0.05", "in objective=sft, beta=0.1"):  # fmt: skip
        assert words in str(error.value)
    grid = grid_of(*vary, skip_impossible=True)
    assert labels(grid) == ["objective=dpo, beta=0.05", "objective=dpo, beta=0.1", "objective=sft"]
    assert grid.combinations[2].config.objective == {"name": "sft"}
    assert any("sft takes no beta: objective=sft runs once" in note for note in grid.notes)


def test_combinations_that_contradict_themselves_can_be_left_out() -> None:
    vary = ("optimizer.name=adam,adamw", "optimizer.weight_decay=0,0.1")
    with pytest.raises(ConfigError, match=r"1 of 4 .*\n.*adam applies none.*\n    in name=adam, weight_decay=0.1"):
        grid_of(*vary)
    grid = grid_of(*vary, skip_impossible=True)
    assert labels(grid) == ["name=adam, weight_decay=0", "name=adamw, weight_decay=0", "name=adamw, weight_decay=0.1"]
    assert any("left out: name=adam, weight_decay=0.1" in note for note in grid.notes)


def test_keys_of_a_section_that_is_left_out_do_not_bring_it_back() -> None:
    vary = ("relabel=null,{}", "relabel.min_gap=0,2")
    with pytest.raises(ConfigError, match="relabel is null"):
        grid_of(*vary)
    grid = grid_of(*vary, skip_impossible=True)
    assert [one.config.relabel and one.config.relabel.min_gap for one in grid.combinations] == [None, 0, 2]


def test_one_run_under_two_names_is_refused() -> None:
    for vary in (["objective.beta=0.1,0.10"], ["optimizer.learning_rate=1e-5,0.00001"], ["objective=dpo,{beta: 0.1}"]):
        if "beta=" in vary[0] or "rate" in vary[0]:
            assert len(grid_of(*vary).combinations) == 1  # the same value twice is one
            continue
        with pytest.raises(ConfigError, match="two names"):
            grid_of(*vary)


def test_options_of_another_objective_in_the_base_are_not_the_varied_ones_own() -> None:
    base = BASE | {"objective": {"name": "dpo", "label_smoothing": 0.1}}
    for key in ("objective", "objective.name"):
        found = [one.config.objective for one in grid_of(f"{key}=dpo,simpo", base=base).combinations]
        assert found == [{"name": "dpo", "label_smoothing": 0.1}, {"name": "simpo"}]
    found = [one.config.objective for one in grid_of("objective=dpo,ipo", settings=["objective.beta=0.3"]).combinations]
    assert found == [{"name": "dpo", "beta": 0.3}, {"name": "ipo", "beta": 0.3}]
    with pytest.raises(ConfigError, match="--set and to --vary"):
        grid_of("objective.name=dpo,ipo", settings=["objective=simpo"])


def test_terms_of_a_sum_are_varied_by_their_place() -> None:
    base = BASE | {"objective": [{"name": "dpo"}, {"name": "sft", "weight": 0.1}]}
    grid = grid_of("objective.1.weight=0,1", base=base)
    assert [one.config.objective[1]["weight"] for one in grid.combinations] == [0, 1]
    with pytest.raises(ConfigError, match="index from 0 to 1"):
        grid_of("objective.name=dpo,ipo", base=base)


def test_alternatives_of_a_varied_key_leave_the_base() -> None:
    grid = grid_of("training.iters=5,9", base=BASE | {"training": {"epochs": 2}})
    assert [(one.config.training.iters, one.config.training.epochs) for one in grid.combinations] == [
        (5, None), (9, None),
    ]  # fmt: skip


def test_an_option_that_means_something_else_is_said() -> None:
    (note,) = grid_of("objective=dpo,simpo", "objective.beta=0.1,1").notes
    assert note.startswith("beta is not the same thing") and "dpo: " in note and "simpo: " in note
    assert not grid_of("objective=dpo", "objective.beta=0.1,1").notes


# --- what is measured ----------------------------------------------------------------------------


def row(example: str, *lengths: int, goal: Any = None, **more: Any) -> Tokenized:
    ids = tuple(np.full(n, 10 * k + n, np.int32) for k, n in enumerate(lengths))
    return Tokenized(np.array([1], np.int32), ids, example, goal=goal, **more)


def spread(*sums: float) -> list[np.ndarray]:
    """Token log-probs with these sums, over two tokens."""
    return [np.array([total / 4, 3 * total / 4], np.float32) for total in sums]


def test_figures_by_hand() -> None:
    """Two halves of a pair: chosen first under its own goal, last under the other's."""
    own = row("a", 2, 3, goal=9.0, half="chosen")
    other = Tokenized(own.prompt_ids, own.response_ids[::-1], "a", goal=2.0, half="rejected")
    # changes of log-prob: chosen +1, rejected -2 under the chosen's goal; rejected 0, chosen +2 under the other's
    found = figures([own, other], [spread(-1, -6), spread(-4, -1)], [spread(-2, -4), spread(-4, -3)])
    assert found == {
        "rows": 2, "accuracy": 0.5, "margin": (3 - 2) / 2, "ranking_accuracy": 0.5, "chosen": (1 + 0) / 2,
        "rejected": (-2 + 2) / 2, "sensitivity": (1 + 2) - (2 - 0),
    }  # fmt: skip


def test_ties_are_no_pairs() -> None:
    tied = row("a", 2, 2, scores=(5.0, 5.0))
    by_goal = row("b", 2, 2, 2, goal=5.0, scores=(4.0, 6.0, 1.0), extras={"goal_distances": (1.0, 1.0, 16.0)})
    found = figures([tied, by_goal], [spread(-9, 0), spread(-1, 0, -3)], [spread(0, 0), spread(-2, -2, -2)])
    assert (found["rows"], found["accuracy"], found["margin"]) == (1, 1.0, 2.0)
    assert figures([tied], [spread(0, 0)], [spread(0, 0)])["accuracy"] is None


def test_rows_to_measure_are_whole_examples_drawn_by_the_seed() -> None:
    rows = [row(str(i // 2), 2, 3) for i in range(40)]
    some = rows_to_measure(rows, 9, seed=0)
    assert len(some) == 10 and all(sum(r.example_id == one.example_id for r in some) == 2 for one in some)
    drawn = [[one.example_id for one in rows_to_measure(rows, 9, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(rows_to_measure(rows, None, seed=0)) == len(rows_to_measure(rows, 99, seed=0)) == 40


# --- sweeps --------------------------------------------------------------------------------------

WORDS = ["girl", "park", "play", "story", "cat", "dog", "hello", "capital", "France", "Paris"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 scored pairs, no two alike."""
    file, rng = tmp_path_factory.mktemp("data") / "pairs.jsonl", random.Random(0)
    rows = []
    for i in range(32):
        say = [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(3)]
        rows.append({
            "prompt": f"{say[0]} {i}?", "chosen": say[1], "rejected": say[2],
            "score_chosen": round(rng.uniform(6, 10), 1), "score_rejected": round(rng.uniform(1, 5), 1),
        })  # fmt: skip
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


@pytest.fixture(scope="session")
def base(pairs: Path, tiny_model_dir: Path) -> dict[str, Any]:
    """Goals that are the chosen's own: the NumPy model sees one token before, and would hear no other."""
    return {
        "model": {"path": str(tiny_model_dir)},
        "data": {"source": str(pairs), "valid_fraction": 0.25},
        "relabel": {"score_range": [1, 10], "mapping": "identity", "halves": "chosen"},
        "tokenization": {"max_length": 256},
        "batching": {"batch_size": 4},
        "adapter": {"lora_parameters": {"rank": 4, "scale": 1.0}},
        "optimizer": {"learning_rate": 1},
        "training": {"iters": 5, "steps_per_eval": 3, "save_every": 2, "steps_per_report": 3},
    }


VARY = ("objective=dpo,simpo", "objective.beta=0.1")
"""Four runs with two seeds."""


class Listener(Watch):
    """Remembers what it was told, and may send this process a signal at some step of some run."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.points: list[tuple[str, str]] = []
        self.data: list[int] = []
        self.notes: list[str] = []
        self.results: list[Result] = []
        self.stop = stop

    def on_data(self, data: Any, points: Any) -> None:
        self.data.append(len(points))

    def on_point(self, point: Any, place: int, total: int, state: str) -> None:
        self.points.append((point.name, state))

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_result(self, point: Any, result: Result) -> None:
        self.results.append(result)

    def on_step(self, step: int, metrics: Any) -> None:
        if (len(self.points), step) == self.stop:
            os.kill(os.getpid(), signal.SIGINT)


def answering(**changes: Any) -> Any:
    """The NumPy backend, which can also answer: the words an adapter likes best after a prompt."""

    def generate(policy: Any, prompts: Any, **options: Any) -> list[str]:
        return [f"{policy.weights['lora_b'].sum() + sum(ids):.6f}" for ids in prompts]

    return SimpleNamespace(**{**vars(fake_backend), "generate": generate, **changes})


def swept(
    base: dict[str, Any], out: Path, *vary: str, seeds: str = "2", listener: Listener | None = None,
    backend: Any = fake_backend, skip: bool = False, **choices: Any,
) -> Table:  # fmt: skip
    grid = make_grid(base, (), parse_vary(vary or VARY), seeds, skip_impossible=skip)
    return Sweep(grid, out, Choices(**choices), listener or Watch(), backend).go()


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="session")
def never_stopped(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "s"
    swept(base, out)
    return out


@pytest.fixture
def whole(never_stopped: Path, tmp_path: Path) -> Path:
    """A sweep that was never stopped; a copy to spoil."""
    shutil.copytree(never_stopped, tmp_path / "whole")
    return tmp_path / "whole"


def test_a_sweep_leaves_a_table_of_every_run(whole: Path) -> None:
    table = json.loads((whole / "table.json").read_text())
    assert [one["label"] for one in table["combinations"]] == [
        "objective=dpo, beta=0.1", "objective=simpo, beta=0.1",
    ]  # fmt: skip
    assert [(run["settings"]["objective"], run["seed"], run["status"]) for run in table["runs"]] == [
        (name, seed, "done") for name in ("dpo", "simpo") for seed in (0, 1)
    ]
    for index, one in enumerate(table["combinations"]):
        values = [run["figures"]["margin"] for run in table["runs"][2 * index : 2 * index + 2]]
        assert one["figures"]["margin"] == {
            "mean": statistics.fmean(values), "sd": pytest.approx(abs(values[0] - values[1]) / math.sqrt(2)), "n": 2,
        }  # fmt: skip
        assert values[0] != values[1]
    rows = list(csv.DictReader((whole / "table.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == [run["name"] for run in table["runs"]]
    assert float(rows[3]["accuracy"]) == table["runs"][3]["figures"]["accuracy"]
    assert float(rows[3]["eval_loss"]) == table["runs"][3]["evaluation"]["eval_loss"]
    text = (whole / "table.md").read_text()
    figure = table["combinations"][0]["figures"]["accuracy"]
    assert f"| dpo | 0.1 | 2 | {figure['mean']:.3f} ± {figure['sd']:.3f} |" in text
    assert "eval_loss is another quantity" in text


def test_what_was_measured_is_what_an_evaluation_finds(base: dict[str, Any], whole: Path) -> None:
    """A witness that knows β: the last evaluation of DPO, its rewards divided by β. Batches of all rows."""
    run = json.loads((whole / "results" / "objective=dpo,beta=0.1,seed=0.json").read_text())
    found, evaluated = run["figures"], run["evaluation"]
    assert found["rows"] == 8 and evaluated["step"] == 5
    assert found["accuracy"] == evaluated["eval_rewards/accuracies"]
    assert found["ranking_accuracy"] == evaluated["eval_ranking_accuracy"]
    for ours, theirs in (("margin", "margins"), ("chosen", "chosen"), ("rejected", "rejected")):
        assert found[ours] == pytest.approx(evaluated[f"eval_rewards/{theirs}"] / 0.1, abs=1e-4)
        assert abs(found[ours]) > 0.01


def test_data_are_read_once_and_references_computed_once(base: dict[str, Any], tmp_path: Path) -> None:
    listener = Listener()
    swept(base | {"training": {"epochs": 1}}, tmp_path / "s", listener=listener)
    assert listener.data == [4]
    counts = [note for note in listener.notes if "computed" in note]
    assert [" 0 rows computed" in note for note in counts] == [False, True], counts


def test_each_version_of_the_data_is_read_once(base: dict[str, Any], tmp_path: Path) -> None:
    listener = Listener()
    both = {**base, "relabel": {**base["relabel"], "halves": "both"}}
    table = swept(both, tmp_path / "s", "relabel=null,{}", listener=listener)
    assert listener.data == [2, 2]
    assert any("validation rows are not the same" in note for note in table.notes)
    sensitivity = [line.values("sensitivity") for line in table.lines]
    assert not sensitivity[0] and len(sensitivity[1]) == 2


def test_seeds_change_the_run_and_not_the_data(base: dict[str, Any], tmp_path: Path) -> None:
    table = swept(base, tmp_path / "s", "objective.beta=0.1", seeds="3,4")
    first, second = table.lines[0].done
    assert first.data == second.data and first.adapter != second.adapter
    alone = {**base, "training": {**base["training"], "seed": 4}, "output": {"adapter_path": str(tmp_path / "alone")}}
    own = grid_of("objective.beta=0.1", base=alone).combinations[0].config
    train(own, backend=fake_backend)
    facts = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert facts["data"]["fingerprint"] != second.data["fingerprint"], "witness: a seed alone parts the data anew"


def test_a_finished_sweep_computes_nothing_and_writes_the_same(base: dict[str, Any], whole: Path) -> None:
    before, updates, listener = files(whole), calls["update"], Listener()
    swept(base, whole, listener=listener)
    assert (files(whole), calls["update"], listener.points, listener.data) == (before, updates, [], [])


def test_more_values_and_seeds_keep_what_is_there(base: dict[str, Any], whole: Path) -> None:
    listener = Listener()
    swept(base, whole, "objective=dpo,simpo,ipo", "objective.beta=0.1", seeds="1", listener=listener)
    assert listener.points == [("objective=ipo,beta=0.1,seed=0", "new")]


# --- stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(1, 1), (3, 2), (2, 3), (4, 4)])
def test_stopped_and_gone_on_equals_never_stopped(
    base: dict[str, Any], whole: Path, tmp_path: Path, stop: tuple[int, int]
) -> None:
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt) as error:
        swept(base, out, listener=Listener(stop))
    assert error.value.args == (signal.SIGINT,)
    assert not (out / "table.json").exists()
    listener = Listener()
    swept(base, out, listener=listener)
    assert files(out) == files(whole)
    assert listener.points[0][1] == "unfinished" and len(listener.points) == 5 - stop[0]


def test_stopped_while_measuring_trains_nothing_again(
    base: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swept(base, tmp_path / "s")
    updates = calls["update"]
    swept(base, tmp_path / "s")
    assert calls["update"] == updates + 3 * 5
    assert files(tmp_path / "s") == files(whole)


@pytest.fixture
def command(base: dict[str, Any], tmp_path: Path) -> list[str]:
    """A sweep as its own process."""
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    runner = str(Path(__file__).parent / "run_fake.py")
    varied = [word for text in VARY for word in ("--vary", text)]
    return [sys.executable, runner, "ablate", "-c", str(tmp_path / "base.yaml"), *varied, "--seeds", "2", "--out",
            str(tmp_path / "s")]  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments_and_gone_on_equals_never_killed(
    command: list[str], whole: Path, tmp_path: Path
) -> None:
    """SIGKILL some times, wherever it is; then once to the end."""
    rng, slow = random.Random(), {"FAKE_STEP_SECONDS": "0.02", "FAKE_SAVE_SECONDS": "0.05"}
    results = tmp_path / "s" / "results"
    for _ in range(6):
        process = subprocess.Popen(command, env={**os.environ, **slow}, stdout=subprocess.DEVNULL)
        begun, held = time.monotonic(), len(list(results.glob("*.json")))
        while not list((tmp_path / "s" / "runs").glob("*/run.json")) and time.monotonic() < begun + 60:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
        assert len(list(results.glob("*.json"))) >= held
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "s") == files(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on(command: list[str], tmp_path: Path, number: int, code: int) -> None:
    slow = {**os.environ, "FAKE_STEP_SECONDS": "0.2"}
    process = subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "s" / "runs").glob("*/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "finishing this step" in err and f"--out {tmp_path / 's'}" in err.splitlines()[-1 - (code == 130)]
    assert "[1/4] objective=dpo, beta=0.1, seed=0" in out and "[2/4]" not in out
    if number == signal.SIGTERM:
        return
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "[1/4] objective=dpo, beta=0.1, seed=0 (goes on)" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "picture.png" in done.stdout


# --- failures ------------------------------------------------------------------------------------


def without_memory(objective: str) -> Any:
    """A backend that cannot take a step of this objective."""

    def make_step(policy: Any, given: Any, **options: Any) -> Any:
        if given.name == objective:
            raise RuntimeError("out of memory")
        return fake_backend.make_step(policy, given, **options)

    return answering(make_step=make_step)


def test_a_failure_is_recorded_and_the_rest_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "s"
    table = swept(base, out, backend=without_memory("dpo"))
    assert [(len(line.done), len(line.failed)) for line in table.lines] == [(0, 2), (2, 0)]
    assert {one.reason for one in table.failures} == {"RuntimeError: out of memory"}
    assert "Traceback" in (out / "results" / "objective=dpo,beta=0.1,seed=0.traceback.txt").read_text()
    text = (out / "table.md").read_text()
    assert "| dpo | 0.1 | 0 | 2 | – |" in text and "2 runs failed" in text
    before, listener = files(out), Listener()
    swept(base, out, backend=without_memory("dpo"), listener=listener)
    assert (files(out), listener.points) == (before, [])


def test_failed_runs_are_tried_again_when_asked(base: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    swept(base, tmp_path / "s", backend=without_memory("dpo"))
    swept(base, tmp_path / "s", retry_failed=True)
    assert files(tmp_path / "s") == files(whole)


def test_the_first_failure_may_end_it(base: dict[str, Any], tmp_path: Path) -> None:
    listener = Listener()
    table = swept(base, tmp_path / "s", backend=without_memory("simpo"), listener=listener, fail_fast=True)
    assert len(listener.points) == 2 and table.missing == 2
    assert "2 runs not made" in (tmp_path / "s" / "table.md").read_text()


def test_steps_that_are_not_finite_fail_with_one_reason_however_often_it_is_asked(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on with such a run would take it past the steps it failed at, or change what is said."""
    monkeypatch.setenv("FAKE_NAN_STEPS", "2,3,4")
    table = swept(base, tmp_path / "s", "objective.beta=0.1")
    before = (tmp_path / "s" / "table.json").read_bytes()
    assert all("3 steps in a row (2 to 4)" in str(one.reason) for one in table.failures) and len(table.failures) == 2
    for file in (tmp_path / "s" / "results").glob("*.json"):
        file.unlink()  # killed before it was recorded
    swept(base, tmp_path / "s", "objective.beta=0.1")
    assert (tmp_path / "s" / "table.json").read_bytes() == before
    monkeypatch.delenv("FAKE_NAN_STEPS")
    again = swept(base, tmp_path / "s", "objective.beta=0.1", retry_failed=True)
    never = swept(base, tmp_path / "never", "objective.beta=0.1")
    assert again.as_record() == never.as_record()


# --- what has changed, or is damaged -------------------------------------------------------------


def test_a_changed_base_is_refused_by_its_keys(base: dict[str, Any], whole: Path) -> None:
    changed = {**base, "optimizer": {"learning_rate": 4}, "batching": {"batch_size": 8}}
    with pytest.raises(RunError) as error:
        swept(changed, whole)
    assert "optimizer.learning_rate: was 1.0, now 4.0" in str(error.value) and "batching.batch_size" in str(error.value)
    swept({**base, "training": {**base["training"], "save_every": 1}}, whole)


def test_a_run_with_another_configuration_is_refused(base: dict[str, Any], whole: Path) -> None:
    file = whole / "runs" / "objective=ipo,beta=0.1,seed=0" / "config.yaml"
    file.parent.mkdir()
    text = (whole / "runs" / "objective=dpo,beta=0.1,seed=0" / "config.yaml").read_text()
    file.write_text(text)
    with pytest.raises(RunError, match=r"objective\.name: was 'dpo', now 'ipo'"):
        swept(base, whole, "objective=ipo,simpo", "objective.beta=0.1")


@pytest.mark.parametrize("damage", ["", '{"version": 1}', "not JSON", "digit"])
def test_a_damaged_result_is_measured_again(base: dict[str, Any], whole: Path, damage: str) -> None:
    before, updates, listener = files(whole), calls["update"], Listener()
    file = whole / "results" / "objective=simpo,beta=0.1,seed=1.json"
    text = file.read_text()
    file.write_text(text.replace('"margin": ', '"margin": 1') if damage == "digit" else damage)
    swept(base, whole, listener=listener)
    assert any("damaged" in note for note in listener.notes)
    assert (files(whole), calls["update"]) == (before, updates)


def test_an_adapter_that_is_not_the_measured_one_is_noticed(base: dict[str, Any], whole: Path) -> None:
    before, listener = files(whole), Listener()
    weights = whole / "runs" / "objective=dpo,beta=0.1,seed=0" / "adapters.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-8])
    swept(base, whole, listener=listener)
    assert any("not the one that was measured" in note for note in listener.notes)
    assert (files(whole), weights.read_bytes()) == (before, good)


def test_changed_data_are_noticed(base: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(pairs.read_bytes())
    base = {**base, "data": {**base["data"], "source": str(mine)}}
    swept(base, tmp_path / "s", "objective.beta=0.1", seeds="1")
    mine.write_text(pairs.read_text().replace("Paris", "London", 1))
    with pytest.raises(ConfigError, match=r"beta=0.1,seed=0: the data have changed"):
        swept(base, tmp_path / "s", "objective.beta=0.1")


def test_two_sweeps_cannot_share_a_folder(base: dict[str, Any], tmp_path: Path) -> None:
    with locked(tmp_path / "s", what=""), pytest.raises(RunError, match="another sweep"):
        swept(base, tmp_path / "s")


def test_somebodys_folder_is_left_alone(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match=r"not empty \(thesis.txt\)"):
        swept(base, tmp_path / "s")


# --- checked before the first run ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "vary", "kind", "words"),
    [
        ({"data": {"source": "nowhere.jsonl"}}, VARY, MlxprefError, "nowhere.jsonl"),
        ({}, ["relabel.min_gap=0,100"], DataError, "min_gap"),
        ({"data.valid_fraction": None, "training.steps_per_eval": None}, VARY, ConfigError, "no validation rows"),
        ({"data.valid_fraction": None}, VARY, ConfigError, "training.steps_per_eval needs validation rows"),
        ({}, ["objective=dpo,cream"], MlxprefError, "confidence"),
        ({}, ["adapter.init_from=null,/nowhere"], MlxprefError, "/nowhere: no such folder"),
    ],
)
def test_what_can_be_known_is_known_before_the_first_run(
    base: dict[str, Any], tmp_path: Path, changes: dict[str, Any], vary: Any, kind: type[Exception], words: str
) -> None:
    if vary == ["adapter.init_from=null,/nowhere"]:
        base = {key: value for key, value in base.items() if key != "adapter"}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        base = {**base, section: {**base[section], name: value} if name else value}
    before = calls["load_policy"]
    with pytest.raises(kind, match=words):
        swept(base, tmp_path / "s", *vary)
    assert calls["load_policy"] == before and not (tmp_path / "s").exists()


@pytest.mark.parametrize("skip", [False, True])
def test_what_the_data_lack_is_told_of_every_run_that_asks_for_it(
    skip: bool, base: dict[str, Any], tmp_path: Path
) -> None:
    """Finds: an objective dropped from a comparison for want of a column, or a message that leaves which one open."""
    with pytest.raises(DataError) as error:
        swept(base, tmp_path / "s", "objective=dpo,cream,inpo", skip=skip)
    cream, inpo = str(error.value).partition("objective=inpo: ")[::2]
    assert "objective=cream: " in cream and "confidence: " in cream and "previous: " in inpo
    assert "objective=dpo" not in str(error.value) and not (tmp_path / "s").exists()


# --- answers -------------------------------------------------------------------------------------


def length(prompts: Any, responses: Any) -> list[float]:
    """A scorer: the number that is the answer."""
    return [float(text) for text in responses]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Tell me about cats."}\n{"prompt": "And dogs?"}\n')
    return file


def test_answers_are_asked_for_and_scored(base: dict[str, Any], tmp_path: Path, prompts: Path) -> None:
    asked = asking("test_ablate:length", prompts, goals=("2", "6"))
    table = swept(base, tmp_path / "s", "relabel=null,{}", seeds="1", backend=answering(), asking=asked)
    plain, conditioned = (line.done[0].answers for line in table.lines)
    assert [one["goal"] for one in plain["per_goal"]] == [None]
    assert [one["goal"] for one in conditioned["per_goal"]] == [10.0, 2.0, 6.0]
    means = {one["goal"]: one["mean"] for one in conditioned["per_goal"]}
    assert conditioned["score"] == means[10] and conditioned["range"] == means[10] - means[2]
    assert table.shown[:3] == ("score", "range", "spearman") and plain["range"] is None
    lines = (tmp_path / "s" / "results" / f"{table.lines[1].done[0].name}.samples.jsonl").read_text().splitlines()
    assert len(lines) == 6 and math.fsum(json.loads(line)["score"] for line in lines[0::3]) / 2 == means[10]


def test_asking_later_trains_nothing_and_asking_otherwise_asks_anew(
    base: dict[str, Any], whole: Path, prompts: Path
) -> None:
    before, updates = files(whole), calls["update"]
    seen = []
    for goals in ((), (), ("3",)):
        listener = Listener()
        asked = asking("test_ablate:length", prompts, goals=goals)
        table = swept(base, whole, listener=listener, backend=answering(), asking=asked)
        seen.append([state for _, state in listener.points])
        assert all(line.figure("score") for line in table.lines)
    assert seen == [["unmeasured"] * 4, [], ["unmeasured"] * 4] and calls["update"] == updates
    swept(base, whole)
    assert files(whole) == before


def test_a_scorer_that_fails_is_a_failure_of_the_run(base: dict[str, Any], tmp_path: Path, prompts: Path) -> None:
    asked = asking("test_ablate:spread", prompts)
    table = swept(base, tmp_path / "s", "objective.beta=0.1", backend=answering(), asking=asked)
    assert len(table.failures) == 2 and all(one.reason for one in table.failures)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 2}, "--temperature"),
        ({"samples": 0}, "--samples"),
        ({"goals": ("11",)}, "11"),
        ({"goals": ("many",)}, "many"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_first_run(
    base: dict[str, Any], tmp_path: Path, prompts: Path, options: dict[str, Any], words: str
) -> None:
    before = calls["load_policy"]
    with pytest.raises(UsageError, match=words):
        asked = asking("test_ablate:length", prompts, **options)
        swept(base, tmp_path / "s", backend=answering(), asking=asked)
    assert calls["load_policy"] == before


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def invoke(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    monkeypatch.setattr(backends, "get", lambda name="auto": answering())

    def call(*words: str) -> Any:
        given = ["ablate", "-c", str(tmp_path / "base.yaml"), "--out", str(tmp_path / "s"), *words]
        return CliRunner().invoke(cli.main, given)

    yield call


def test_a_dry_run_lists_and_writes_nothing(invoke: Any, base: dict[str, Any], tmp_path: Path) -> None:
    before = calls["load_policy"]
    ran = invoke("--vary", "objective.beta=0.1,1", "--dry-run")
    assert ran.exit_code == 0, ran.output
    assert "beta=0.1,seed=0  to do" in ran.stdout
    assert "24 training rows, 8 validation rows, for 2 runs" in ran.stdout
    assert calls["load_policy"] == before and not (tmp_path / "s").exists()
    swept(base, tmp_path / "s", "objective.beta=0.1", seeds="1")
    found = json.loads(invoke("--vary", "objective.beta=0.1,1", "--dry-run", "--json").stdout)
    assert [(run["settings"], run["state"]) for run in found["runs"]] == [({"beta": 0.1}, "done"), ({"beta": 1}, "new")]


def test_the_command_prints_the_table_or_json(invoke: Any, tmp_path: Path) -> None:
    ran = invoke("--vary", "objective=dpo,sft", "--vary", "objective.beta=0.1,1", "--skip-impossible")
    assert ran.exit_code == 0, ran.output
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert ["sft", "–", "1"] in [line[:3] for line in lines] and "note: sft takes no beta" in ran.stdout
    again = invoke("--vary", "objective=dpo,sft", "--vary", "objective.beta=0.1,1", "--skip-impossible", "--json")
    assert json.loads(again.stdout) == json.loads((tmp_path / "s" / "table.json").read_text())


def test_failures_end_in_exit_code_1(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "get", lambda name="auto": without_memory("ipo"))
    ran = invoke("--vary", "objective=dpo,ipo")
    assert ran.exit_code == 1
    assert "error: objective=ipo, seed=0: RuntimeError: out of memory" in ran.stderr
    assert "failed: objective=ipo,seed=0: RuntimeError" in ran.stdout and "--retry-failed" in ran.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to compare"),
        (["--vary", "objective.beta=0.1,1", "--scorer", "a:b"], "--prompts"),
        (["--vary", "objective.beta=0.1,1", "--goals", "3"], "--goals"),
        (["--vary", "objective.beta=0.1,1", "--rows", "0"], "--rows"),
        (["--vary", "objective.betta=0.1,1"], "did you mean beta"),
    ],
)
def test_usage_is_refused_with_exit_code_2(invoke: Any, tmp_path: Path, words: list[str], said: str) -> None:
    ran = invoke(*words)
    assert ran.exit_code == 2 and said in ran.stderr, ran.output
    assert not (tmp_path / "s").exists()


def test_rows_limit_what_is_measured(invoke: Any, tmp_path: Path) -> None:
    counts = []
    for more in ([], ["--rows", "5"]):
        assert invoke("--vary", "objective.beta=0.1,1", *more).exit_code == 0
        found = json.loads((tmp_path / "s" / "table.json").read_text())
        counts.append([run["rows"] for run in found["runs"]])
    assert counts == [[8, 8], [5, 5]]


# --- on MLX --------------------------------------------------------------------------------------


@pytest.mark.mlx
@pytest.mark.slow
def test_a_sweep_on_mlx_stopped_and_gone_on_equals_never_stopped(
    base: dict[str, Any], tmp_path: Path, prompts: Path
) -> None:
    """The real machine room: weights, log-probs and answers are the same bits."""
    relabel = {"score_range": [1, 10], "mapping": "identity"}
    base = {**base, "optimizer": {"learning_rate": 1e-2}, "adapter": {"num_layers": 2}, "relabel": relabel}
    asked = asking("test_ablate:words", prompts, goals=("2",), max_tokens=8)
    options: dict[str, Any] = {"backend": None, "asking": asked}
    swept(base, tmp_path / "whole", "objective=dpo,simpo", **options)
    with pytest.raises(KeyboardInterrupt):
        swept(base, tmp_path / "s", "objective=dpo,simpo", listener=Listener((3, 2)), **options)
    listener = Listener()
    table = swept(base, tmp_path / "s", "objective=dpo,simpo", listener=listener, **options)
    assert [state for _, state in listener.points] == ["unfinished", "new"]
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    for name in ("margin", "sensitivity", "score"):
        assert len({value for line in table.lines for value in line.values(name)}) > 1, name
    assert not table.failures


def words(prompts: Any, responses: Any) -> list[float]:
    """A scorer: characters of the answer."""
    return [float(len(text)) for text in responses]


# --- the picture ---------------------------------------------------------------------------------


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[dots.Row], panels: list[str], title: str = "Title") -> Any:
    kept: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(dots, "save", lambda figure, *_, **__: kept.append(figure))
        dots.draw_dots(rows, panels, "x.png", title=title)
    return kept[0]


def test_dots_and_means_stand_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds: rows upside down, a panel's values in the other, a run left out, a median."""
    rows = [dots.Row("first", ((1.0, 2.0, 6.0), (-0.5,))), dots.Row("second", ((4.0,), ()))]
    figure = drawn(monkeypatch, rows, ["left", "right"])
    left, right = figure.axes
    marks = [(list(line.get_xdata()), line.get_ydata()[0]) for line in left.lines if line.get_marker() == "o"]
    assert [xs for xs, _ in marks] == [[1.0, 2.0, 6.0], [4.0]] and marks[0][1] < marks[1][1]
    assert left.get_ylim()[0] > left.get_ylim()[1], "the first row is at the top"
    names = {text.get_text(): text.get_position()[1] for text in figure.texts}
    assert names["first"] > names["second"]
    assert [3.0, 3.0] in [list(line.get_xdata()) for line in left.lines]
    assert [list(line.get_xdata()) for line in right.lines if line.get_marker() == "o"] == [[-0.5]]
    assert (left.get_xlabel(), right.get_xlabel()) == ("left", "right")


NAMES = ["objective=dpo, beta=0.1", "relabel={}", "$x_1^2$ 100 %", "a-name-without-any-place-to-break-" * 4,
         "objective=simpo, beta=2.5, learning_rate=0.0001, min_gap=3, halves=chosen"]  # fmt: skip


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("panels", [["accuracy"], ["score of the answers", "change of log-prob of it, nats " * 2]])
def test_no_text_of_the_picture_lies_on_another_or_outside(
    monkeypatch: pytest.MonkeyPatch, n: int, panels: list[str]
) -> None:
    values = tuple((-1234.5, 0.001) for _ in panels)
    rows = [dots.Row(f"{NAMES[i % 5]} {i}", values) for i in range(n)]
    figure = drawn(monkeypatch, rows, panels, "Many words of a title " * 5)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    ticks = [
        label for axes in figure.axes
        for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if axes.get_xlim()[0] <= at <= axes.get_xlim()[1]
    ]  # fmt: skip
    texts = [*figure.texts, *(axes.xaxis.label for axes in figure.axes), *ticks]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    for (a, one), (b, two) in combinations(boxes, 2):
        assert not one.overlaps(two), (a, b)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes), text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "needs runs"),
        ([dots.Row("a", ((),))], "needs runs"),
        ([dots.Row("a", ((math.nan,),))], "a: nan"),
        ([dots.Row("a", ((1.0,), (2.0,)))], "2 groups"),
    ],
)
def test_dots_that_cannot_be_drawn(tmp_path: Path, rows: list[dots.Row], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dots.draw_dots(rows, ["x"], tmp_path / "x.png", title="T")
    assert not list(tmp_path.iterdir())


def test_the_picture_in_words() -> None:
    said = dots.dots_alt_text([dots.Row("a", ((1.0, 2.0),)), dots.Row("b", ((),))], ["accuracy"])
    assert said == "a: accuracy 1.5 on average of 2. b: nothing."
