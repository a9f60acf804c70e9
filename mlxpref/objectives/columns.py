"""What a step hands over, sorted by what formulas ask for: responses and further texts, parts and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxpref import ops
from mlxpref.objectives.registry import FROM_MODEL, Column, Kind
from mlxpref.ops import Array
from mlxpref.records import Logps


def n_responses(n_slots: int, texts: Mapping[str, str]) -> int:
    """K, of S = K rows of responses and those of the texts, one an example or one a response."""
    single = sum(per == "example" for per in texts.values())
    return (n_slots - single) // (1 + len(texts) - single)


def split_texts(columns: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Log-probs of S rows an example as those of K responses, and each text's own by name.

    Args:
        columns: by name; ``policy``, ``reference`` and what the model says of each token are (B, S, L): the
            responses, then the texts in their order.
        texts: name → "example", one row, or "response", K rows.
    """
    if not texts:
        return dict(columns)
    k = n_responses(columns["policy"].tokens.shape[1], texts)
    found = {name: value for name, value in columns.items() if value is not None}
    for name in ("policy", "reference", *sorted(FROM_MODEL)):
        if name in found:
            found[name] = _rows(found[name], 0, k)
    start = k
    for text, per in texts.items():
        n = k if per == "response" else 1
        found[text] = _rows(columns["policy"], start, start + n)
        if columns.get("reference") is not None:
            found[f"{text}_reference"] = _rows(columns["reference"], start, start + n)
        start += n
    return found


def _rows(column: Any, start: int, end: int) -> Any:
    if isinstance(column, Logps):
        return Logps(column.tokens[:, start:end], column.mask[:, start:end])
    return column[:, start:end]


def join_rows(columns: Sequence[Any], kind: Kind) -> Any:
    """One column of several parts as that of all their rows; token axes are padded to the longest."""
    first = columns[0]
    if isinstance(first, Logps):
        return Logps(*(join_rows(parts, Column("token")) for parts in zip(*columns, strict=True)))
    if isinstance(kind, Column) and kind.per == "token":
        longest = max(column.shape[-1] for column in columns)
        columns = [_widened(column, longest) for column in columns]
    return ops.concatenate(columns, 0) if len(columns) > 1 else first


def _widened(array: Array, n: int) -> Array:
    """(…, L) with columns of 0 up to n."""
    more = n - array.shape[-1]
    nothing = ops.library(array).zeros_like(array[..., :1])
    return ops.concatenate([array, *[nothing] * more], -1) if more else array
