"""What evaluations and control curves of a policy say: what it forgot, and whether it writes what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxpref.diagnosis.finding import Finding
from mlxpref.diagnosis.record import RunRecord

UNLEARNT = 0.05
"""Nats a token by which good responses that were merely second have become less likely, from which it is said."""

DEAF = 1.0
"""Nats below which a goal sensitivity is none, whatever its error."""

UNRELATED = 0.1
"""Rank correlation of goal and score up to which the goal does not steer."""

WIDE = 0.5
"""Share of the goal range that the goals asked for must span before that is said."""

ENOUGH = 20
"""Prompts, or responses, from which something is said of them."""

LONGER = 1.5
"""Words at the top goal ÷ words of the base from which length has drifted; also downwards."""

REPEATED = 0.15
"""By how much more than the base's the share of repeated runs of four words may be."""

FEWER = 0.5
"""Share of different responses ÷ the base's below which the policy says the same to everything."""


def findings(run: RunRecord) -> Iterator[Finding]:
    """What is to be said of what was measured after training; nothing where nothing was."""
    if run.evaluation is not None:
        yield from _of_evaluation(run.evaluation)
    if run.control is not None:
        yield from _of_control(run.control)


# --- evaluations ---


def _of_evaluation(found: Mapping[str, Any]) -> Iterator[Finding]:
    sensitivity = found.get("goal_sensitivity") or {}
    mean, error = sensitivity.get("mean"), sensitivity.get("error")
    if mean is not None and error is not None and mean < min(-DEAF, -2 * error):
        yield Finding(
            "goal-reversed", "alarm",
            "The goal in the prompt is obeyed the wrong way round.",
            f"goal sensitivity {mean:.3f} ± {error:.3f} nats over {sensitivity['examples']} examples; 0 is ignoring it",
            "Prompts or scores of the training rows were others' than those of the rows that are evaluated.",
            "See with `mlxpref inspect` that each prompt states its response's score; relabel anew.",
        )  # fmt: skip
    elif mean is not None and error is not None and mean <= 2 * error:
        known = mean + 2 * error < DEAF
        yield Finding(
            "goal-ignored" if known else "too-few-examples", "alarm" if known else "note",
            "The goal in the prompt decides nothing." if known else "Too few examples to say whether the goal decides.",
            f"goal sensitivity {mean:.3f} ± {error:.3f} nats over {sensitivity['examples']} examples; 0 is ignoring it",
            "Goals do not fit the responses, or the run is too short." if known else "",
            "See with `mlxpref inspect` that each prompt states its response's score; train longer." if known else
            "Evaluate more of them.",
        )  # fmt: skip
    # With goals a response is meant to stay likely under its own score; without, there is one way to ask.
    own = found["views"].get("rejected") or found["views"].get("unconditioned")
    change = None if own is None else own["change"]["high_score_rejected"]
    if change is None or change["per_token"] is None or change["per_token"] > -UNLEARNT:
        return
    if change["responses"] < ENOUGH:
        return
    goals = "rejected" in found["views"]
    # Each side under its own goal; with another's, one of the two is meant to fall.
    all_fell = goals and all(
        (found["views"][side]["change"][side]["per_token"] or 0.0) < 0 for side in ("chosen", "rejected")
    )
    yield Finding(
        "good-responses-unlearnt", "warning",
        "Good responses that were merely second have become less likely.",
        f"rejected responses that score {found['high_score']:g} or more, asked for "
        + ("their own score" if goals else "nothing")
        + f": {change['per_token']:+.2f} nats a token over {change['responses']} of them",
        "Training without goals pushes down whatever was second, however good." if not goals else
        "All responses have become less likely, these with them." if all_fell else
        "Perhaps few rows ask for such a score, or it does not tell them from better responses.",
        "Train with goals (section relabel), which ask for such responses by their own score." if not goals else
        "Use a larger beta or a lower optimizer.learning_rate, or add a term {name: sft, weight: 0.1}." if all_fell else
        "See with `mlxpref report` how many training rows have such scores; add pairs in which such a response loses.",
    )  # fmt: skip


# --- control curves ---


def _of_control(found: Mapping[str, Any]) -> Iterator[Finding]:
    asked = [one for one in found["per_goal"] if one["goal"] is not None]
    values = found["spearman"].values() if isinstance(found["spearman"], Mapping) else [found["spearman"]]
    known = [value for value in values if value is not None]
    recipe = found.get("recipe")
    if recipe is not None and known and max(known) <= UNRELATED:
        low, high = recipe["goal_range"]
        enough = min(one["prompts"] for one in asked) >= ENOUGH
        enough = enough and _span([one["goal"] for one in asked]) >= WIDE * (high - low)
        yield Finding(
            "goal-does-not-steer" if enough else "too-few-goals", "alarm" if enough else "note",
            "What is written does not follow the goal." if enough else
            "Too few prompts, or goals too close, to say whether the goal steers.",
            f"rank correlation of goal and score {max(known):.2f} over {sum(one['n'] for one in asked)} responses",
            "The run is too short or its data have too few scores; or the scorer measures something else than the "
            "data's scores." if enough else "",
            "Train longer, relabel with a wider range of goals, or score with what the data were scored with."
            if enough else f"Ask {ENOUGH} prompts or more for goals over the whole range.",
        )  # fmt: skip
    yield from _of_checkpoints(found.get("checkpoints") or ())
    base = (found.get("base") or {}).get("per_goal")
    best = None if recipe is None else recipe["top_goal"]
    at_best = next((one for one in found["per_goal"] if one["goal"] == best), None)
    if base and at_best is not None and at_best["prompts"] >= ENOUGH:
        yield from _against_base(at_best, base[0], found)


def _of_checkpoints(stages: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Where an earlier checkpoint writes better than the last, whatever the loss says."""
    better = [one for one in stages if one["less_end"] is not None and one["less_end"][0] > 0]
    if not better:
        return
    best, end = max(better, key=lambda one: float(one["mean"])), stages[-1]
    further = end["nats"] > best["nats"]
    yield Finding(
        "over-optimised", "alarm",
        f"Responses were better after step {best['step']} than they are at the end"
        f"{' (over-optimisation)' if further else ''}.",
        "score " + ", then ".join(
            f"{one['mean']:.2f} at step {one['step']}, {one['nats']:.1f} nats from the base" for one in (best, end)
        ),
        "It went on beyond the distance from the base at which quality was best." if further else
        "Later steps undid it without going further from the base; the learning rate may be too high for them.",
        f"Use checkpoints/step-{best['step']:06d} as the adapter; a larger beta or fewer training.iters for a new run.",
    )  # fmt: skip


def _against_base(top: Mapping[str, Any], base: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Finding]:
    """What is written at the top goal, or without goals, beside what the base writes."""
    asked = "Asked for the top goal, the" if top["goal"] is not None else "The"
    at_top = "at the top goal" if top["goal"] is not None else "of the policy"
    if top["interval"] and base["interval"] and top["interval"][1] < base["interval"][0]:
        yield Finding(
            "worse-than-base", "alarm",
            f"{asked} policy writes worse than the base.",
            f"score {_within(top)} against {_within(base)}",
            "It was trained too far from the base (over-optimisation), or the scores run the other way.",
            "Use an earlier checkpoint, a larger beta, or fewer training.iters.",
        )  # fmt: skip
    longer = top["words"] / max(base["words"], 1e-9)
    if not 1 / LONGER < longer < LONGER:
        yield Finding(
            "length-drift", "warning",
            f"Responses have become {'longer' if longer > 1 else 'shorter'}.",
            f"{top['words']:.0f} words {at_top}, {base['words']:.0f} of the base",
            "Length goes with the scores in the data, so it is learnt in quality's place.",
            "Compare at equal length (`mlxpref winrate`); relabel.length_penalty takes length out of the scores.",
        )  # fmt: skip
    if top["distinct"] < FEWER * base["distinct"]:
        yield Finding(
            "same-response", "alarm",
            "The policy says the same to many prompts.",
            f"{top['distinct']:.0%} of the responses {at_top} differ, {base['distinct']:.0%} of the base's",
            "It was trained too far from the base.",
            "Use an earlier checkpoint, a larger beta, or a lower optimizer.learning_rate.",
        )  # fmt: skip
    again = _repeated(found.get("samples", ()), top["goal"])
    before = _repeated(found["base"].get("samples", ()), None)
    if again is not None and again > (before or 0.0) + REPEATED:
        yield Finding(
            "repetition", "warning",
            "Responses repeat themselves.",
            f"{again:.0%} of their runs of four words occurred before in the same response"
            + ("" if before is None else f", {before:.0%} of the base's"),
            "It was trained too far from the base, or long responses were cut, so that it never saw an end.",
            "Use an earlier checkpoint or a larger beta; look at how many responses were cut.",
        )  # fmt: skip


def _within(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['mean']:.2f} ({low:.2f} to {high:.2f})"


def _span(goals: Sequence[Any]) -> float:
    """From the lowest to the highest; of several attributes, that which spans most."""
    named = [goal if isinstance(goal, Mapping) else {"": goal} for goal in goals]
    return max(max(goal[name] for goal in named) - min(goal[name] for goal in named) for name in named[0])


def _repeated(samples: Sequence[Mapping[str, Any]], goal: Any) -> float | None:
    """Share of runs of four words that the same text had before, over the texts of a goal; None without any."""
    total = different = 0
    for sample in samples:
        if sample["goal"] != goal:
            continue
        words = sample["text"].split()
        runs = [tuple(words[place : place + 4]) for place in range(len(words) - 3)]
        total += len(runs)
        different += len(set(runs))
    return 1 - different / total if total else None
