"""The processes of one run: who is who, what they add up, and how one learns that another has gone.

Everything between workers is a sum over all of them, made by the backend. Beside it every worker holds a TCP
connection to worker 0 on which nothing is said until the end: a process that ends closes it, and of a machine that
is gone the system notices within a minute (TCP keep-alive). A sum that waits for a worker that has gone is left
then, whether or not the library below notices.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np

from mlxpref.errors import RunError

LOOK_SECONDS = 0.5
"""How often a worker that waits for the others looks whether they are all there."""

GRACE_SECONDS = 5.0
"""How long the library below has to say by itself that a worker has gone."""

CONNECT_SECONDS = 30.0

_PIECE = 1 << 22
"""Bytes given to the others at a time."""

_KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
"""Seconds and counts, under the names that Linux and macOS have: after a minute without an answer it is over."""


class WorkerLost(RunError):
    """Another worker of the run ended, or cannot be reached any more."""


class WorkerEnded(RunError):
    """This worker ends with an error that worker 0 says for all."""


def launched_rank() -> int:
    """This process's number as its launcher gave it, before any group is formed; 0 without a launcher."""
    names = ("MLX_RANK", "RANK", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


class Workers:
    """The processes of a run as one of them sees them; of this class: a run of a single process.

    Attributes:
        rank: this worker's number; worker 0 owns the run folder and speaks.
        size: how many there are.
        n_sums: sums over all workers made so far.
        wants_stop: a signal asked this process to stop. Carried to the others by the next sum of a step.
        stopping: what all have agreed on: stop after this step.
        said: what people should know of the group, in words.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.n_sums = 0
        self.wants_stop = False
        self.said: list[str] = []
        self._agreed = False

    @property
    def stopping(self) -> bool:
        return self._agreed or (self.size == 1 and self.wants_stop)

    @stopping.setter
    def stopping(self, value: bool) -> None:
        self._agreed = value

    def sum(self, values: Any) -> Any:
        """A float32 array (n,) of the backend's, added up over all workers.

        Raises:
            WorkerLost: one has gone.
        """
        return values

    def sum_numpy(self, values: np.ndarray) -> np.ndarray:
        """The same of a NumPy float32 array (n,)."""
        return values

    def share(self, content: bytes = b"") -> bytes:
        """Worker 0's bytes, to all; no common disk is needed."""
        if self.size == 1:
            return content
        own = content if self.rank == 0 else b""
        high, low = self.sum_numpy(np.array(divmod(len(own), _PIECE), np.float32)).astype(int).tolist()
        n_bytes, pieces = high * _PIECE + low, []
        for start in range(0, n_bytes, _PIECE):
            piece = np.zeros(min(_PIECE, n_bytes - start), np.float32)
            if self.rank == 0:
                piece[:] = np.frombuffer(own[start : start + len(piece)], np.uint8)
            pieces.append(self.sum_numpy(piece).astype(np.uint8).tobytes())
        return b"".join(pieces)

    def check_alike(self, facts: Mapping[str, str], headline: str) -> None:
        """RunError on every worker, naming what differs and where, unless all have worker 0's facts."""
        if self.size == 1:
            return
        first = {"set of settings": "", **json.loads(self.share(json.dumps(dict(facts)).encode()))}
        facts = {"set of settings": " ".join(facts.keys() - first.keys()), **facts}  # empty, if worker 0 has all
        table = np.zeros((self.size, len(first)), np.float32)
        table[self.rank] = [facts.get(name) != value for name, value in first.items()]
        table = self.sum_numpy(table.ravel()).reshape(table.shape)
        if table.any():
            names = list(first)
            lines = [
                f"  worker {rank}: another {', another '.join(names[i] for i in np.flatnonzero(row))} than worker 0"
                for rank, row in enumerate(table)
                if row.any()
            ]
            raise RunError(headline + "\n" + "\n".join(lines))

    def watching(self) -> AbstractContextManager[None]:
        """A context in which a library's error over a worker that has gone becomes WorkerLost."""
        return nullcontext()

    def finish(self) -> None:
        """Wait until worker 0 has written and said everything: a launcher ends all when one has ended."""

    def tell(self, why: str) -> bool:
        """Let the others know why this worker ends; True if worker 0 says it, or has said more itself."""
        return False

    def unless_stuck(self, settings: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """A library's settings, restored at the end of the block if it still listens."""
        return settings


_formed: dict[Callable[[Mapping[str, str]], Workers], Workers] = {}


def formed(form: Callable[[Mapping[str, str]], Workers]) -> Workers:
    """The group that ``form`` makes of the environment: made once in a process, with no wish to stop."""
    if form not in _formed:
        _formed[form] = form(os.environ)
    group = _formed[form]
    group.wants_stop = group.stopping = False
    return group


class Group(Workers, ABC):
    """Several processes. A backend says how sums are made: ``_all_sum``, ``_given`` and ``_numpy``.

    Sums are made in a thread of their own, so that a signal is heard and a worker's end noticed while they wait.
    """

    def __init__(self, rank: int, size: int, address: str) -> None:
        """Meet the others; every process of the group must come here.

        Args:
            address: where the others reach worker 0; only its own counts.
        """
        super().__init__()
        self.rank, self.size = rank, size
        self._watch: Watch | None = None
        self._waits = False
        self._exit_code = 1
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], list[Any], threading.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="mlxpref sums", daemon=True).start()
        atexit.register(self._leave)
        self._meet(address)

    # --- sums ---

    @abstractmethod
    def _all_sum(self, values: Any) -> Any:
        """(n,) of the backend's, complete when it returns; RuntimeError when a worker has gone."""

    @abstractmethod
    def _given(self, values: np.ndarray) -> Any:
        """A NumPy array as the backend's."""

    @abstractmethod
    def _numpy(self, values: Any) -> np.ndarray:
        """The backend's array as NumPy's."""

    def sum(self, values: Any) -> Any:
        self.n_sums += 1
        return self._watched(lambda: self._all_sum(values))

    def sum_numpy(self, values: np.ndarray) -> np.ndarray:
        return self._numpy(self.sum(self._given(np.ascontiguousarray(values, np.float32))))

    def _work(self) -> None:
        while True:
            call, box, done = self._jobs.get()
            try:
                box.append((call(), None))
            except BaseException as error:  # the thread that waits raises it
                box.append((None, error))
            done.set()

    def _watched(self, call: Callable[[], Any]) -> Any:
        """What a call gives that waits for the others, unless one of them goes meanwhile."""
        if self._waits:
            raise self.lost("a sum was left before")
        box: list[Any] = []
        done = threading.Event()
        self._waits = True
        self._jobs.put((call, box, done))
        try:
            while not done.wait(LOOK_SECONDS):
                if self._watch is not None and self._watch.lost and not done.wait(GRACE_SECONDS):
                    raise self.lost()
        except KeyboardInterrupt:
            self._exit_code = 130
            raise
        self._waits = False
        found, error = box[0]
        if error is None:
            return found
        if not isinstance(error, RuntimeError) or _is_own(error):
            raise error
        raise self.lost(str(error)) from error

    @contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if _is_own(error) or self._watch is None or not self._watch.ended.wait(GRACE_SECONDS):
                raise
            raise self.lost(str(error)) from error

    def lost(self, error: str = "") -> WorkerLost:
        """What to raise where a worker has gone; ``error`` is what the library below says of it."""
        if self._watch is not None and self._watch.ended.wait(GRACE_SECONDS):
            rank, why = next(iter(self._watch.lost.items()))
            return WorkerLost(f"worker {rank} (of 0 to {self.size - 1}) was lost: {why}")
        return WorkerLost(f"a worker other than {self.rank} (of 0 to {self.size - 1}) was lost: {error}")

    # --- beginning and end ---

    def _meet(self, address: str) -> None:
        watch = Watch(self.rank, self.size)
        place = watch.open(address) if self.rank == 0 else {}
        watch.join(json.loads(self.share(json.dumps(place).encode())))
        missing = int(self.sum_numpy(np.array([not watch.whole], np.float32))[0])
        if not missing:
            self._watch = watch
            return
        watch.close()
        self.said.append(
            f"warning: no connection to worker 0 at {address} beside the backend's own: a worker whose machine "
            "vanishes without a word is not noticed then; open the firewall between the machines"
        )

    def finish(self) -> None:
        _ignore_launcher()
        try:
            self.sum_numpy(np.zeros(1, np.float32))
        except WorkerLost:
            if self.rank > 0:
                raise

    def tell(self, why: str) -> bool:
        _ignore_launcher()
        if self._watch is None:
            return False
        told = self._watch.tell(why)
        return self.rank > 0 and (told or 0 in self._watch.told)

    @contextmanager
    def unless_stuck(self, settings: AbstractContextManager[None]) -> Iterator[None]:
        """The same, but after a sum that was left settings stay: MLX waits for that sum before it changes a limit."""
        self._settings = settings  # held, or the end of their block would come with the last reference
        settings.__enter__()
        try:
            yield
        finally:
            if not self._waits:
                settings.__exit__(None, None, None)

    def _leave(self) -> None:
        """A thread that waits for a worker that is gone would keep the process for ever."""
        if self._waits:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._exit_code)


class Watch:
    """The connections between worker 0 and each other one.

    Attributes:
        lost: workers that ended, with the reason in words, in the order of their end.
        told: those of them that said the reason themselves.
        ended: set as soon as there is one.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.lost: dict[int, str] = {}
        self.told: set[int] = set()
        self.ended = threading.Event()
        self._sockets: dict[int, socket.socket] = {}
        self._door: socket.socket | None = None
        self._word = ""

    @property
    def whole(self) -> bool:
        return len(self._sockets) == (self.size - 1 if self.rank == 0 else 1)

    def open(self, address: str) -> dict[str, Any]:
        """Worker 0: listen at an address; where, and the word by which the others are known."""
        self._word = secrets.token_hex(16)
        for host in (address, ""):
            with suppress(OSError):
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._door = socket.create_server((host, 0), family=family, backlog=self.size)
                return {"host": address, "port": self._door.getsockname()[1], "word": self._word}
        return {}

    def join(self, place: Mapping[str, Any]) -> None:
        """Connect to worker 0, or there wait for the others; :attr:`whole` says whether it worked."""
        with suppress(OSError, ValueError):
            if self.rank == 0:
                self._accept()
            elif place:
                made = socket.create_connection((place["host"], place["port"]), timeout=CONNECT_SECONDS)
                made.sendall(f"{place['word']} {self.rank:<8}".encode())
                self._sockets[0] = made
        for peer, made in self._sockets.items():
            _keep_alive(made)
            threading.Thread(target=self._listen, args=(peer, made), name="mlxpref watch", daemon=True).start()

    def _accept(self) -> None:
        if self._door is None:
            return
        with self._door as door:
            door.settimeout(CONNECT_SECONDS)
            while not self.whole:
                made, _ = door.accept()
                made.settimeout(CONNECT_SECONDS)
                word, _, rank = _read(made, len(self._word) + 9).decode("ascii", "replace").partition(" ")
                if secrets.compare_digest(word, self._word):
                    self._sockets[int(rank)] = made
                else:
                    made.close()

    def _listen(self, peer: int, made: socket.socket) -> None:
        text, why = b"", "its process ended"
        try:
            while piece := made.recv(4096):
                text += piece
        except ConnectionError:
            pass
        except OSError as error:
            why = f"its machine does not answer any more ({error.strerror or error})"
        if text:
            why = text.decode(errors="replace")
            self.told.add(peer)
        self.lost[peer] = why
        self.ended.set()

    def tell(self, why: str) -> bool:
        """Say why this worker ends to those it is connected to; False if one does not hear it."""
        heard = True
        for peer, made in self._sockets.items():
            try:
                if peer in self.lost:
                    raise ConnectionError
                made.sendall(why.encode())
                made.shutdown(socket.SHUT_WR)
            except OSError:
                heard = False
        return heard

    def close(self) -> None:
        for made in self._sockets.values():
            made.close()


def _ignore_launcher() -> None:
    """A launcher ends all workers (SIGTERM) when one has ended; this one is ending by itself, and has something to say
    or an exit code of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_own(error: RuntimeError) -> bool:
    """Whether an error is this worker's own, whatever the others do."""
    return isinstance(error, (NotImplementedError, RecursionError)) or "out of memory" in str(error).lower()


def _read(made: socket.socket, n_bytes: int) -> bytes:
    """So many bytes, or those that came before the end or a pause."""
    found = b""
    with suppress(OSError):
        while len(found) < n_bytes and (piece := made.recv(n_bytes - len(found))):
            found += piece
    return found


def _keep_alive(made: socket.socket) -> None:
    made.settimeout(None)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
