"""Scorers: what says how good a response is, and the door their numbers come through."""

from mlxpref.rewards.scorer import Scorer, load_scorer, score_all

__all__ = ["Scorer", "load_scorer", "score_all"]
