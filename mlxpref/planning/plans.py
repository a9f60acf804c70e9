"""The three plans of a run: its updates, its evaluations, and the pass for reference log-probs."""

from __future__ import annotations

from collections.abc import Sequence

from mlxpref.config import Config
from mlxpref.data.plan import Plan, plan_pass, plan_steps
from mlxpref.records import Tokenized
from mlxpref.reference import kinds_of

STEPS_PER_EVAL = 200
"""Of runs that have validation rows and do not say."""


def max_shapes(config: Config, share: int, rows: Sequence[Tokenized]) -> int:
    """``max_shapes`` covers the whole run: half for the updates, a quarter each for the reference
    pass and for evaluation; never fewer than there are numbers of responses."""
    return max(config.batching.max_shapes // share, kinds_of(rows))


def plan_training(
    config: Config,
    rows: Sequence[Tokenized],
    *,
    share_prompts: bool,
    n_workers: int = 1,
    tokens: int | None = None,
) -> Plan:
    """Every micro-batch of the updates.

    Args:
        share_prompts: as the policy found out.
        n_workers: that share out each batch.
        tokens: padded tokens of a micro-batch; None: the configuration's.
    """
    batching, training = config.batching, config.training
    return plan_steps(
        rows,
        batch_size=batching.examples_per_step,
        iters=training.iters,
        epochs=training.epochs,
        micro_batch_tokens=batching.budget if tokens is None else tokens,
        share_prompts=share_prompts,
        shuffle=batching.shuffle,
        keep_together=batching.keep_together,
        seed=training.seed,
        max_shapes=max_shapes(config, 2, rows),
        n_workers=n_workers,
    )


def plan_evaluation(
    config: Config,
    rows: Sequence[Tokenized],
    *,
    share_prompts: bool,
    n_workers: int = 1,
    tokens: int | None = None,
) -> Plan:
    """One evaluation, in batches like those of training: an objective may couple the examples of one.

    Arguments as ``plan_training``.
    """
    batching, training = config.batching, config.training
    n = training.val_batches
    some = 0 < n * batching.examples_per_step < len(rows)
    return plan_steps(
        rows,
        batch_size=batching.examples_per_step,
        iters=n if some else None,
        epochs=None if some else 1.0,
        micro_batch_tokens=batching.budget if tokens is None else tokens,
        share_prompts=share_prompts,
        shuffle=some,
        keep_together=batching.keep_together,
        seed=training.seed,
        max_shapes=max_shapes(config, 4, rows),
        n_workers=n_workers,
    )


def plan_reference(
    config: Config, rows: Sequence[Tokenized], *, share_prompts: bool, tokens: int | None = None
) -> Plan:
    """One pass over rows, each of them once; arguments as ``plan_training``."""
    return plan_pass(
        rows,
        micro_batch_tokens=config.batching.budget if tokens is None else tokens,
        share_prompts=share_prompts,
        max_shapes=max_shapes(config, 4, rows),
    )


def visited(plan: Plan) -> list[int]:
    """Rows a plan visits at least once: a short run on much data needs the reference of no others."""
    return sorted({row for step in plan.steps for part in step for row in part.rows})


def eval_every(config: Config, *, has_valid: bool) -> int:
    """Steps between evaluations; 0 for none."""
    if not has_valid:
        return 0
    given = config.training.steps_per_eval
    return STEPS_PER_EVAL if given is None else given


def n_evaluations(every: int, n_steps: int) -> int:
    """How many evaluations a run of so many steps makes: every so many, and after the last."""
    return 0 if not every else n_steps // every + (n_steps % every > 0)
