"""Many runs of one configuration with some keys varied, measured alike, in one table."""

from mlxpref.ablate.asked import Varied, parse_seeds, parse_vary
from mlxpref.ablate.folder import Looked
from mlxpref.ablate.grid import Combination, Grid, Point, make_grid
from mlxpref.ablate.measure import Asking, asking
from mlxpref.ablate.results import Result
from mlxpref.ablate.sweep import Choices, Sweep, Watch
from mlxpref.ablate.table import Table

__all__ = [
    "Asking", "Choices", "Combination", "Grid", "Looked", "Point", "Result", "Sweep", "Table", "Varied", "Watch",
    "asking", "make_grid", "parse_seeds", "parse_vary",
]  # fmt: skip
