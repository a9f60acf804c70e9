"""Do two backends agree? The same weights, rows and order, in float32: what each computes, and how far apart.

Text and NumPy only: backends are handed in as modules.
"""

from mlxpref.parity.compare import Row, Tolerances, compare_traces
from mlxpref.parity.models import BUILT_IN, write_model
from mlxpref.parity.trace import Settings, open_policy, run_trace, token_logps, without_experts

__all__ = [
    "BUILT_IN",
    "Row",
    "Settings",
    "Tolerances",
    "compare_traces",
    "open_policy",
    "run_trace",
    "token_logps",
    "without_experts",
    "write_model",
]
