"""Every objective once more, one example at a time: Python floats and ``math``, written from the papers.

It shares nothing with the package, and is slow and naive on purpose. A new objective adds one row to the module of
its family: a function of an example, the option values to try, and, where somebody has published or computed them
independently, golden values.

**Rows.** ``ORACLE[name]`` is a ``Row``. ``Row.run(examples, options, state=None)`` gives (losses, state after) for
every kind of row: of one example (``@row``), of a batch (``@batch_row``), of a batch with a state
(``@batch_row(start=…)``, the state a plain tuple in the order of the package's NamedTuple). Only the mean of a batch
row's losses is its promise: AOT sorts. Compare states through the losses of the batches that follow.

**Constants.** Where a formula stops the gradient, its row wraps the value in ``sg``. Outside differences ``sg`` does
nothing. ``frozen(loss, at)`` evaluates the loss once at ``at``, keeps the value of each ``sg`` in order, and gives back
a loss that uses these values wherever it is evaluated; ``token_slopes``, ``text_slopes`` and ``kl_slopes`` difference
that one, so nothing need be passed: ``token_slopes(lambda xs: ORACLE[name].run(xs, options)[0], examples)``.
The three take one example and a loss of one, or a list and a loss of a list (float or list of floats, summed), and
give ∂ Σ loss / ∂ each token: [k][t] for one example, a list of these for a list.

**Golden values.** ``for x, state, (loss, by_chosen, by_rejected) in golden.cases()``: ``x`` is A or B with the columns
and texts this value needs, to be evaluated as a batch of one, from ``state`` if that is not None. Each policy token of
a response has the slope of its sum. Only the columns named in ``x.extras`` and ``x.texts`` are there.

**Values.** ``VALUES`` holds single values (also of lists): the sum of the losses of ``examples`` as one batch.
"""

from __future__ import annotations

import oracle_batches
import oracle_lists
import oracle_margins
import oracle_policy_only
import oracle_ratios
import oracle_scores
import oracle_texts
import oracle_tokens
from oracle_tokens import wpo_weights
from oracle_values import VALUES
from oracle_words import (
    ORACLE,
    A,
    B,
    Example,
    Golden,
    Row,
    Value,
    batch_row,
    delta,
    even,
    frozen,
    kl_slopes,
    log_ratio,
    log_sigma,
    mean,
    pair,
    random_examples,
    responses,
    row,
    sg,
    text_slopes,
    token_slopes,
)

FAMILIES = (
    oracle_margins,
    oracle_ratios,
    oracle_batches,
    oracle_policy_only,
    oracle_scores,
    oracle_lists,
    oracle_tokens,
    oracle_texts,
)

__all__ = [
    "FAMILIES",
    "ORACLE",
    "VALUES",
    "A",
    "B",
    "Example",
    "Golden",
    "Row",
    "Value",
    "batch_row",
    "delta",
    "even",
    "frozen",
    "kl_slopes",
    "log_ratio",
    "log_sigma",
    "mean",
    "pair",
    "random_examples",
    "responses",
    "row",
    "sg",
    "text_slopes",
    "token_slopes",
    "wpo_weights",
]
