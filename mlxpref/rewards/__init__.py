"""Scores: what says how good a response is, and what is made of its numbers before they become goals.

``scorer`` is the door that a scorer's numbers come through. The other modules are functions on numbers, by idea:
``transforms`` (one score), ``ensembles`` (several models'), ``directions`` (several attributes'), ``lengths``,
``comparisons`` (within a list), ``log_probs`` (two models'), ``selection`` and ``filters`` (what stays). They know
neither records nor files; `mlxpref relabel` applies those that :mod:`mlxpref.data.scoring` and
:mod:`mlxpref.data.picking` name.
"""

from mlxpref.rewards.comparisons import ranking_consistency, win_rates
from mlxpref.rewards.directions import direction_score, direction_words, dpa_weights, parse_direction, second_weight
from mlxpref.rewards.ensembles import mean_score, uncertainty_weighted, worst_case
from mlxpref.rewards.filters import (
    Strength,
    ches_scores,
    highest_kept,
    lowest_kept,
    preference_strength,
    strength_labels,
)
from mlxpref.rewards.lengths import balanced_alpha, length_penalised
from mlxpref.rewards.log_probs import SteerlmWeights, contrastive_scores, log_ratio_scores, steerlm_weights
from mlxpref.rewards.scorer import Scorer, load_scorer, score_all
from mlxpref.rewards.selection import Pair, Select, first_round_pairs, rejection_sample, select_pair
from mlxpref.rewards.transforms import (
    Standard,
    centred_utility,
    fit_standard,
    joint_utility,
    log_sigmoid,
    reference_score,
    standardise,
)

__all__ = [
    "Pair",
    "Scorer",
    "Select",
    "Standard",
    "SteerlmWeights",
    "Strength",
    "balanced_alpha",
    "centred_utility",
    "ches_scores",
    "contrastive_scores",
    "direction_score",
    "direction_words",
    "dpa_weights",
    "first_round_pairs",
    "fit_standard",
    "highest_kept",
    "joint_utility",
    "length_penalised",
    "load_scorer",
    "log_ratio_scores",
    "log_sigmoid",
    "lowest_kept",
    "mean_score",
    "parse_direction",
    "preference_strength",
    "ranking_consistency",
    "reference_score",
    "rejection_sample",
    "score_all",
    "second_weight",
    "select_pair",
    "standardise",
    "steerlm_weights",
    "strength_labels",
    "uncertainty_weighted",
    "win_rates",
    "worst_case",
]
