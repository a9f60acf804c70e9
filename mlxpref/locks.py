"""One process at a time in a folder; a killed process lets go by itself."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxpref.errors import RunError

NAME = ".lock"


@contextmanager
def locked(folder: Path, *, what: str) -> Iterator[None]:
    """Hold ``folder`` (made if missing) until the end of the block.

    The lock is the kernel's, on an open file: it ends with the process however that ends. A folder
    that was made here and is still empty at the end goes again.

    Raises:
        RunError: another process holds it (``what`` says so), or the folder cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(folder / NAME)
    except BlockingIOError:
        raise RunError(what) from None
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with suppress(OSError):  # something lies in it: it stays
                folder.rmdir()


def _take(file: Path) -> int:
    """An open, locked file descriptor. BlockingIOError if another process has it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still_there(file, descriptor):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
                raise BlockingIOError(error.errno, "locked") from None
            raise
        os.close(descriptor)  # the holder removed the file between our opening and locking it


def _still_there(file: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False
