"""Many rows on disk instead of in memory: an Arrow file without a name, read a row at a time.

The file lies in the temporary folder, nameless from the start where the system allows it, and is gone with the last
row that is read from it, however the process ends. A row is one pickle beside the bytes of its arrays; those are
mapped, not copied. One program writes and reads it, and the processes it started: nothing foreign is unpickled.
"""

from __future__ import annotations

import copyreg
import dataclasses
import io
import mmap
import pickle
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Generic, TypeVar, overload

from mlxpref.errors import RunError
from mlxpref.records import Conditioned, Dropped, Message, Scored, Tokenized

T = TypeVar("T")

IN_MEMORY = 8192
"""Rows that are simply a list; more are stored."""

BLOCK = 256
"""Rows of a block: what is written, or sent between processes, at a time."""

RELEASED = 64
"""Rows read until the pages they stood on are given back. They count as memory of this process, and where one is read
the system maps its neighbours, too."""


def _thawed(items: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(items)


def _made_again(record: type[Any]) -> Any:
    """How a record is pickled: as a call with its fields, which is several times faster than what dataclasses do."""
    values = attrgetter(*(entry.name for entry in dataclasses.fields(record)))
    return lambda one: (record, values(one))


class _Pickler(pickle.Pickler):
    """Pickles the records of the spine, read-only mappings included."""

    dispatch_table = copyreg.dispatch_table.copy()
    dispatch_table[MappingProxyType] = lambda view: (_thawed, (dict(view),))
    dispatch_table |= {record: _made_again(record) for record in (Message, Scored, Conditioned, Tokenized, Dropped)}


def dumps(value: Any, buffers: list[pickle.PickleBuffer] | None = None) -> bytes:
    """A pickle of a record; the bytes of its arrays apart, in ``buffers``, where that is given."""
    out = io.BytesIO()
    _Pickler(out, 5, buffer_callback=None if buffers is None else buffers.append).dump(value)
    return out.getvalue()


def pack(rows: Sequence[Any], *, together: bool = True) -> bytes:
    """A block of rows as bytes, for :func:`stored` here or in another process.

    Args:
        together: rows are mostly read one after the other, and are one pickle; else each is one of its own.
    """
    import pyarrow as pa

    heads, arrays, sizes, counts = [], [], [], []
    for value, n in [(list(rows), len(rows))] if together else [(row, -1) for row in rows]:
        buffers: list[pickle.PickleBuffer] = []
        heads.append(dumps(value, buffers))
        raw = [buffer.raw() for buffer in buffers]
        arrays.append(b"".join(raw))
        sizes.append([one.nbytes for one in raw])
        counts.append(n)
    schema, columns = _schema(), (heads, arrays, sizes, counts)
    typed = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.record_batch(typed, schema=schema).serialize().to_pybytes()


def unpack(block: bytes) -> list[Any]:
    """The rows of a block."""
    import pyarrow as pa

    batch = pa.ipc.read_record_batch(pa.py_buffer(block), _schema())
    return _value(batch, 0) if _together(batch) else [_value(batch, at) for at in range(batch.num_rows)]


def _schema() -> Any:
    """A pickle, the bytes of its arrays laid end to end, the size of each; how many rows it holds together, else -1."""
    import pyarrow as pa

    text, sizes = pa.large_binary(), pa.list_(pa.int64())
    return pa.schema([("rows", text), ("arrays", text), ("sizes", sizes), ("count", pa.int64())])


def _together(batch: Any) -> bool:
    return batch.num_rows == 1 and batch.column(3)[0].as_py() >= 0


def _length(batch: Any) -> int:
    return batch.column(3)[0].as_py() if _together(batch) else batch.num_rows


def _value(batch: Any, at: int) -> Any:
    head, arrays, sizes = (batch.column(place) for place in range(3))
    own = sizes[at].as_py()
    if not own:
        return pickle.loads(head[at].as_buffer())
    raw, start, buffers = memoryview(arrays[at].as_buffer()), 0, []
    for size in own:
        buffers.append(raw[start : start + size])
        start += size
    return pickle.loads(head[at].as_buffer(), buffers=buffers)


def gather(rows: Iterable[T], *, in_memory: int | None = None, together: bool = True) -> Sequence[T]:
    """These rows: a list while they are few, stored where they are many.

    Args:
        in_memory: how many are few; ``IN_MEMORY`` by default.
        together: as of :func:`pack`.

    Raises:
        RunError: the temporary folder is full.
    """
    few = IN_MEMORY if in_memory is None else in_memory
    coming = iter(rows)
    first = list(islice(coming, few + 1))
    if len(first) <= few:
        return first
    return stored(pack(block, together=together) for block in blocks(chain(first, coming)))


def blocks(rows: Iterable[T], size: int | None = None) -> Iterator[list[T]]:
    """The rows, ``size`` at a time; by default as many as a block has."""
    coming = iter(rows)
    while block := list(islice(coming, size or BLOCK)):
        yield block


def stored(packed: Iterable[bytes]) -> Stored[Any]:
    """The rows of these blocks, in order, on disk.

    Raises:
        RunError: the temporary folder is full.
    """
    import pyarrow as pa

    schema, ends, done = _schema(), [], 0
    try:
        with tempfile.TemporaryFile(prefix="mlxpref-") as file:
            with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
                for block in packed:
                    batch = pa.ipc.read_record_batch(pa.py_buffer(block), schema)
                    writer.write_batch(batch)
                    done += _length(batch)
                    ends.append(done)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        where = tempfile.gettempdir()
        raise RunError(
            f"rows cannot be kept in {where}: {error.strerror or error}; free some space there, or name another folder "
            "in TMPDIR"
        ) from error
    return Stored(mapped, ends)


class Stored(Sequence[T], Generic[T]):
    """Rows on disk. Made by :func:`stored`; each access gives a new, equal row. Their arrays are read-only."""

    def __init__(self, mapped: mmap.mmap, ends: Sequence[int]) -> None:
        import pyarrow as pa

        self._mapped, self._ends, self._reads = mapped, ends, 0
        self._reader = pa.ipc.open_file(pa.py_buffer(mapped))
        self._batches: dict[int, Any] = {}
        self._last: tuple[int, list[T]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        block = bisect_right(self._ends, at)
        self._release(1)
        return self._read(block, at - (self._ends[block - 1] if block else 0))

    def __iter__(self) -> Iterator[T]:
        for block, (start, end) in enumerate(pairwise([0, *self._ends])):
            batch = self._batch(block)
            if _together(batch):
                yield from _value(batch, 0)
            else:
                yield from (self._read(block, at) for at in range(end - start))
            self._release(end - start)

    def packed(self) -> Iterator[bytes]:
        """The blocks the rows were stored in."""
        for block in range(len(self._ends)):
            batch = self._batch(block)
            yield batch.serialize().to_pybytes()
            self._release(_length(batch))

    def _read(self, block: int, at: int) -> T:
        batch = self._batch(block)
        if not _together(batch):
            return _value(batch, at)
        last = self._last  # another thread may read another block meanwhile
        if last[0] != block:
            last = self._last = block, _value(batch, 0)
        return last[1][at]

    def _batch(self, block: int) -> Any:
        if block not in self._batches:
            self._batches[block] = self._reader.get_batch(block)
        return self._batches[block]

    def _release(self, n: int) -> None:
        """Count rows read; every so often give their pages back, which are read again where they are still in use."""
        self._reads += n
        if self._reads >= RELEASED and hasattr(self._mapped, "madvise"):
            self._mapped.madvise(mmap.MADV_DONTNEED)
            self._reads = 0

    def __reduce__(self) -> Any:
        return list, (list(self),)


def pick(rows: Sequence[T], places: Sequence[int]) -> Sequence[T]:
    """Some rows, by their places: a list of what is a list."""
    return [rows[at] for at in places] if isinstance(rows, list) else Picked(rows, places)


class Picked(Sequence[T], Generic[T]):
    """Some rows of a sequence, by their places; nothing is copied."""

    def __init__(self, rows: Sequence[T], places: Sequence[int]) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Picked(self._rows, self._places[index])
        return self._rows[self._places[index]]


class Joined(Sequence[T], Generic[T]):
    """Several sequences one after the other; nothing is copied."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        for part in self.parts:
            if 0 <= at < len(part):
                return part[at]
            at -= len(part)
        raise IndexError(index)

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self.parts)
