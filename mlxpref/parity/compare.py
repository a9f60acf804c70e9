"""Two traces held against each other: for each quantity how far apart, and whether that is rounding.

The largest difference finds what is wrong somewhere; the mean of the signed differences finds what is wrong a
little everywhere. Rounding has no side, so its mean is far below its largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mlxpref.errors import RunError

Arrays = Mapping[str, np.ndarray]

FLOOR = 1e-6
"""Share of the largest entry of all tensors below which a tensor is rounding noise as a whole."""


_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What may differ; see ``docs/parity.md`` for why so much.

    Attributes:
        logps: nats, of each token.
        losses: of each example of the first batch, and of each step of the curve; no less than float32 tells apart.
        drift: mean signed difference of the curve; likewise.
        gradients: relative to each tensor's largest entry; norms relative to themselves.
        update: of each entry, relative to how far its tensor's farthest entry moved and weighted by its share of
            the tensor's largest gradient.
        adapters: at the end, relative to each tensor's largest entry.
        way: of what the adapter has gone since the start, relative to that, by the norm of each tensor.
        start: of the adapters both begin with, relative to each tensor's largest entry.
        share: of a tolerance that the mean signed difference may take up, where it has none of its own.
    """

    logps: float = 1e-4
    losses: float = 1e-3
    drift: float = 1e-4
    gradients: float = 1e-4
    update: float = 5e-3
    adapters: float = 1e-3
    way: float = 5e-2
    start: float = 1e-6
    share: float = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity compared.

    Attributes:
        quantity: for people, with its unit.
        largest: absolute difference; inf where a value is not finite.
        mean: signed, second less first.
        tolerance, mean_tolerance: of the two.
        where: place of the largest difference: a parameter, a step, a token.
    """

    quantity: str
    largest: float
    mean: float
    tolerance: float
    mean_tolerance: float
    where: str

    @property
    def ok(self) -> bool:
        return self.largest <= self.tolerance and abs(self.mean) <= self.mean_tolerance

    @property
    def excess(self) -> float:
        """How many times the tolerance (of the largest, or of the mean) is reached; above 1 it is exceeded."""
        return max(self.largest / self.tolerance, abs(self.mean) / self.mean_tolerance)


def compare_traces(one: Arrays, other: Arrays, tolerances: Tolerances | None = None) -> list[Row]:
    """Every quantity of two traces of the same model, rows and settings.

    Raises:
        RunError: they are not of the same things: other parameters, shapes or numbers of tokens.
    """
    given = Tolerances() if tolerances is None else tolerances
    one, other = _with_shared(one, other)
    _check_alike(one, other)
    return list(_rows(one, other, given))


def _rows(one: Arrays, other: Arrays, given: Tolerances) -> Iterator[Row]:
    def row(quantity: str, found: _Difference, tolerance: float, mean_tolerance: float | None = None) -> Row:
        mean = given.share * tolerance if mean_tolerance is None else mean_tolerance
        return Row(quantity, found.largest, found.mean, tolerance, mean, found.where)

    def relative(group: str, scale: Callable[[str], np.ndarray]) -> _Difference:
        return _relative(_group(one, group), _group(other, group), scale)

    def of(group: str) -> Callable[[str], np.ndarray]:
        return lambda name: one[f"{group}.{name}"]

    yield row("adapter at the start, relative", relative("start", of("start")), given.start)
    for name, quantity in _LOGPS.items():
        if name in one:
            yield row(quantity, _absolute(one[name], other[name], "token"), given.logps)
    losses = _absolute(one["losses"], other["losses"], "example")
    allowed = max(given.losses, 4 * _resolution(one["losses"]))
    yield row("losses of the first batch", losses, allowed, allowed)  # too few for a mean of its own
    yield row("gradients, relative", relative("gradients", of("gradients")), given.gradients)
    if _group(one, "gradients.shared"):
        found = relative("gradients.shared", of("gradients"))
        yield row("gradients, prompts shared, relative", found, given.gradients)
    yield row("first update, relative", _updates(one, other), given.update)
    loss, finest = _absolute(one["curve.loss"], other["curve.loss"], "step"), _resolution(one["curve.loss"])
    few = given.losses / len(one["curve.loss"])  # of a few steps a mean is no drift: one of them may make it
    yield row("loss curve", loss, max(given.losses, 4 * finest), max(given.drift, few, finest))
    norms = _ratios(one["curve.grad_norm"], other["curve.grad_norm"], "step")
    yield row("gradient norms, relative", norms, given.losses)
    yield row("adapter at the end, relative", relative("end", of("end")), given.adapters)
    yield row("way of the adapter, relative", _ways(one, other), given.way)


_LOGPS = {
    "logps.policy": "policy log-probs (nats)",
    "logps.policy.shared": "policy log-probs, prompts shared (nats)",
    "logps.reference": "reference log-probs (nats)",
}


def _resolution(values: np.ndarray) -> float:
    """What float32 tells apart at the largest of some values: some losses are squares of hundreds."""
    finite = values[np.isfinite(values)]
    return float(np.finfo(np.float32).eps) * float(np.abs(finite).max(initial=0.0))


@dataclass(frozen=True, slots=True)
class _Difference:
    largest: float
    mean: float
    where: str


def _absolute(one: np.ndarray, other: np.ndarray, unit: str) -> _Difference:
    with np.errstate(invalid="ignore"):
        gaps = other.astype(np.float64).ravel() - one.astype(np.float64).ravel()
    return _difference(gaps, lambda index: f"{unit} {index}")


def _ratios(one: np.ndarray, other: np.ndarray, unit: str) -> _Difference:
    """Differences of positive numbers, each relative to itself."""
    size = np.maximum(np.abs(one.astype(np.float64)), _TINY)
    with np.errstate(invalid="ignore"):
        gaps = (other.astype(np.float64) - one.astype(np.float64)) / size
    return _difference(gaps, lambda index: f"{unit} {index}")


def _updates(one: Arrays, other: Arrays) -> _Difference:
    """Adam divides a gradient by its own size: an entry whose gradient is rounding moves as far as any other, to a
    side that rounding decides. So each counts as much as its gradient does."""
    starts, gradients = _group(one, "start"), _group(one, "gradients")
    shares = {name: np.abs(g) / max(float(np.abs(g).max(initial=0.0)), _TINY) for name, g in gradients.items()}

    def moved(side: Arrays, name: str) -> np.ndarray:
        return side[f"update.{name}"] - starts[name]

    first, second = ({name: moved(side, name) * shares[name] for name in starts} for side in (one, other))
    return _relative(first, second, lambda name: moved(one, name))


def _ways(one: Arrays, other: Arrays) -> _Difference:
    """‖difference‖ / ‖way‖ of each tensor. Entries that rounding moves make a few tensors large, not their mean."""
    ratios, names = [], sorted(_group(one, "start"))
    for name in names:
        ways = [side[f"end.{name}"].astype(np.float64) - side[f"start.{name}"] for side in (one, other)]
        size = max(float(np.linalg.norm(ways[0])), FLOOR * float(np.linalg.norm(one[f"start.{name}"])), _TINY)
        ratios.append(float(np.linalg.norm(ways[1] - ways[0])) / size)
    return _difference(np.array(ratios), lambda index: names[index])


def _relative(one: Arrays, other: Arrays, scale: Callable[[str], np.ndarray]) -> _Difference:
    """Each tensor's differences in units of the largest entry of its scale, all tensors together."""
    sizes = {name: float(np.abs(scale(name)).max(initial=0.0)) for name in one}
    floor = FLOOR * max(sizes.values(), default=0.0) or 1.0
    names, gaps = [], []
    with np.errstate(invalid="ignore"):
        for name in sorted(one):
            gap = other[name].astype(np.float64).ravel() - one[name].astype(np.float64).ravel()
            gaps.append(gap / max(sizes[name], floor))
            names += [name] * len(gap)
    return _difference(np.concatenate(gaps), lambda index: names[index])


def _difference(gaps: np.ndarray, where: Callable[[int], str]) -> _Difference:
    wrong = ~np.isfinite(gaps)
    if wrong.any():
        return _Difference(math.inf, math.inf, f"{where(int(np.argmax(wrong)))}: not finite")
    at = int(np.argmax(np.abs(gaps)))
    return _Difference(float(abs(gaps[at])), float(gaps.mean()), where(at))


def _group(arrays: Arrays, group: str) -> dict[str, np.ndarray]:
    """The tensors of a group by parameter name."""
    start = f"{group}."
    found = {name[len(start) :]: value for name, value in arrays.items() if name.startswith(start)}
    return {name: value for name, value in found.items() if not name.startswith("shared.")}


def _with_shared(one: Arrays, other: Arrays) -> tuple[Arrays, Arrays]:
    """What only one side computes with shared prompts is held against what the other computes without."""

    def completed(arrays: Arrays, than: Arrays) -> Arrays:
        found = dict(arrays)
        for name in than.keys() - arrays.keys():
            plain = name.replace("logps.policy.shared", "logps.policy").replace("gradients.shared.", "gradients.")
            if plain in arrays:
                found[name] = arrays[plain]
        return found

    return completed(one, other), completed(other, one)


def _check_alike(one: Arrays, other: Arrays) -> None:
    shapes = [{name: value.shape for name, value in arrays.items()} for arrays in (one, other)]
    odd = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if odd:
        said = "; ".join(f"{name}: {shapes[0].get(name, 'none')}, {shapes[1].get(name, 'none')}" for name in odd[:3])
        raise RunError(
            f"the two sides cannot be compared, {len(odd)} arrays differ in shape or are on one side only ({said}). "
            "Take the same model, rows and settings on both sides"
        )
