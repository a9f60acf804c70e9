"""One line of the doctor's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at and found.

    Attributes:
        name: what was looked at.
        status: "ok"; "warn", a run goes but not as it could; "fail", it will not go.
        said: what was found.
        remedy: what to do about it; on an "ok" line, advice. None where there is nothing to say.
    """

    name: str
    status: Status
    said: str
    remedy: str | None = None


def settled(name: str, look: Callable[[], Check | Iterable[Check]]) -> Iterator[Check]:
    """The checks of one function; where it breaks off comes a failed check, and those of others still run."""
    try:
        found = look()
        yield from [found] if isinstance(found, Check) else found
    except Exception as error:  # a doctor that falls ill on the first symptom helps nobody
        first = (str(error).strip() or "no message").splitlines()[0]
        yield Check(name, "fail", f"could not be checked: {type(error).__name__}: {first}")
