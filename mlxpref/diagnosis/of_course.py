"""What the learning curves of a run say: whether it learnt anything, too much, or something else.

Log-ratios (policy − reference, nats) are the implicit rewards divided by β. Thresholds are in nats a token or
shares of pairs, so that they mean the same for short responses and long ones; ``docs/reading-a-run.md`` has the runs
they were tried on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlxpref.diagnosis.finding import Finding, Severity
from mlxpref.diagnosis.record import SETTLED, RunRecord
from mlxpref.schedules import n_warmup

STARTED = 0.02
"""Nats a token by which a policy that has made no step may differ from its reference: rounding."""

USUAL_MOMENTUM = 1.0
"""Up to which a reference that has been carried on is what was asked for."""

FALLEN = 1.0
"""Nats a token by which both responses have become less likely in a run that has come apart."""

FAR = 0.5
"""Nats a token from the reference that a β which still pulls does not allow at a reward of nearly 0."""

FAINT = 0.02
"""Implicit reward below which a loss hardly feels it."""

STILL = 0.002
"""Nats a token within which nothing has been learnt."""

CHANCE = 0.56
"""Mean accuracy over all goals of an example up to which the goal decides nothing; ½ is what ignoring it gives."""

ENOUGH = 50
"""Rows from which an accuracy says something."""

AGAINST, WITH = 0.4, 0.6
"""Accuracy on validation rows up to which, and on training rows from which, the two contradict each other."""

RISEN = 1.05
"""Validation loss at the end ÷ at its best from which the run was too long."""

LEARNT_BY_HEART = 0.99
"""Accuracy on training rows from which there is nothing left to learn."""

DISPLACED = 0.1
"""Nats a token by which chosen responses have become less likely, from which it is said."""

LEARNING, SHARE = 20, 0.25
"""Steps after the warm-up, and share of all steps, from which a run that has learnt nothing should have."""

EARLY = 0.15
"""Share of the steps within which a run that comes apart does so for want of a warm-up."""


@dataclass(frozen=True, slots=True)
class Moved:
    """How far the policy is from where it is measured against, mean nats a token; signs as of the log-ratios.

    Attributes:
        chosen, rejected: preferred and other responses under their rows' goals.
        reward: larger of their mean implicit rewards, without sign; None where there are no log-ratios.
        origin: "the reference"; or "the first step" without one, which other responses are compared with: roughly.
    """

    chosen: float
    rejected: float
    reward: float | None
    origin: str = "the reference"

    @property
    def furthest(self) -> float:
        return max(abs(self.chosen), abs(self.rejected))


def findings(run: RunRecord) -> Iterator[Finding]:
    """What is to be said of the course of a run, causes before what they bring about."""
    late = (_hardly_moved, _against_validation, _goal_ignored, _too_long, _displaced) if _should_know(run) else ()
    for rule in (_skipped, _nothing_moved, _other_reference, _came_apart, _faint, *late):
        found = rule(run)
        if found is not None:
            yield found
            if found.severity == "alarm":  # what follows from it says nothing more
                return


def _should_know(run: RunRecord) -> bool:
    """Whether a run has gone on for long enough to have learnt something."""
    schedule = run.config.optimizer.schedule
    warm = n_warmup(run.n_steps, warmup_steps=schedule.warmup_steps, warmup_ratio=schedule.warmup_ratio)
    return run.step >= max(warm + LEARNING, SHARE * run.n_steps)


def moved(run: RunRecord, end: Callable[[str], float | None] | None = None) -> Moved | None:
    """None where metrics do not say it: no rewards, or rewards against a reference that follows the policy.

    Args:
        end: which value of a metric counts; by default that of the last evaluation or steps.
    """
    if run.config.reference.update is not None or run.objective.beta <= 0:
        return None
    if "reference" not in run.objective.needs:
        return _since_the_start(run) if end is None else None
    end = run.end if end is None else end
    rewards = [end(f"rewards/{name}") for name in ("chosen", "rejected")]
    lengths = [end(f"lengths/{name}") for name in ("chosen", "rejected")]
    if None in rewards or None in lengths:
        return None
    per = [1.0 if run.objective.per_token else length for length in lengths if length]
    chosen, rejected = (
        reward / run.objective.beta / n for reward, n in zip(rewards, per, strict=True) if reward is not None
    )
    return Moved(chosen, rejected, max(abs(reward) for reward in rewards if reward is not None))


def _since_the_start(run: RunRecord) -> Moved | None:
    """By the log-probs of training batches, each against the first step's: without a reference all there is."""
    found = []
    for name in ("chosen", "rejected"):
        first, last, length = run.first(f"logps/{name}"), run.trained(f"logps/{name}"), run.trained(f"lengths/{name}")
        if first is None or last is None or not length:
            return None
        found.append((last - first) / length)
    return Moved(found[0], found[1], None, "the first step")


# --- rules ---


def _skipped(run: RunRecord) -> Finding | None:
    skipped = run.series.get("skipped_steps")
    n = 0 if skipped is None else int(skipped.values[-1])
    if not n:
        return None
    severity: Severity = "alarm" if n > 0.1 * run.step else "warning"
    return Finding(
        "skipped-steps", severity,
        "Steps were skipped: their gradients were not finite.",
        f"{n} of {run.step} steps",
        "Numbers overflow in half precision, the learning rate is too high, or a row is odd.",
        "Set model.dtype: float32, or a lower optimizer.learning_rate.",
    )  # fmt: skip


def _nothing_moved(run: RunRecord) -> Finding | None:
    norm = run.series.get("grad_norm")
    if norm is None or norm.values.max() > 0:
        return None
    return Finding(
        "nothing-trained", "alarm",
        "Nothing was trained: every gradient is 0.",
        f"grad_norm is 0 in all of {len(norm.values)} steps",
        "The adapter is frozen or weighs nothing (a scale of 0), or the loss is flat where the run starts.",
        "Give adapter.lora_parameters.scale (or alpha) a value above 0, and see in `mlxpref train`'s first lines how "
        "many parameters are trainable.",
    )  # fmt: skip


def _other_reference(run: RunRecord) -> Finding | None:
    start = moved(run, run.first)
    if start is None or start.reward is None or start.furthest <= STARTED:
        return None
    momentum = run.config.reference.momentum
    meant = momentum is not None and momentum <= USUAL_MOMENTUM
    return Finding(
        "other-reference", "note" if meant else "alarm",
        "The reference is not the policy that the run started from.",
        f"before the first update the policy is {start.chosen:+.2f} nats a token from its reference on preferred "
        f"responses and {start.rejected:+.2f} on the others; 0 is expected",
        "The reference log-probs are those of another policy." if momentum is None else
        f"reference.momentum {momentum:g} carries the reference on from reference.previous, "
        + ("as it should." if meant else "and further than a round's own step."),
        "" if meant else "Start with an empty reference.store." if momentum is None else
        "Name the adapter in reference.previous that adapter.init_from was trained from, and a momentum of about 0.3.",
    )  # fmt: skip


def _came_apart(run: RunRecord) -> Finding | None:
    here, first = moved(run), run.first("loss")
    if here is None or first is None or max(here.chosen, here.rejected) > -FALLEN:
        return None
    if here.reward is not None and here.reward < FAINT:
        return None
    loss = run.trained("loss")
    if loss is None or loss <= first:
        return None
    risen = run.series["loss"]
    when = int(risen.steps[(risen.values > 1.5 * first).argmax()]) if (risen.values > 1.5 * first).any() else run.step
    schedule = run.config.optimizer.schedule
    unwarmed = not schedule.warmup_steps and not schedule.warmup_ratio and when <= max(5, EARLY * run.n_steps)
    rate = run.config.optimizer.learning_rate
    return Finding(
        "no-warm-up" if unwarmed else "learning-rate-too-high", "alarm",
        "The run came apart" + (" in its first steps." if unwarmed else "."),
        f"loss on training rows {first:.2f} at first, {loss:.2f} at the end, above {1.5 * first:.2f} from step {when}; "
        f"preferred responses are {-here.chosen:.1f} nats a token less likely than to {here.origin}, the others "
        f"{-here.rejected:.1f}",
        f"The learning rate ({rate:g}) is at its full height from the first step." if unwarmed else
        f"The learning rate ({rate:g}) is too high.",
        f"Set optimizer.schedule.warmup_ratio: 0.1; if that is not enough, optimizer.learning_rate: {rate / 10:g}."
        if unwarmed else f"Set optimizer.learning_rate: {rate / 10:g}.",
    )  # fmt: skip


def _faint(run: RunRecord) -> Finding | None:
    here, beta = moved(run), run.objective.beta
    if here is None or here.reward is None or run.objective.per_token:  # a mean's β is on another scale
        return None
    if here.furthest < FAR or here.reward > FAINT * 5:
        return None
    return Finding(
        "beta-too-small", "alarm",
        "Nothing holds the policy near its reference.",
        f"preferred responses moved by {here.chosen:+.1f} nats a token and the others by {here.rejected:+.1f}, and "
        f"with beta {beta:g} that is a reward of {here.reward:.1g}",
        f"beta {beta:g} is so small that the loss does not feel how far the policy has gone.",
        "Set objective.beta to 0.01–0.5 (0.1 is usual).",
    )  # fmt: skip


def _hardly_moved(run: RunRecord) -> Finding | None:
    here = moved(run)
    if here is None or here.reward is None or here.furthest > STILL:
        return None
    accuracy = run.end("rewards/accuracies")
    if accuracy is not None and accuracy > WITH:
        return None
    rate = run.config.optimizer.learning_rate
    return Finding(
        "learning-rate-too-low", "alarm",
        "Hardly anything was learnt.",
        f"after {run.step} steps responses are {here.furthest:.1g} nats a token from the reference"
        + ("" if accuracy is None else f", accuracy {accuracy:.0%}"),
        f"The learning rate ({rate:g}) is too low, or the run too short.",
        f"Set optimizer.learning_rate: {rate * 10:g}, or more training.iters.",
    )  # fmt: skip


def _against_validation(run: RunRecord) -> Finding | None:
    found, trained = run.series.get("eval_rewards/accuracies"), run.trained("rewards/accuracies")
    if found is None or trained is None:
        return None
    evaluated = float(found.values[-1])
    chance = 0.5 - math.sqrt(0.25 / max(1, run.facts["data"]["valid_rows"]) * 4)  # two standard errors of a coin
    if evaluated > min(AGAINST, chance) or trained < WITH or run.config.reference.update is not None:
        return None
    return Finding(
        "labels-flipped", "alarm",
        "The run learns the opposite of what the validation rows prefer.",
        f"accuracy {trained:.0%} on training rows, {evaluated:.0%} on validation rows (a coin has 50 %)",
        "Chosen and rejected, or the direction of the scores, are exchanged in one of the two.",
        "Look at both with `mlxpref inspect`; exchange data.columns, or set relabel.direction where low scores are "
        "good.",
    )  # fmt: skip


def _goal_ignored(run: RunRecord) -> Finding | None:
    found = (run.end(f"{name}_half/rewards/accuracies") for name in ("chosen", "rejected"))
    halves = [value for value in found if value is not None]
    if len(halves) < 2 or run.config.reference.update is not None or _rows_of_end(run) < ENOUGH:
        return None
    # An example of K responses has one goal that is the chosen one's score, and K − 1 others.
    k = (run.facts["data"].get("train") or {}).get("responses_each", 2.0)
    mean = (halves[0] + (k - 1) * halves[1]) / k
    if mean > CHANCE:
        return None
    same = min(halves) < AGAINST < WITH < max(halves)
    return Finding(
        "goal-ignored", "alarm" if same else "warning",
        "The goal in the prompt decides nothing.",
        f"accuracy {halves[0]:.0%} where the goal is the chosen response's score and {halves[1]:.0%} where it is "
        f"another's, {mean:.0%} over all goals; ignoring the goal gives 50 %",
        "The policy prefers the same response whatever is asked for: one half outweighs the other, or goals do not "
        "reach it." if same else
        "The goals do not fit the responses (other rows' scores, a column in the wrong order), or the run is too "
        "short.",
        "See with `mlxpref inspect` that each prompt states its response's score; train on relabel.halves: both with "
        "batching.keep_together, and longer.",
    )  # fmt: skip


def _rows_of_end(run: RunRecord) -> float:
    """How many rows ``run.end`` of an accuracy is taken from."""
    if "eval_rewards/accuracies" in run.series:
        return float(run.facts["data"]["valid_rows"])
    return run.config.batching.batch_size * max(1, SETTLED * run.step)


def _too_long(run: RunRecord) -> Finding | None:
    losses = run.series.get("eval_loss")
    if losses is None or len(losses.values) < 3:
        return None
    best = int(losses.values.argmin())
    if losses.values[best] <= 0 or losses.values[-1] < RISEN * losses.values[best]:
        return None
    trained = run.trained("rewards/accuracies") or 0.0
    saturated = trained >= LEARNT_BY_HEART
    kept = (run.folder / "best").is_dir()
    step = int(losses.steps[best])
    return Finding(
        "margins-saturated" if saturated else "too-long", "warning",
        "The run went on after the validation loss was at its lowest.",
        f"{losses.values[best]:.3f} at step {step}, {losses.values[-1]:.3f} at the end"
        + (f"; accuracy on training rows {trained:.0%}" if saturated else ""),
        "The training pairs are known by heart: margins still grow on them, and on no others." if saturated else
        "The policy fits the training pairs further than they tell of others.",
        (f"Use {run.folder / 'best'}, " if kept else "Set training.best_metric: eval_loss, which keeps the best, ")
        + f"or stop at {step} steps (training.iters, training.early_stopping).",
    )  # fmt: skip


def _displaced(run: RunRecord) -> Finding | None:
    """Likelihood displacement: what is preferred becomes less likely, too, only less so."""
    here = moved(run)
    if here is None or here.reward is None or here.chosen > -DISPLACED:
        return None
    severe = here.chosen < -5 * DISPLACED
    return Finding(
        "chosen-less-likely", "warning" if severe else "note",
        "Preferred responses have become less likely than they were (likelihood displacement).",
        f"{here.chosen:+.2f} nats a token, the others {here.rejected:+.2f}",
        "The loss asks for a difference only; where two responses are alike, both fall together.",
        "It is no fault by itself: look at what is written (`mlxpref generate`). To stop it, add a term "
        "{name: sft, weight: 0.1} to objective, or drop pairs that hardly differ (relabel.min_gap).",
    )  # fmt: skip
