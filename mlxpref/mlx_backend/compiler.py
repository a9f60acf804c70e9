"""Whether MLX can compile kernels for the CPU, found out once; where it cannot, it is told not to.

On a CPU ``mx.compile`` writes fused operations as C++, has ``g++`` make a library of them and keeps it in
the temporary folder. Seen with MLX 0.32.4: where ``g++ --version`` does not answer, MLX goes on operation
by operation and says nothing; where it answers but cannot build, or the folder is another user's, missing,
or lets no program run, the first compiled function of a run fails. A small function finds that out before.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

LOOK = "g++ --version"
"""What MLX itself asks the shell before it compiles anything."""

REMEDY = "install a C++ compiler (Debian, Ubuntu: apt install g++)"
REMEDY_FOLDER = "set TMPDIR to a folder of your own in which programs may run"


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """How compiled functions run on the CPU.

    Attributes:
        compiled: as fused kernels; else operation by operation, with the same results but for the last bits.
        said: one line for people.
        remedy: what to do about it, or None when nothing is amiss.
    """

    compiled: bool
    said: str
    remedy: str | None = None


_record: KernelRecord | None = None


def prepare() -> KernelRecord | None:
    """Switch compilation off where it would fail; the same answer ever after. None on a GPU, which needs no
    C++ compiler."""
    global _record
    if mx.default_device() != mx.Device(mx.cpu):
        return None
    if _record is None:
        _record = _find_out()
        if not _record.compiled:
            mx.disable_compile()
    return _record


def _find_out() -> KernelRecord:
    if "MLX_DISABLE_COMPILE" in os.environ:
        return KernelRecord(False, "not compiled (MLX_DISABLE_COMPILE is set)")
    if subprocess.run(LOOK, shell=True, capture_output=True, check=False).returncode != 0:
        return KernelRecord(False, "not compiled, slower: there is no g++ on the path", REMEDY)
    try:
        _try()
    except RuntimeError as error:
        why = _reason(str(error))
        return KernelRecord(False, f"not compiled, slower: {why}", f"{REMEDY}, or {REMEDY_FOLDER}")
    folder = kernel_folder()
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):  # the trial's kernel was there already
        return KernelRecord(False, f"not compiled, slower: {folder} is not writable", REMEDY_FOLDER)
    return KernelRecord(True, f"compiled by g++ (kept in {folder})")


def _try() -> None:
    """Compile two operations: under a second the first time, then milliseconds."""
    mx.eval(mx.compile(lambda x: mx.exp(x) * x + 1)(mx.ones((2,))))


def kernel_folder() -> Path:
    """Where MLX keeps compiled kernels: in what C++ takes for the temporary folder."""
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    temporary = next((os.environ[name] for name in names if name in os.environ), "/tmp")
    return Path(temporary, "mlx", mx.__version__, "cpu")


def _reason(message: str) -> str:
    """The telling part of MLX's message, which holds the kernel's name and the whole command besides."""
    lines = message.rpartition("the output is:")[2].strip().splitlines()
    return lines[0].strip()[-200:] if lines else "g++ failed"
