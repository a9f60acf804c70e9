"""Hidden rows behind the frozen layers: the same in every epoch, so computed once and kept on disk.

Layers below the lowest adapted one never change, and what they make of a token depends on the tokens before it alone,
not on how a micro-batch is laid out. An example's rows are computed when it is first met and laid out again, in
whatever shape, ever after; the adapted layers start from them.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxpref.errors import ConfigError, RunError
from mlxpref.mlx_backend import prefix, probe
from mlxpref.mlx_backend.arrays import to_mlx
from mlxpref.mlx_backend.layers import caught
from mlxpref.records import Hidden, MicroBatch

if TYPE_CHECKING:
    from mlxpref.mlx_backend.logps import Network
    from mlxpref.mlx_backend.policy import Policy

def frozen_rows(network: Network, micro_batch: MicroBatch) -> list[mx.array]:
    """What the layers below ``network.first_adapted`` make of a micro-batch's tokens: (B, P, D) of the prompts where
    P is not 0, and of each shelf (B, T, D)."""
    found: list[mx.array] = []

    def read(inputs: mx.array, cache: list[Any] | None) -> None:
        with caught(network.body, network.first_adapted) as catch:
            network.hidden(inputs, cache)
        assert catch.caught is not None
        found.append(catch.caught)

    offset, recorded = micro_batch.prompts.shape[1], None
    if offset:
        recorded = prefix.recording(network.model)
        read(micro_batch.prompts, recorded)
    for shelf in micro_batch.shelves:
        read(shelf.inputs, None if recorded is None else prefix.serving(recorded, shelf.prompt, offset))
    return found


class _Row(NamedTuple):
    """Where a row of a micro-batch stands: shelf, row of the shelf; and its tokens without padding."""

    shelf: int
    row: int
    length: int


class _Kept(NamedTuple):
    """Rows of one example in the file: the byte they begin at, tokens of the prompt before its rows, of each row."""

    start: int
    shared: int
    lengths: tuple[int, ...]


class FrozenRows:
    """The rows of a run's examples, in a nameless file that ends with the process.

    Args:
        policy: with at least one frozen layer below its adapted ones.
        n_positions: of token positions at most that will be kept; the temporary folder must have room for them.

    Raises:
        ConfigError: no layer is frozen, the model's layers cannot be entered in their middle, or no room.
    """

    def __init__(self, policy: Policy, n_positions: int):
        network = policy.network
        if not network.first_adapted:
            why = f"{', '.join(network.outer[:3])} would train" if network.outer else "every layer trains"
            raise ConfigError(f"training.cache_frozen: {why}, no layer's work is the same in every epoch; leave it out")
        self._policy = policy
        self._file = tempfile.TemporaryFile(prefix="mlxpref-")  # noqa: SIM115 - as long as the run
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._kept: dict[int, _Kept] = {}
        self._dtype: Any = None
        self._width = 0
        self._rows = mx.compile(self._rows_of)
        self._probe()
        self._check_room(n_positions)

    def _probe(self) -> None:
        """A few rows kept in one layout and read in another: the same log-probs and gradients as of their tokens."""
        met = -1  # of no example of the data

        def filled(first: MicroBatch, second: MicroBatch) -> MicroBatch:
            rows = range(met, met - len(first.weights), -1)
            self._keep(first, rows)
            return second._replace(hidden=self.hidden(second, rows))

        found, tolerance = probe.examine_filled(self._policy, filled)
        if not found.exact(tolerance):
            raise ConfigError(
                f"training.cache_frozen: {self._policy.path}: this architecture's layers cannot be left out "
                f"({found.reason or f'log-probs differ by {found.logps:.1e} nats'}); train it without"
            )
        self._kept, self._end = {}, 0

    def _check_room(self, n_positions: int) -> None:
        wanted, folder = n_positions * self._width * self._dtype.size, tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise ConfigError(
                f"training.cache_frozen: {n_positions:,} token positions take up to {wanted / 1e9:.1f} GB, and the "
                f"temporary folder {folder} has {free / 1e9:.1f} GB; set TMPDIR to a larger one, or leave it out"
            )

    def _rows_of(self, batch: MicroBatch) -> list[mx.array]:
        network = self._policy.network
        self._policy.n_traced += 1
        with network.kernels(differentiate=False):
            return frozen_rows(network, batch)

    def hidden(self, part: MicroBatch, rows: Sequence[int]) -> Hidden:
        """What the frozen layers make of a micro-batch, computed where an example of it is met for the first time.

        Args:
            part: NumPy arrays.
            rows: (B,) which examples of the data it holds.

        Raises:
            RunError: the temporary folder is full.
        """
        if any(row not in self._kept for row in rows):
            self._keep(part, rows)
        return self._laid_out(part, rows)

    def _keep(self, part: MicroBatch, rows: Sequence[int]) -> None:
        made, places = self._rows(to_mlx(part)), _places(part)
        mx.eval(made)
        self._dtype, self._width = made[0].dtype, made[0].shape[-1]
        arrays = [_as_numpy(one) for one in made]
        offset = part.prompts.shape[1]
        prompts = arrays.pop(0) if offset else np.zeros((len(rows), 0, self._width), arrays[0].dtype)
        for b, row in enumerate(rows):
            if row in self._kept:
                continue
            own = [arrays[at.shelf][at.row, : at.length] for at in places[b]]
            self._write(np.concatenate([prompts[b], *own]).tobytes())
            kept = _Kept(self._end, offset, tuple(at.length for at in places[b]))
            self._kept[row] = kept
            self._end += (offset + sum(kept.lengths)) * self._width * self._dtype.size

    def _write(self, data: bytes) -> None:
        try:
            if os.pwrite(self._file.fileno(), data, self._end) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(
                f"training.cache_frozen: the temporary folder {tempfile.gettempdir()} takes no more than "
                f"{self._end / 1e9:.1f} GB ({error.strerror}); set TMPDIR to a larger one, or leave the cache out"
            ) from error

    def _read(self, kept: _Kept) -> tuple[np.ndarray, list[np.ndarray]]:
        """The shared part of the prompt (P, D) and each row (n, D) of an example."""
        n = kept.shared + sum(kept.lengths)
        data = os.pread(self._file.fileno(), n * self._width * self._dtype.size, kept.start)
        whole = np.frombuffer(data, _NUMPY[self._dtype.size]).reshape(n, self._width)
        shared, *rows = np.split(whole, np.cumsum([kept.shared, *kept.lengths])[:-1])
        return shared, rows

    def _laid_out(self, part: MicroBatch, rows: Sequence[int]) -> Hidden:
        places = _places(part)
        kind, offset = _NUMPY[self._dtype.size], part.prompts.shape[1]
        prompts = np.zeros((*part.prompts.shape, self._width), kind)
        shelves = [np.zeros((*shelf.inputs.shape, self._width), kind) for shelf in part.shelves]
        for b, row in enumerate(rows):
            shared, own = self._read(self._kept[row])
            behind = len(shared) - offset  # of the prompt: in front of the rows now, or at their beginning
            prompts[b] = shared[:offset] if behind >= 0 else np.concatenate([shared, own[0][:-behind]])
            for at, tokens in zip(places[b], own, strict=True):
                tokens = np.concatenate([shared[offset:], tokens]) if behind >= 0 else tokens[-behind:]
                shelves[at.shelf][at.row, : at.length] = tokens
        return Hidden(self._as_mlx(prompts) if offset else None, tuple(map(self._as_mlx, shelves)))

    def _as_mlx(self, array: np.ndarray) -> mx.array:
        return mx.view(mx.array(array), self._dtype)


_NUMPY = {2: np.uint16, 4: np.float32}
"""What a file's numbers are read as, by bytes: NumPy has no bfloat16, so halves travel as bits."""


def _as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array if array.dtype.size == 4 else mx.view(array, mx.uint16))


def _places(part: MicroBatch) -> list[list[_Row]]:
    """For each example, each slot's row."""
    widths = np.array([shelf.inputs.shape[1] for shelf in part.shelves])
    starts = np.cumsum([0, *(shelf.inputs.size for shelf in part.shelves)])
    first, n_scored = part.scored[part.place[..., 0]], (part.place < len(part.scored)).sum(-1)
    shelf = np.searchsorted(starts, first, side="right") - 1
    row, before = np.divmod(first - starts[shelf], widths[shelf])
    found = np.stack([shelf, row, before + n_scored], axis=-1).tolist()
    return [[_Row(*at) for at in of_example] for of_example in found]
