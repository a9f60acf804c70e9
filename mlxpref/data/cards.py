"""How computed columns were made: what `mlxpref columns` leaves beside rows, for whoever reads them later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CARD = "columns.json"
MARK = "mlxpref_columns"
VERSION = 1

Made = Mapping[str, Any]
"""Which columns (``add``), by which models, of which tokens (``tokenization``); ``goals`` is false where the rows
had none yet, and have some now."""


def column_cards(path: str) -> tuple[Made, ...]:
    """Of a folder that `mlxpref columns` wrote, or of a split's file in one; () for other data."""
    place = Path(path).expanduser()
    file = (place if place.is_dir() else place.parent) / CARD
    try:
        card = json.loads(file.read_text(encoding="utf8")) if place.exists() and file.is_file() else None
    except (OSError, ValueError):
        return ()
    if not isinstance(card, Mapping) or MARK not in card:
        return ()
    if place.is_file() and place.stem not in card.get("splits", ()):
        return ()
    found = card.get("columns")
    return tuple(one for one in (found if isinstance(found, list) else [found]) if isinstance(one, Mapping))


def with_card(cards: Iterable[Made], made: Made) -> list[dict[str, Any]]:
    """The cards once these columns are added: earlier ones say no more of a column that is replaced."""
    left = [{**card, "add": [name for name in card.get("add", ()) if name not in made["add"]]} for card in cards]
    return [*(card for card in left if card["add"]), dict(made)]
