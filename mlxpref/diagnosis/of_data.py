"""What the rows of a run foretell, before any of its figures is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxpref.data.door import LEFT_OUT
from mlxpref.data.picking import ASKED_FOR as PICKED
from mlxpref.data.relabel import ASKED_FOR as RELABELLED
from mlxpref.data.tokens import TOO_LONG
from mlxpref.diagnosis.finding import Finding
from mlxpref.diagnosis.record import RunRecord

CONTRADICTING = 0.05
"""Share of contradicting rows from which it is a fault; below, it is noted."""

LONGER = 0.9
"""Share of pairs in which the chosen response is the longer one, from which length alone tells them apart."""

ALIKE = 1.1
"""95 % quantile of lengths ÷ 5 % quantile up to which responses have one length."""

MANY = 20
"""Examples from which that is no accident."""

CUT = 0.1
"""Share of rows with a response cut, from which it is a fault."""


def findings(run: RunRecord) -> Iterator[Finding]:
    """What is to be said of the data."""
    yield from _dropped(run.facts["data"].get("counts", {}))
    rows = run.facts["data"].get("train")
    if rows is None:  # a run of before these figures were kept
        return
    yield from _contradicting(rows, run)
    yield from _lengths(rows)
    yield from _cut(rows, run)


def _dropped(counts: Mapping[str, Any]) -> Iterator[Finding]:
    """More rows left out than kept, for reasons that nobody asked for."""
    for stage, found in counts.items():
        unasked = {
            why: n for why, n in found["dropped"].items()
            if why not in RELABELLED | PICKED and not why.startswith(LEFT_OUT)  # of these the example is kept
        }  # fmt: skip
        lost = sum(unasked.values())
        if lost <= found["kept"]:
            continue
        why, most = max(unasked.items(), key=lambda item: item[1])
        if why == TOO_LONG:
            yield Finding(
                "most-rows-dropped", "alarm",
                "Most of the data were left out.",
                f"{stage}: {found['kept']} kept, {lost} dropped, {most} of them for: {why}",
                "Prompts with their responses are longer than tokenization.max_length.",
                "Raise tokenization.max_length (`mlxpref plan` says what it takes), or let them be cut (truncation: "
                "cut).",
            )  # fmt: skip
            continue
        yield Finding(
            "most-rows-dropped", "alarm",
            "Most of the data were left out.",
            f"{stage}: {found['kept']} kept, {lost} dropped, {most} of them for: {why}",
            "The data are not what the reader takes them for, or hold little that can be compared.",
            "Look at the rows named by `mlxpref relabel --strict`, which stops at the first; mend them, or name the "
            "right columns in data.columns.",
        )  # fmt: skip


def _contradicting(rows: Mapping[str, Any], run: RunRecord) -> Iterator[Finding]:
    share = rows["contradicting"] / rows["rows"]
    if not share:
        return
    kept = run.config.relabel is not None and run.config.relabel.ties == "keep"
    cause = "Ties were kept: equal scores state one goal with both orders." if kept else (
        "The same pair occurs twice with its responses exchanged, ties were kept when the data were relabelled, or "
        "goals stand in rows that they do not belong to."
    )  # fmt: skip
    yield Finding(
        "contradicting-rows", "alarm" if share >= CONTRADICTING else "note",
        "Rows contradict each other: the same prompt and goal, with the same responses in the other order.",
        f"{rows['contradicting']} of {rows['rows']} training rows ({share:.0%})",
        cause,
        "Set relabel.ties: drop, and relabel.min_gap to a gap that means something; look at such rows with "
        "`mlxpref inspect`.",
    )  # fmt: skip


def _lengths(rows: Mapping[str, Any]) -> Iterator[Finding]:
    usual = rows["tokens"]["responses"]
    if rows["examples"] >= MANY and usual["p95"] <= ALIKE * usual["p5"]:
        yield Finding(
            "one-length", "alarm",
            f"All responses are {usual['p50']:g} tokens long, or nearly so.",
            f"nine in ten responses of {rows['examples']} examples have {usual['p5']:g} to {usual['p95']:g} tokens",
            "They were cut to one length before they came here (their ends, and what tells where a reply ends, are "
            "missing), or the wrong column was read.",
            "Look at them with `mlxpref inspect`; take the whole responses, or name the right columns in data.columns.",
        )  # fmt: skip
    shorter = 1 - rows["chosen_longer"] - rows["equally_long"]
    for share, word in ((rows["chosen_longer"], "longer"), (shorter, "shorter")):
        if rows["examples"] >= MANY and share >= LONGER:
            yield Finding(
                "length-decides", "warning",
                f"The chosen response is nearly always the {word} one, so length alone tells the two apart.",
                f"{share:.0%} of the pairs of {rows['examples']} examples",
                f"Whoever gave the scores liked {word} responses, or they were made that way.",
                "Take length out of the scores (relabel.length_penalty), use an objective that averages over tokens "
                "(simpo, sigmoid_norm), and compare at equal length (`mlxpref winrate`).",
            )  # fmt: skip


def _cut(rows: Mapping[str, Any], run: RunRecord) -> Iterator[Finding]:
    share = rows["cut"]["responses"] / rows["rows"]
    if share < CUT:
        return
    yield Finding(
        "responses-cut", "warning",
        "Many responses were cut to fit, and their ends are never learnt.",
        f"{rows['cut']['responses']} of {rows['rows']} training rows ({share:.0%}); max_length is "
        f"{run.config.tokenization.max_length}",
        "Prompts with their responses are longer than tokenization.max_length.",
        "Raise tokenization.max_length (`mlxpref plan` says what it takes), or drop such rows (truncation: drop).",
    )  # fmt: skip
