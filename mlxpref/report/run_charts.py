"""Which charts a run's record gives: its learning curves, its data, and what was measured of it afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlxpref.diagnosis import RunRecord, Series
from mlxpref.report.charts import Bars, Chart, Line

CURVES: tuple[tuple[str, str, str, tuple[tuple[str, str], ...], tuple[float, str] | None, str], ...] = (
    ("loss", "Loss", "loss", (("loss", "training"), ("eval_loss", "validation")), None,
     "Where validation rises while training falls, the run has been long enough."),
    ("accuracy", "How often the preferred response has the larger reward", "share",
     (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "validation")), (0.5, "a coin"), ""),
    ("goal", "The same by which score is asked for", "share",
     (("eval_chosen_half/rewards/accuracies", "chosen's"), ("eval_rejected_half/rewards/accuracies", "rejected's")),
     (0.5, "a coin"), "A policy that ignores its goal does well on one and as badly on the other."),
    ("margins", "Margin: reward of the preferred less the other's", "reward",
     (("rewards/margins", "training"), ("eval_rewards/margins", "validation")), (0.0, "the reference"), ""),
    ("rewards", "Implicit rewards", "reward",
     (("rewards/chosen", "preferred"), ("rewards/rejected", "other"), ("eval_rewards/chosen", "validation, preferred"),
      ("eval_rewards/rejected", "validation, other")), (0.0, "the reference"),
     "β times how much likelier than to the reference. Below 0 both have become less likely (displacement)."),
    ("log-probs", "Log-probs of responses", "nats",
     (("logps/chosen", "preferred"), ("logps/rejected", "other"), ("eval_logps/chosen", "validation, preferred"),
      ("eval_logps/rejected", "validation, other")), None, ""),
    ("learning-rate", "Learning rate", "learning rate", (("learning_rate", "learning rate"),), None, ""),
    ("gradient", "Size of the gradient before it is clipped", "norm", (("grad_norm", "gradient"),), None, ""),
)  # fmt: skip
"""Name, title, y axis, (metric, name of its line) …, what to compare with, and how to read it."""

RESOURCES: tuple[tuple[str, str, str, str], ...] = (
    ("speed", "Tokens trained in a second", "tokens/s", "tokens_per_second"),
    ("step-time", "Time of a step", "s", "step_seconds"),
)
"""Name, title, y axis and metric."""

COMPARED = ("loss", "accuracy", "goal", "margins")
"""Of these the curves of several runs share a chart; of others each run has its own."""


def curves(run: RunRecord) -> Iterator[Chart]:
    """The learning curves that there are."""
    for name, title, y_label, metrics, level, note in CURVES:
        lines = [_line(said, run.series[key], key) for key, said in metrics if key in run.series]
        if lines and not all(line.y.max() == line.y.min() == 0 for line in lines):
            yield Chart(name, title, "step", y_label, tuple(lines), level=level, note=note)


def resource_charts(run: RunRecord) -> Iterator[Chart]:
    """What its steps took."""
    for name, title, y_label, key in RESOURCES:
        if key in run.series:
            yield Chart(name, title, "step", y_label, (_line(y_label, run.series[key], key),))


def compared(runs: Mapping[str, RunRecord]) -> Iterator[Chart]:
    """Charts in which several runs, by name, share one: each its validation curve, or else, so named, that of
    training."""
    for name, title, y_label, metrics, level, note in CURVES:
        if name not in COMPARED:
            continue
        for key, said in metrics if name == "goal" else metrics[-1:]:
            lines = tuple(line for run_name, run in runs.items() for line in _validated(run_name, run, key))
            if lines:
                what, file = (f"{title} ({said})", f"goal-{key.split('_')[1]}") if name == "goal" else (title, name)
                yield Chart(file, what, "step", y_label, lines, level=level, note=note)


def data_charts(run: RunRecord) -> Iterator[Chart]:
    """What the training rows are like."""
    scores = (run.facts["data"].get("train") or {}).get("scores")
    if scores is None or "values" not in scores:  # a run of before these were written down
        return
    bins = tuple(f"{value:.3g}" for value in scores["values"])
    bars = tuple(Bars(side, tuple(map(float, scores[side]))) for side in ("chosen", "rejected"))
    yield Chart("scores", "Scores of the training examples' responses", "score", "responses", bars=bars, bins=bins)


def evaluation_charts(found: Mapping[str, Any]) -> Iterator[Chart]:
    """What ``mlxpref evaluate --json`` wrote: accuracy by score gap, calibration, displacement."""
    views = {name: view for name, view in found["views"].items() if view["by_gap"]}
    if views:
        bins = next(iter(views.values()))["by_gap"]
        bars = tuple(
            Bars(_view(name), tuple(_or_nan(one["accuracy"]) for one in view["by_gap"])) for name, view in views.items()
        )
        yield Chart(
            "accuracy-by-gap", "How often the better response is preferred, by how far scores are apart",
            "gap of the scores", "share", bars=bars, bins=tuple(map(_gap, bins)), level=(0.5, "a coin"),
            note="Goals: what was asked for.",
        )  # fmt: skip
    yield from _calibration(found["views"])
    sides = ("chosen", "rejected", "high_score_rejected")
    changes = {name: view["change"] for name, view in found["views"].items()}
    named = tuple(side.replace("_", " ").replace("high score", "good") for side in sides)
    yield Chart(
        "displacement", "How much likelier responses have become", "responses", "nats a token",
        bars=tuple(
            Bars(_view(name), tuple(_or_nan(of[side]["per_token"]) for side in sides)) for name, of in changes.items()
        ),
        bins=named, level=(0.0, "the reference"),
        note=f"Good: rejected ones that score {found['high_score']:g} or more. Below 0 they were unlearnt."
        if found.get("high_score") is not None else "",
    )  # fmt: skip


def _calibration(views: Mapping[str, Any]) -> Iterator[Chart]:
    lines = [
        Line(
            _view(name), np.array([one["score"] for one in view["by_score"]]),
            np.array([one["per_token"] for one in view["by_score"]]), marked=True,
        )
        for name, view in views.items() if view.get("by_score")
    ]  # fmt: skip
    if lines:
        yield Chart(
            "calibration", "How much likelier responses have become, by their score", "score", "nats a token",
            tuple(lines), level=(0.0, "the reference"),
            note="Asked for the top goal a calibrated policy makes good responses likelier, bad ones less likely.",
        )  # fmt: skip


def course_chart(found: Mapping[str, Any]) -> Iterator[Chart]:
    """What ``mlxpref control --checkpoints`` found: quality against the distance from the base."""
    stages = sorted(found.get("checkpoints") or (), key=lambda one: float(one["nats"]))
    if stages:
        x, y = (np.array([one[key] for one in stages], np.float64) for key in ("nats", "mean"))
        steps = ", ".join(str(one["step"]) for one in stages)
        base = (found.get("base") or {}).get("per_goal")
        yield Chart(
            "course", "Quality by distance from the base", "nats a response", "score",
            (Line("checkpoints", x, y, marked=True),), level=(base[0]["mean"], "the base") if base else None,
            note=f"From left to right the checkpoints of steps {steps}. Where it falls, one nearer the base is better.",
        )  # fmt: skip


def _or_nan(value: float | None) -> float:
    """Where nothing was measured nothing is drawn."""
    return math.nan if value is None else value


def _view(name: str) -> str:
    return {"chosen": "chosen's goal", "rejected": "rejected's goal", "top": "top goal", "unconditioned": "no goal"}[
        name
    ]


def _gap(one: Mapping[str, Any]) -> str:
    return f"> {one['above']:g}" if one["to"] is None else f"{one['above']:g}–{one['to']:g}"


def _line(name: str, series: Series, key: str) -> Line:
    return Line(name, series.steps.astype(float), series.values, marked=key.startswith("eval_"))


def _validated(name: str, run: RunRecord, key: str) -> Iterator[Line]:
    if key in run.series:
        yield _line(name, run.series[key], key)
    elif (trained := key.removeprefix("eval_")) in run.series:
        yield _line(f"{name} (training)", run.series[trained], trained)


def endings(runs: Mapping[str, RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: how each run ended."""
    named = (
        ("loss", "loss"), ("rewards/accuracies", "accuracy"), ("chosen_half/rewards/accuracies", "chosen's goal"),
        ("rejected_half/rewards/accuracies", "rejected's goal"), ("rewards/margins", "margin"),
    )  # fmt: skip
    rows = []
    for name, run in runs.items():
        values = [run.end(key) for key, _ in named]
        rows.append(
            [name, f"{run.step} of {run.n_steps}", *("" if value is None else f"{value:.4g}" for value in values)]
        )
    return ["run", "steps", *(said for _, said in named)], rows
