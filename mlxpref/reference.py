"""Reference log-probs: computed once, kept on disk, found again by what they depend on.

A reference log-prob depends on the reference's weights and on the token ids before it, nothing else.
So a store is a folder named by the policy's fingerprint (weights and starting adapter), and in it a
response is found by a hash of its prompt's and its own token ids. Another tokenizer, template, goal or
text gives other ids, and only what differs is computed again.

A store holds *shards* that never change once they have their name, which is a hash of their bytes:
a shard that does not match its name is damaged. Several processes may read and write one store.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.batching import collate
from mlxpref.data.parts import PlannedPart
from mlxpref.data.plan import plan_pass
from mlxpref.data.sizes import sizes_of
from mlxpref.data.words import counted
from mlxpref.errors import RunError
from mlxpref.files import written_aside
from mlxpref.records import Tokenized
from mlxpref.workers import Workers

FLUSH_SECONDS = 30.0
"""Log-probs wait in memory at most this long before they are on disk."""

FLUSH_VALUES = 1 << 20
"""… and at most this many of them (4 MiB)."""

_MAGIC = b"mlxpref-logps-1\n"
_KEY = 32  # bytes of a sha256


def response_key(prompt_ids: np.ndarray, response_ids: np.ndarray) -> bytes:
    """32 bytes that name a response behind its prompt; the place of the boundary counts."""
    digest = hashlib.sha256(struct.pack("<q", len(prompt_ids)))
    for ids in (prompt_ids, response_ids):
        digest.update(np.asarray(ids, "<i4").tobytes())
    return digest.digest()


def row_keys(row: Tokenized) -> tuple[bytes, ...]:
    """The keys of all that is scored in a row: S slots, a lead belongs to what comes before."""
    return tuple(
        response_key(np.concatenate([row.prompt_ids, lead]) if len(lead) else row.prompt_ids, ids)
        for lead, ids in row.slots
    )


def default_store_folder() -> Path:
    """``$MLXPREF_CACHE/reference``, or ``mlxpref/reference`` in the platform's cache folder."""
    given = os.environ.get("MLXPREF_CACHE")
    if given:
        return Path(given).expanduser() / "reference"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxpref" / "reference"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxpref" / "reference"


class ReferenceStore:
    """Token log-probs on disk by (prompt ids, response ids), of one reference.

    Attributes:
        folder: of this reference's shards: the given folder and the fingerprint within.
        said: what was noticed while opening: damaged shards, in words. Those are removed, and their
            rows, missing now, are computed and written again.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open (or begin) the store of the reference called ``fingerprint`` in ``folder``."""
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fingerprint)
        name = fingerprint if plain else hashlib.sha256(fingerprint.encode()).hexdigest()
        self.folder = Path(folder).expanduser() / name
        self.said: tuple[str, ...] = ()
        self._known: dict[bytes, np.ndarray] = {}
        self._unwritten: dict[bytes, np.ndarray] = {}
        for file in sorted(self.folder.glob("*.shard")):
            self._open_shard(file)

    def __len__(self) -> int:
        """Responses known."""
        return len(self._known)

    def get(self, row: Tokenized) -> list[np.ndarray] | None:
        """S arrays (n_s,) float32 in nats, or None unless all S slots are known."""
        found = [self._known.get(key) for key in row_keys(row)]
        return None if any(logps is None for logps in found) else [x for x in found if x is not None]

    def put(self, row: Tokenized, logps: Sequence[np.ndarray]) -> None:
        """Remember S arrays (n_s,) of log-probs of a row; ``flush`` brings them to disk.

        Raises:
            ValueError: lengths differ from the row's responses and texts.
        """
        lengths = [len(ids) for _, ids in row.slots]
        if [len(values) for values in logps] != lengths:
            raise ValueError(f"log-probs of {[len(v) for v in logps]} tokens for responses of {lengths}")
        for key, values in zip(row_keys(row), logps, strict=True):
            if key not in self._known:
                self._known[key] = self._unwritten[key] = np.array(values, np.float32)

    @property
    def n_unwritten(self) -> int:
        """Log-probs that are not on disk yet."""
        return sum(map(len, self._unwritten.values()))

    def flush(self) -> None:
        """Write what is not on disk yet as one new shard. RunError when the disk refuses."""
        if not self._unwritten:
            return
        content = _pack(self._unwritten)
        with written_aside(self.folder / f"{_checksum(content)}.shard") as aside:
            aside.write_bytes(content)
        self._unwritten = {}

    def _open_shard(self, file: Path) -> None:
        try:
            # Mapped and not read: a store may be larger than memory has room for.
            content = np.memmap(file, np.uint8, mode="r")
            entries = list(_unpack(content)) if _checksum(content) == file.stem else None
        except (OSError, ValueError):  # an empty file cannot be mapped
            entries = None
        if entries is None:
            self._discard(file)
        else:
            self._known.update(entries)

    def _discard(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
            what = "was removed; its log-probs are computed again"
        except OSError as error:
            what = f"is ignored ({error.strerror}); its log-probs are computed again"
        self.said += (f"reference store: {file} is damaged and {what}",)


def _checksum(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.data).hexdigest()[:32]


def _pack(entries: dict[bytes, np.ndarray]) -> bytes:
    """A shard: magic, count (int64), keys (32 bytes each), lengths (int32), values (float32)."""
    lengths = np.array([len(values) for values in entries.values()], "<i4")
    values = np.concatenate(list(entries.values())).astype("<f4")
    return b"".join((_MAGIC, struct.pack("<q", len(entries)), *entries, lengths.tobytes(), values.tobytes()))


def _unpack(content: np.ndarray) -> Iterator[tuple[bytes, np.ndarray]]:
    """Keys and views into the shard's values. ValueError if this is no shard of ours."""
    start = len(_MAGIC) + 8
    if content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise ValueError("not a shard of reference log-probs, or of another version")
    (count,) = struct.unpack("<q", content[len(_MAGIC) : start].tobytes())
    keys = content[start : start + count * _KEY].tobytes()
    start += count * _KEY
    lengths = content[start : start + 4 * count].view("<i4")
    values = content[start + 4 * count :].view("<f4")
    ends = np.cumsum(lengths)
    for index, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        yield keys[index * _KEY : (index + 1) * _KEY], values[end - length : end]


@dataclass(frozen=True, slots=True)
class ReferenceCounts:
    """Different rows whose reference log-probs were computed now, and that were known before."""

    computed: int = 0
    reused: int = 0

    def __str__(self) -> str:
        return f"reference log-probs: {counted(self.computed, 'row')} computed, {self.reused} reused"


Progress = Callable[[int, int], None]
"""Called with (rows done, rows to do) after each micro-batch."""


PARTS_PER_SUM = 16
"""Micro-batches that each of several workers computes between two sums of a pass."""

ROWS_PER_SUM = 4096
"""Rows of known log-probs that worker 0 gives to the others at a time."""

PASS_SHAPES = 32
"""Shapes of one pass over the data."""


def kinds_of(rows: Sequence[Tokenized]) -> int:
    """How many different numbers of slots occur; a plan needs a shape for each."""
    return len(set(sizes_of(rows).responses.tolist()))


def logps_pass(
    rows: Sequence[Tokenized],
    backend: Any,
    policy: Any,
    *,
    reference: bool,
    micro_batch_tokens: int = 8192,
    max_shapes: int = PASS_SHAPES,
    on_progress: Progress | None = None,
    workers: Workers | None = None,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """One forward pass over rows: yields (row, its S arrays (n_s,) float32, nats), in order of length.

    Args:
        rows: any S, also mixed.
        backend: module with ``token_logps``.
        reference: log-probs of the reference instead of the policy.
        micro_batch_tokens: padded tokens of one micro-batch.
        max_shapes: different shapes of micro-batches, each traced once.
        workers: who share out the pass; each yields all rows. All must ask for the same.

    Raises:
        RunError: a log-prob is not finite.
    """
    if not rows:
        return
    # Through weights that are shared out all workers go together: each computes everything then.
    group = Workers() if workers is None or policy.sharded else workers
    plan = plan_pass(
        rows,
        micro_batch_tokens=micro_batch_tokens,
        share_prompts=policy.share_prompts,
        max_shapes=max(max_shapes, kinds_of(rows)),
    )
    parts, done = [part for step in plan.steps for part in step], 0
    at_a_time = 1 if group.size == 1 else PARTS_PER_SUM * group.size
    for some in (parts[start : start + at_a_time] for start in range(0, len(parts), at_a_time)):
        found: dict[int, list[np.ndarray]] = {}
        for part in some[group.rank :: group.size]:  # neighbours in length: every worker has as much to do
            tokens = np.asarray(backend.token_logps(policy, collate(rows, part), reference=reference).tokens)
            found |= {index: _cut(of_row, rows[index]) for index, of_row in zip(part.rows, tokens, strict=True)}
        asked = _rows_of(some)
        for index, logps in _exchanged(rows, asked, found, group):
            _check_finite(rows[index], logps, "reference" if reference else "policy")
            yield index, logps
        done += len(asked)
        if on_progress is not None:
            on_progress(done, len(rows))


def _rows_of(parts: Sequence[PlannedPart]) -> list[int]:
    return [index for part in parts for index in part.rows]


def _cut(of_row: np.ndarray, row: Tokenized) -> list[np.ndarray]:
    """S arrays (n_s,) of a row's (S, L)."""
    return [np.array(values[: len(ids)], np.float32) for values, (_, ids) in zip(of_row, row.slots, strict=True)]


def _exchanged(
    rows: Sequence[Tokenized], asked: Sequence[int], found: Mapping[int, Sequence[np.ndarray]], workers: Workers
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(row, its S arrays) of every row asked for, whichever worker found it."""
    if workers.size == 1:
        yield from ((index, list(found[index])) for index in asked)
        return
    lengths = [len(ids) for index in asked for _, ids in rows[index].slots]
    own = [
        values
        for index in asked
        for values in found.get(index) or [np.zeros(len(ids), np.float32) for _, ids in rows[index].slots]
    ]
    together = workers.sum_numpy(np.concatenate(own))
    pieces = iter(np.split(together, np.cumsum(lengths)[:-1]))
    for index in asked:
        yield index, [next(pieces) for _ in rows[index].slots]


def _check_finite(row: Tokenized, logps: Sequence[np.ndarray], whose: str) -> None:
    if not all(np.isfinite(values).all() for values in logps):
        raise RunError(
            f"the {whose}'s log-probs of example {row.example_id} are not finite. The weights may be "
            "damaged, or overflow in float16: load the model with dtype float32 or bfloat16."
        )


def policy_logps(
    rows: Sequence[Tokenized],
    backend: Any,
    policy: Any,
    *,
    micro_batch_tokens: int = 8192,
    max_shapes: int = PASS_SHAPES,
    on_progress: Progress | None = None,
) -> list[list[np.ndarray]]:
    """For each row S arrays (n_s,) float32 of the policy's own log-probs, nats; nothing is kept.

    A row that occurs twice is computed once. RunError if a log-prob is not finite.
    """
    keys = [row_keys(row) for row in rows]
    distinct = dict(zip(keys, rows, strict=True))
    names, todo = list(distinct), list(distinct.values())
    computing = logps_pass(
        todo, backend, policy,
        reference=False, micro_batch_tokens=micro_batch_tokens, max_shapes=max_shapes, on_progress=on_progress,
    )  # fmt: skip
    found = {names[index]: logps for index, logps in computing}
    return [found[key] for key in keys]


Keys = tuple[bytes, ...]


def _known(
    distinct: Mapping[Keys, Tokenized], store: ReferenceStore | None, workers: Workers
) -> dict[Keys, list[np.ndarray]]:
    """What worker 0's store has, on every worker."""
    own = {} if store is None else {key: store.get(row) for key, row in distinct.items()}
    found = {key: logps for key, logps in own.items() if logps is not None}
    if workers.size == 1 or not distinct:
        return found
    has = workers.sum_numpy(np.array([key in found for key in distinct], np.float32)) > 0
    keys, rows = list(distinct), list(distinct.values())
    asked = np.flatnonzero(has).tolist()
    given: dict[Keys, list[np.ndarray]] = {}
    for start in range(0, len(asked), ROWS_PER_SUM):
        some = asked[start : start + ROWS_PER_SUM]
        mine = {index: found[keys[index]] for index in some if keys[index] in found}
        given |= {keys[index]: logps for index, logps in _exchanged(rows, some, mine, workers)}
    return given


def reference_logps(
    rows: Sequence[Tokenized],
    backend: Any,
    policy: Any,
    store: ReferenceStore | None,
    *,
    micro_batch_tokens: int = 8192,
    max_shapes: int = PASS_SHAPES,
    on_progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
    workers: Workers | None = None,
) -> tuple[list[list[np.ndarray]], ReferenceCounts]:
    """Reference log-probs of every row, from the store where it has them.

    What is computed is written at least every ``FLUSH_SECONDS`` and when anything interrupts, so that
    a later call goes on from there.

    Args:
        rows: a row that occurs twice is computed once.
        store: None computes everything and keeps nothing.
        max_shapes: different shapes of micro-batches, each traced once.
        on_progress: called with (rows computed, rows to compute).
        workers: who share out what is missing in worker 0's store; the others have none. All must ask for the same.

    Returns:
        for each row S arrays (n_s,) float32 in nats, and what was computed and reused.

    Raises:
        RunError: a log-prob is not finite, or the store cannot be written.
    """
    keys = [row_keys(row) for row in rows]
    distinct = dict(zip(keys, rows, strict=True))
    found = _known(distinct, store, Workers() if workers is None else workers)
    missing = {key: row for key, row in distinct.items() if key not in found}
    names, todo = list(missing), list(missing.values())
    computing = logps_pass(
        todo, backend, policy,
        reference=True, micro_batch_tokens=micro_batch_tokens, max_shapes=max_shapes, on_progress=on_progress,
        workers=workers,
    )  # fmt: skip
    written = clock()
    try:
        for index, logps in computing:
            found[names[index]] = logps
            if store is None:
                continue
            store.put(todo[index], logps)
            if store.n_unwritten >= FLUSH_VALUES or clock() - written > FLUSH_SECONDS:
                store.flush()
                written = clock()
    finally:
        if store is not None:
            store.flush()
    return [found[key] for key in keys], ReferenceCounts(len(todo), len(found) - len(todo))
