"""What a policy prefers: views of scored examples, their log-probs, and figures from those."""

from mlxpref.evaluate.evaluation import EvaluatedRow, Evaluation, evaluate
from mlxpref.evaluate.views import VIEWS, View, in_goal_units, restore, views_of

__all__ = ["VIEWS", "EvaluatedRow", "Evaluation", "View", "evaluate", "in_goal_units", "restore", "views_of"]
