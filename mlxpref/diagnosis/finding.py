"""One thing that a run says about itself, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["alarm", "warning", "note"]
"""alarm: what was trained is not what was meant; warning: it may be; note: as it should be, or harmless."""

SEVERITIES: tuple[Severity, ...] = ("alarm", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Attributes:
        name: for programs; the same for the same kind of finding.
        severity: how bad it is.
        what: what happened, a sentence.
        evidence: the figures it was seen by, a sentence.
        cause: the likely one, a sentence; "" where there is nothing to explain.
        change: the option to change, a sentence; "" where nothing is to be done.
    """

    name: str
    severity: Severity
    what: str
    evidence: str
    cause: str = ""
    change: str = ""

    def as_record(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)
