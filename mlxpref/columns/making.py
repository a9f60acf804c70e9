"""From what models said of a row to its columns. Plain arithmetic: nothing here runs a model.

Values stand in the order of the row's responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlxpref.columns.measures import Measured
from mlxpref.columns.rows import Row
from mlxpref.columns.wanted import Place, Wanted
from mlxpref.rewards import contrastive_scores, length_penalised, log_ratio_scores, ranking_consistency

BETA = 0.1
"""Of rewards, where none is given: that of DPO."""

By = Mapping[Place, Measured]


def make_columns(wanted: Wanted, found: By, rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Column → the value of each row: a tuple of K numbers (or lists of them), one number, or a text."""
    return {name: _MAKERS[name](wanted, found, rows) for name in wanted.add}


def _previous(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    return [_numbers(sums) for sums in found[wanted.policies[0]].own]


def _aligned_logps(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    """Means per token of each model's own tokens, so that models with other tokenizers compare."""
    measured = [found[place] for place in wanted.policies]
    means = [[sums / n for sums, n in zip(one.own, one.lengths, strict=True)] for one in measured]
    return [_numbers(np.mean(own, 0)) for own in zip(*means, strict=True)]


def _margin_rewards(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    """One number a response, or with M adapters a list of M."""
    rewards = [
        [log_ratio_scores(own, base, wanted.beta or BETA) for own, base in zip(one.own, one.base, strict=True)]
        for one in (found[place] for place in wanted.policies)
    ]
    if len(rewards) == 1:
        return [_numbers(own) for own in rewards[0]]
    return [tuple(map(list, zip(*map(_numbers, own), strict=True))) for own in zip(*rewards, strict=True)]


def _implicit_reward(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    own = found[wanted.policies[0]]
    against = own.base if wanted.previous_adapter is None else found[wanted.previous].own
    scores = [log_ratio_scores(*pair, wanted.beta or BETA) for pair in zip(own.own, against, strict=True)]
    lengths = [[len(text) for text in row.text.responses] for row in rows]
    penalty = wanted.length_penalty or 0.0
    return [_numbers(length_penalised(*pair, penalty)) for pair in zip(scores, lengths, strict=True)]


def _density_ratio(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    strong, weak = (found[place] for place in wanted.siblings)
    of_rows = zip(strong.plain, weak.plain, strong.plain_lengths, strict=True)
    return [_numbers(contrastive_scores(*values)) for values in of_rows]


def _confidence(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    """Both adapters rank by their log-ratio to the base, the reward they have learnt."""
    now, then = found[wanted.policies[0]], found[wanted.previous]
    of_rows = zip(now.own, then.own, now.base, strict=True)
    return [float(ranking_consistency(own - base, previous - base)) for own, previous, base in of_rows]


def _third(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    return list(found[wanted.policies[0]].third)


def _ches(wanted: Wanted, found: By, rows: Sequence[Row]) -> list[Any]:
    """A response each, all alike: what data hold of a response goes through `mlxpref relabel`."""
    values = found[wanted.policies[0]].ches
    return [(value,) * len(row.text.responses) for value, row in zip(values, rows, strict=True)]


_MAKERS: dict[str, Callable[[Wanted, By, Sequence[Row]], list[Any]]] = {
    "previous": _previous,
    "aligned_logps": _aligned_logps,
    "margin_rewards": _margin_rewards,
    "implicit_reward": _implicit_reward,
    "density_ratio": _density_ratio,
    "third": _third,
    "confidence": _confidence,
    "ches": _ches,
}


def _numbers(values: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, values))
