"""What a policy prefers and what it can be asked for: views of scored examples, control curves, and their figures."""

from mlxpref.evaluate.control import (
    Achieved,
    ControlCurve,
    Sample,
    achieved,
    as_curve,
    control_curve,
    curve_of,
)
from mlxpref.evaluate.evaluation import EvaluatedRow, Evaluation, evaluate
from mlxpref.evaluate.statistics import spearman
from mlxpref.evaluate.views import VIEWS, View, in_goal_units, restore, views_of

__all__ = [
    "VIEWS",
    "Achieved",
    "ControlCurve",
    "EvaluatedRow",
    "Evaluation",
    "Sample",
    "View",
    "achieved",
    "as_curve",
    "control_curve",
    "curve_of",
    "evaluate",
    "in_goal_units",
    "restore",
    "spearman",
    "views_of",
]
