"""An evaluation's figures as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxpref.cli import console
from mlxpref.data.words import counted
from mlxpref.evaluate import VIEWS

HEADINGS = {
    "chosen": "goal: chosen's score",
    "rejected": "goal: rejected's score",
    "top": "top goal",
    "unconditioned": "no goal",
}

LINES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("rows", ("rows",)),
    ("pairs", ("pairs",)),
    ("accuracy", ("accuracy",)),
    ("  ±", ("accuracy_error",)),
    ("margin (nats)", ("margin",)),
    ("  ±", ("margin_error",)),
    ("ranking accuracy", ("ranking_accuracy",)),
    ("ranking accuracy, reference", ("reference_ranking_accuracy",)),
    ("change of log-prob, chosen", ("change", "chosen", "sum")),
    ("change of log-prob, rejected", ("change", "rejected", "sum")),
    ("change of log-prob, high-score rejected", ("change", "high_score_rejected", "sum")),
    ("  per token, chosen", ("change", "chosen", "per_token")),
    ("  per token, rejected", ("change", "rejected", "per_token")),
    ("  per token, high-score rejected", ("change", "high_score_rejected", "per_token")),
    ("  high-score rejected responses", ("change", "high_score_rejected", "responses")),
    ("preferred - other, tokens", ("length", "difference")),
    ("correlation of margin with that", ("length", "correlation")),
)
"""Lines of the table, and where a view's figures hold them."""

FEW_EXAMPLES = 20
"""Below so many, a spread of 0 says that all were alike, not that the next ones will be."""


def show(metrics: dict[str, Any]) -> None:
    """Print the figures of one evaluation (``Evaluation.metrics``)."""
    views = metrics["views"]
    names = [name for name in VIEWS if name in views]
    rows = [[label, *(_figure(views[name], path) for name in names)] for label, path in LINES]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    console.table(["", *(HEADINGS[name] for name in names)], rows)
    bins = [name for name in names if views[name]["by_gap"]]
    if bins:
        console.say()
        by_gap = [views[name]["by_gap"] for name in bins]
        console.table(
            ["score gap", *(HEADINGS[name] for name in bins)],
            [[_bin(of_gap[0]), *map(_share, of_gap)] for of_gap in zip(*by_gap, strict=True) if _any(of_gap)],
            title="accuracy by score gap, of pairs",
        )
    console.say()
    sensitivity = metrics["goal_sensitivity"]
    if sensitivity["mean"] is not None:
        error = "" if sensitivity["error"] is None else f" ± {sensitivity['error']:.2g}"
        of = counted(sensitivity["examples"], "example")
        console.say(f"goal sensitivity: {sensitivity['mean']:.4g}{error} nats ({of})")
    if metrics["high_score"] is not None:
        console.say(f"high-score rejected: score >= {metrics['high_score']:g}")
    cut = metrics["cut"]
    if cut["prompts"] or cut["responses"]:
        console.say(
            f"cut to fit, of {counted(cut['rows'], 'row')}: the prompt in {cut['prompts']}, "
            f"a response in {cut['responses']}"
        )
    if metrics["examples"] < FEW_EXAMPLES:
        console.say(f"note: only {counted(metrics['examples'], 'example')}: others could give quite other figures")
    for line in metrics["notes"]:
        console.say(f"note: {line}")


def _figure(view: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = view
    for key in path:
        value = value[key]
    return value


def _bin(entry: dict[str, Any]) -> str:
    return f"> {entry['above']:g}" if entry["to"] is None else f"{entry['above']:g} - {entry['to']:g}"


def _any(of_gap: Sequence[dict[str, Any]]) -> bool:
    return any(entry["pairs"] for entry in of_gap)


def _share(entry: dict[str, Any]) -> str:
    return f"{entry['accuracy']:.3f} of {entry['pairs']}" if entry["pairs"] else console.cell(None)
