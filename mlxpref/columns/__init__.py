"""Columns that objectives need and data seldom have, computed by models: what ``mlxpref columns`` adds.

``wanted`` says what there is and which models it takes; ``measures`` runs those models over the rows, one after
the other; ``making`` turns what they said into columns; ``folders`` reads the rows and writes them again.
"""

from mlxpref.columns.adding import Added, add_columns
from mlxpref.columns.wanted import COLUMNS, SCORES, Place, Wanted

__all__ = ["COLUMNS", "SCORES", "Added", "Place", "Wanted", "add_columns"]
