"""Numbers in sentences."""

from __future__ import annotations


def counted(n: int, what: str, plural: str | None = None) -> str:
    """A number with its noun: ``1 shape``, ``2 shapes``, ``0 shapes``.

    Args:
        what: the noun in the singular; of several words the last one is inflected.
        plural: where it does not end in s: ``counted(2, "half", "halves")``.
    """
    return f"{n} {what}" if n == 1 else f"{n} {plural or what + 's'}"
