"""Runs as one page of HTML that needs nothing else: no network, no script; for light and dark, wide and narrow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlxpref.config_layers import dump_config
from mlxpref.diagnosis import Finding, RunRecord, diagnose
from mlxpref.report import run_charts
from mlxpref.report.charts import Chart, as_svg, for_page
from mlxpref.report.style import STYLE

PROMPTS = 6
"""Whose responses at several goals are shown side by side."""

LETTERS = 900
"""Of a response at most; a longer one is cut, and says so."""

SEVERITY = {"alarm": "Wrong", "warning": "Look at this", "note": "Good to know"}


def page(runs: Sequence[RunRecord], *, pictures: Mapping[Path, str] | None = None, head: str = "") -> str:
    """The whole page.

    Args:
        runs: one at least; of several a comparison comes first.
        pictures: by run folder an SVG file's text: its control curve.
        head: more of the document's head.
    """
    named = names_of(runs)
    title = f"{next(iter(named))}: mlxpref" if len(runs) == 1 else f"{len(runs)} runs: mlxpref"
    parts = [*_comparison(named)] if len(runs) > 1 else []
    for name, run in named.items():
        parts += _run(name, run, (pictures or {}).get(run.folder), alone=len(runs) == 1)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n{head}"
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def names_of(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Each run by its folder's name; of equal ones by as much of the path as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=False))


# --- sections ---


def _comparison(named: Mapping[str, RunRecord]) -> Iterator[str]:
    yield "<h1>Runs side by side</h1>"
    yield _table(*run_charts.endings(named), caption="How each ended, on validation rows where there are some")
    yield '<div class="charts">' + "".join(map(_figure, run_charts.compared(named))) + "</div>"


def _run(name: str, run: RunRecord, picture: str | None, *, alone: bool) -> Iterator[str]:
    level = "h1" if alone else "h2"
    yield f"<section><{level}>{escape(name)}</{level}>{_summary(run)}"
    yield f"<h3>What it says</h3>{_findings(diagnose(run))}"
    yield "<h3>Learning curves</h3>" + _charts(run_charts.curves(run))
    if run.control is not None:
        yield "<h3>Asked for more, does it give more?</h3>" + _control(run.control, picture)
        yield from map(_figure, run_charts.course_chart(run.control))
    if run.evaluation is not None:
        yield "<h3>What it prefers</h3>" + _charts(run_charts.evaluation_charts(run.evaluation))
    yield "<h3>Data</h3>" + _data(run)
    yield "<h3>What it took, and where it ran</h3>" + _surroundings(run)
    yield "</section>"


def _summary(run: RunRecord) -> str:
    facts = run.facts
    start = facts["starts"][-1]
    recipe = facts["data"].get("recipe")
    goals = (
        "without goals" if recipe is None else f"goals from {recipe['goal_range'][0]:g} to {recipe['goal_range'][1]:g}"
    )
    state = "finished" if run.step >= run.n_steps else f"{run.step} of {run.n_steps} steps made"
    said = (
        f"{run.config.model.path} · {run.objective.name}, {goals} · {run.n_steps} steps, {state} · {start['time'][:10]}"
    )
    return f'<p class="about">{escape(said)}</p>'


def _findings(found: Sequence[Finding]) -> str:
    loud = [one for one in found if one.severity != "note"]
    opening = "" if loud else '<p class="good">Nothing looks wrong.</p>'
    return opening + "".join(
        f'<article class="{one.severity}"><p><b>{SEVERITY[one.severity]}: {escape(one.what)}</b></p>'
        f'<p class="evidence">{escape(one.evidence)}</p>'
        + "".join(f"<p>{escape(text)}</p>" for text in (one.cause, one.change) if text)
        + "</article>"
        for one in found
    )


def _charts(charts: Iterator[Chart]) -> str:
    return '<div class="charts">' + "".join(map(_figure, charts)) + "</div>"


def _figure(chart: Chart) -> str:
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    head, rows = chart.table()
    return (
        f'<figure id="{escape(chart.name)}"><figcaption>{escape(chart.title)}</figcaption>{as_svg(chart)}{note}'
        f"<details><summary>In figures</summary>{_table(head, rows)}</details></figure>"
    )


def _control(found: Mapping[str, Any], picture: str | None) -> str:
    head = ["asked for", "score", "95 % interval", "80 % of responses", "words", "different texts"]
    asked = [(_goal(one["goal"]), one) for one in found["per_goal"]]
    asked += [("base, without a goal", one) for one in (found.get("base") or {}).get("per_goal", ())]
    rows = [
        [
            name, f"{one['mean']:.2f}", _range(one["interval"]), _range(one["spread"]), f"{one['words']:.0f}",
            f"{one['distinct']:.0%}",
        ]
        for name, one in asked
    ]  # fmt: skip
    said = "; ".join(f"asked for {name} {one['mean']:.2f}" for name, one in asked)
    drawn = "" if picture is None else f"<figure>{for_page(picture, f'Quality achieved: {said}')}</figure>"
    values = found["spearman"] if isinstance(found["spearman"], Mapping) else {"": found["spearman"]}
    correlations = ", ".join(f"{name} {value:.2f}".strip() for name, value in values.items() if value is not None)
    after = (
        f"<p>Rank correlation of goal and score, single responses: {escape(correlations)}</p>" if correlations else ""
    )
    return f'<div class="charts">{drawn}</div>{_table(head, rows)}{after}{_samples(found)}'


def _samples(found: Mapping[str, Any]) -> str:
    """The first prompts' responses at each goal side by side, the base's beside them."""
    prompts = found.get("prompts")
    if not prompts:
        return ""
    samples = [(f"asked for {_goal(one['goal'])}", one) for one in found["samples"]]
    samples += [("base, without a goal", one) for one in (found.get("base") or {}).get("samples", ())]
    cards = []
    for index, turns in enumerate(prompts[:PROMPTS]):
        seen: set[str] = set()
        shown = ""
        for name, one in samples:
            if one["index"] != index or name in seen:
                continue
            seen.add(name)
            shown += (
                f'<div class="card"><p class="evidence">{escape(name)} · score {one["score"]:.3g}</p>'
                f"<p>{_text(one['text'])}</p></div>"
            )
        question = escape(" … ".join(turn["content"] for turn in turns)[:LETTERS])
        cards.append(f'<h4>{question}</h4><div class="cards">{shown}</div>')
    return "<details open><summary>What it writes</summary>" + "".join(cards) + "</details>"


def _text(text: str) -> str:
    return escape(text if len(text) <= LETTERS else f"{text[:LETTERS]} […]").replace("\n", "<br>")


def _data(run: RunRecord) -> str:
    facts = run.facts["data"]
    rows = [["training rows", f"{facts['train_rows']:,}"], ["validation rows", f"{facts['valid_rows']:,}"]]
    for stage, counts in facts.get("counts", {}).items():
        rows += [[f"{stage}: dropped", f"{n:,}: {why}"] for why, n in counts["dropped"].items()]
    found = facts.get("train")
    if found is None:
        return _table(["what", "how many"], rows)
    rows += [
        ["examples of the training rows", f"{found['examples']:,}"],
        ["rows that contradict another", f"{found['contradicting']:,}"],
        ["rows with a prompt cut", f"{found['cut']['prompts']:,}"],
        ["rows with a response cut", f"{found['cut']['responses']:,}"],
        ["pairs with the chosen response longer", f"{found['chosen_longer']:.0%}"],
        ["… equally long", f"{found['equally_long']:.0%}"],
    ]
    quantiles = [[name, *(f"{value:g}" for value in of.values())] for name, of in found["tokens"].items()]
    lengths = ["tokens", *(key if key == "max" else f"{key[1:]} %" for key in found["tokens"]["prompts"])]
    return (
        f'<div class="charts">{_table(["what", "how many"], rows)}<div>{_table(lengths, quantiles)}</div>'
        + "".join(map(_figure, run_charts.data_charts(run)))
        + "</div>"
    )


def _surroundings(run: RunRecord) -> str:
    facts, start = run.facts, run.facts["starts"][-1]
    seconds = run.series["step_seconds"].values if "step_seconds" in run.series else None
    peaks = {key: series.values.max() for key, series in run.series.items() if key.endswith("_memory_gb")}
    tokens = run.series.get("trained_tokens")
    rows = [
        ["parameters", f"{facts['model']['parameters']:,}, {facts['model']['trainable']:,} of them trained"],
        ["tokens trained", "" if tokens is None else f"{tokens.values[-1]:,.0f}"],
        ["time in steps", "" if seconds is None else _duration(float(seconds.sum()))],
        ["padding", f"{facts['plan']['padding']:.1%} of {facts['plan']['tokens']:,} positions"],
        *(
            [key.removesuffix("_memory_gb").replace("_", " ") + " memory", f"{value:.2f} GB"]
            for key, value in peaks.items()
        ),
        [
            "device",
            ", ".join(f"{key} {value}" for key, value in start["device"].items() if isinstance(value, str | int)),
        ],
        ["versions", ", ".join(f"{name} {version}" for name, version in start["versions"].items())],
        ["commit", start.get("commit") or "from a wheel"],
        ["started", ", ".join(f"{one['time']} at step {one['step']}" for one in facts["starts"])],
        ["data fingerprint", facts["data"]["fingerprint"]],
    ]
    recipe = facts["data"].get("recipe")
    more = "" if recipe is None else _folded("Recipe of the goals", json.dumps(recipe, indent=2, ensure_ascii=False))
    return (
        '<div class="charts">'
        + "".join(_figure(chart) for chart in run_charts.resource_charts(run))
        + f"</div>{_table(['what', ''], rows)}{more}{_folded('Configuration', dump_config(run.config))}"
    )


# --- pieces ---


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" tabindex="0"><table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _folded(summary: str, text: str) -> str:
    return f'<details><summary>{escape(summary)}</summary><pre tabindex="0">{escape(text)}</pre></details>'


def _goal(goal: Any) -> str:
    if goal is None:
        return "nothing"
    return ", ".join(f"{name} {value:g}" for name, value in goal.items()) if isinstance(goal, Mapping) else f"{goal:g}"


def _range(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
