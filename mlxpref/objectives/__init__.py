"""What training minimises: pure functions of log-probs, written once for NumPy, MLX and PyTorch.

The families, by what a formula looks at:

- ``margin``: Δ, the chosen log-ratio less the rejected one;
- ``ratios``: the log-ratios of both responses, not their difference alone;
- ``batchwise``: pairs that a whole batch, or what came before it, decides on;
- ``scored``: log-ratios and scores;
- ``listwise``: K responses at once;
- ``tokenwise``: log-ratios token by token;
- ``texts``: a further text beside the responses;
- ``policy_only``: the policy's log-probs, without a reference.

A new family is a new module here; ``docs/adding-an-objective.md`` shows a new formula.
"""

from mlxpref.objectives import (  # fills TABLE
    batchwise,
    listwise,
    margin,
    policy_only,
    ratios,
    scored,
    texts,
    tokenwise,
)
from mlxpref.objectives.mixture import Objective
from mlxpref.objectives.registry import (
    TABLE,
    BatchLogps,
    Entry,
    FlipRate,
    ListLogps,
    NonNegative,
    PerExample,
    PerExampleIndex,
    PerResponse,
    PerResponseLogps,
    PerToken,
    Positive,
    Share,
    TextLogps,
    objective,
)
from mlxpref.objectives.resolve import check_widths, find_objective, resolve_objective

__all__ = [
    "TABLE",
    "BatchLogps",
    "Entry",
    "FlipRate",
    "ListLogps",
    "NonNegative",
    "Objective",
    "PerExample",
    "PerExampleIndex",
    "PerResponse",
    "PerResponseLogps",
    "PerToken",
    "Positive",
    "Share",
    "TextLogps",
    "batchwise",
    "check_widths",
    "find_objective",
    "listwise",
    "margin",
    "objective",
    "policy_only",
    "ratios",
    "resolve_objective",
    "scored",
    "texts",
    "tokenwise",
]
