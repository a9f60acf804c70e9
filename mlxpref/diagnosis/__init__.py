"""What is wrong with a run, and what to change: from its metrics, its data's figures, and what was measured of it."""

from __future__ import annotations

from itertools import chain

from mlxpref.diagnosis import of_behaviour, of_course, of_data
from mlxpref.diagnosis.finding import SEVERITIES, Finding, Severity
from mlxpref.diagnosis.record import CONTROL, EVALUATION, RunRecord, Series, read_record

__all__ = [
    "CONTROL",
    "EVALUATION",
    "SEVERITIES",
    "Finding",
    "RunRecord",
    "Series",
    "Severity",
    "diagnose",
    "read_record",
]


def diagnose(run: RunRecord) -> list[Finding]:
    """Everything worth saying of a run: the worst first, and of equally bad things causes before their effects."""
    found: dict[str, Finding] = {}
    for one in chain(of_data.findings(run), of_course.findings(run), of_behaviour.findings(run)):
        known = found.setdefault(one.name, one)
        if SEVERITIES.index(one.severity) < SEVERITIES.index(known.severity):
            found[one.name] = one
    return sorted(found.values(), key=lambda one: SEVERITIES.index(one.severity))
