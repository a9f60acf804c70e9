"""The quickstart: what it trains, keeps, finds and says.

Finds: trials that differ in more than they should, ties that teach plain DPO a coin's toss, findings that
flatter, a second run that computes again or says something else, an interrupted one that starts over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlxpref import cli, sandbox
from mlxpref.cli import console
from mlxpref.config_layers import load_config
from mlxpref.errors import RunError
from mlxpref.evaluate.control import Sample, curve_of
from mlxpref.sandbox import findings, quickstart, trials
from mlxpref.sandbox.measured import TOP, Measured, keep, kept


def measured(name: str, title: str, score_at: dict[float | None, float], *, spread: float = 0.5) -> Measured:
    """A model that scores ``score_at[goal]`` ± spread at each goal (the same at those not named), of 20 requests."""
    samples = [
        Sample(index, goal, f"{title} {goal} {index}", score_at.get(goal, score_at[None]) + spread * (-1) ** index)
        for goal in quickstart.GOALS
        for index in range(20)
    ]
    judged = {} if name == "base" else {"sensitivity": (5.0, 0.2), "displaced": (-3.25, 28)}
    curve = curve_of(samples, top=TOP, resamples=50)
    return Measured(name, title, name.startswith("ra"), curve, **judged)


STEERED = measured("ra-dpo", "RA-DPO", {None: 5.0, **{float(goal): float(goal) for goal in range(1, 11)}})
DEAF = measured("ra-dpo", "RA-DPO", {None: 5.0})
BASE = measured("base", "base", {None: 4.5})


# --- what is found -----------------------------------------------------------------------------------


def test_a_steered_model_is_said_to_be_one() -> None:
    said = " ".join(findings.sentences(BASE, STEERED, [measured("dpo", "DPO", {None: 8.0})]))
    assert "RA-DPO obeys its goal: goals 8-10 score +7.0 points against goals 1-3" in said
    assert "scores better than the base: 10.00 against 4.50 (+5.50)" in said
    assert "scores better than DPO: 10.00 against 8.00 (+2.00)" in said
    assert "DPO -3.2, RA-DPO -3.2" in said
    assert findings.headline(STEERED) == "Asked for 1, RA-DPO scores 1.0; asked for 10, it scores 10.0"


def test_what_does_not_flatter_is_said_as_plainly() -> None:
    said = " ".join(findings.sentences(BASE, DEAF, [measured("dpo", "DPO", {None: 8.0})]))
    assert "RA-DPO does not obey its goal: goals 8-10 score +0.0 points" in said
    assert "scores worse than DPO: 5.00 against 8.00 (-3.00)" in said
    assert "furthest (5.0) at goal 10" in said


def test_a_difference_within_the_error_is_none() -> None:
    near = measured("dpo", "DPO", {None: 5.1}, spread=2.0)
    said = " ".join(findings.sentences(BASE, measured("ra-dpo", "RA-DPO", {None: 5.0}, spread=2.0), [near]))
    assert "RA-DPO asked for 10 and DPO cannot be told apart here: 5.00 and 5.10." in said


# --- what is trained ---------------------------------------------------------------------------------


def test_trials_differ_in_data_objective_rate_and_folder_alone(tmp_path: Path) -> None:
    made = [
        trials.configuration(trial, tmp_path, tmp_path / trial.name, trials.FULL, seed=3, store=tmp_path).as_dict()
        for trial in trials.TRIALS
    ]
    for config in made:
        config.pop("objective")
        config["optimizer"].pop("learning_rate")
        config["output"].pop("adapter_path")
    assert made[0] == made[1] == made[2]
    assert made[0]["training"]["seed"] == 3
    assert {trial.name for trial in trials.TRIALS if trial.relabelled} == {"ra-dpo"}


def test_the_config_to_play_with_is_the_steered_trial(tmp_path: Path) -> None:
    trial = trials.configuration(trials.REWARD_AUGMENTED, tmp_path, tmp_path, trials.FULL, seed=0, store=tmp_path)
    config = load_config(Path(__file__).parents[1] / "configs" / "sandbox.yaml")
    for section in ("tokenization", "batching", "adapter", "objective", "optimizer"):
        assert getattr(config, section) == getattr(trial, section), section
    assert config.training.iters == trials.FULL.steps
    assert config.relabel is not None and config.relabel.min_gap == trials.GAP


@pytest.mark.parametrize("size", [trials.FULL, trials.QUICK], ids=["full", "quick"])
def test_every_trial_sees_every_pair_equally_often(size: trials.Size) -> None:
    """The relabelled trial two rows of each pair, the plain ones each pair twice as often."""
    rows = size.steps * trials.BATCH
    assert rows % (2 * size.pairs) == 0
    assert size.requests <= len(sandbox.TEST.read_text().splitlines()) >= size.judged
    assert trials.FULL.requests >= 200


@pytest.mark.parametrize("size", [trials.FULL, trials.QUICK], ids=["full", "quick"])
def test_pairs_are_clear_and_as_many_as_is_said(size: trials.Size) -> None:
    rows = [json.loads(line) for line in quickstart.clear_pairs(size.pairs).splitlines()]
    assert len(rows) == size.pairs
    assert min(row["score_chosen"] - row["score_rejected"] for row in rows) == trials.GAP


# --- what is kept ------------------------------------------------------------------------------------


def test_what_was_measured_comes_back_as_it_was(tmp_path: Path) -> None:
    keep(STEERED, "key", tmp_path)
    again = kept("ra-dpo", "key", tmp_path, seed=0)
    assert again is not None and again.steerable
    assert again.curve.samples == STEERED.curve.samples
    assert (again.sensitivity, again.displaced) == ((5.0, 0.2), (-3.25, 28))
    assert [one.mean for one in again.asked] == [one.mean for one in STEERED.asked]
    assert kept("ra-dpo", "another key", tmp_path, seed=0) is None
    assert kept("dpo", "key", tmp_path, seed=0) is None


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    keep(STEERED, "key", tmp_path)
    (tmp_path / "ra-dpo.samples.jsonl").write_text("half a li")
    with pytest.raises(RunError, match=r"ra-dpo\.json: cannot be read .* delete it"):
        kept("ra-dpo", "key", tmp_path, seed=0)


# --- the whole of it ---------------------------------------------------------------------------------


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "mlxpref", "quickstart", "--quick", "--out", str(out)]


@pytest.mark.mlx
@pytest.mark.slow
def test_stopped_and_gone_on_with_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Ctrl-C in the middle of training, then the same command; then once more, which computes nothing."""
    first = subprocess.Popen(command(tmp_path / "a"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "a" / "seed-0-quick" / "ra-dpo"
    _wait_for(run / "metrics.jsonl", first)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 130, said
    assert "the same command goes on from here" in said and "Traceback" not in said
    assert list((run / "checkpoints").iterdir())

    outputs = []
    for folder in ("a", "a", "b"):
        ran = subprocess.run(command(tmp_path / folder), capture_output=True, text=True, timeout=600, check=False)
        assert ran.returncode == 0, ran.stderr
        outputs.append(ran)
    gone_on, again, whole = outputs
    assert again.stderr.count("there already") == 1 + 3 + 4  # data, runs, measurements
    results = [json.loads((tmp_path / f / "seed-0-quick" / "results.json").read_text()) for f in ("a", "b")]
    assert results[0] == results[1]
    table = gone_on.stdout.partition("What was achieved")[2].partition("Picture:")[0]
    assert table and table in again.stdout and table in whole.stdout
    assert (tmp_path / "a" / "seed-0-quick" / "control-curve.png").read_bytes()[:4] == b"\x89PNG"


def _wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not (file.exists() and os.path.getsize(file) > 2000):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{file} never came"
        time.sleep(0.1)


@pytest.mark.mlx
@pytest.mark.slow
def test_the_method_works_and_the_control_does_not(tmp_path: Path) -> None:
    """What the sandbox is for, at full size on a seed of its own: the goal steers; goals dealt out anew do not."""
    found = quickstart.quickstart(tmp_path, seed=11, trials=(trials.REWARD_AUGMENTED, trials.SHUFFLED))
    base, steered, shuffled = found.models
    assert steered.range >= 4.5
    assert steered.spearman is not None and steered.spearman >= 0.75
    assert steered.at(10).mean >= base.unasked.mean + 2
    assert steered.sensitivity is not None and steered.sensitivity[0] > 4
    assert shuffled.spearman is not None and abs(shuffled.spearman) < 0.2
    assert shuffled.sensitivity is not None and abs(shuffled.sensitivity[0]) < 1


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command on models that are there already."""
    dpo = measured("dpo", "DPO", {None: 8.0})
    requests = tuple(f"Request {index}" for index in range(20))
    picture = tmp_path / "a folder" / "control-curve.png"
    pairs, models = tmp_path / "pairs.jsonl", (BASE, STEERED, dpo)
    found = quickstart.Found(picture.parent, pairs, models, requests, picture, ("It is.",))
    monkeypatch.setattr("mlxpref.cli.quickstart.quickstart", lambda out, **options: found)
    return lambda *words, **more: CliRunner().invoke(cli.main, ["quickstart", *words], **more)


def test_the_command_shows_texts_table_findings_and_what_is_next(shown: Callable[..., Result]) -> None:
    said = shown().output
    for words in ("> Request 0", "base (5): base None 0", "asked for 10 (10): RA-DPO 10.0 0", "- It is.", "Next:"):
        assert words in said
    rows = [line.split() for line in said.partition("What was achieved")[2].partition("\n\n")[0].splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == [str(goal) for goal in range(1, 11)]
    assert "'" in said.partition("Next:")[2].splitlines()[1], "a folder with a space is quoted"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert console.is_terminal() and console.is_terminal(stderr=True)
    monkeypatch.setenv("TERM", "dumb")
    assert not console.is_terminal() and not console.is_terminal(stderr=True)
