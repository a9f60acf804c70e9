"""A faster BLAS for MLX on a Linux CPU, taken before ``mlx.core`` is first imported.

MLX's CPU build for Linux carries the reference BLAS, which reaches a few GFLOP/s where MKL or
OpenBLAS reach tens of times more. The dynamic linker gives a symbol to the library that was loaded
first, so loading another one globally, early, is all it takes. Nowhere else is this needed, and it
never stops a run: :func:`preload` says what it took, or why it took nothing.

``MLXPREF_BLAS=off`` leaves MLX as it is; ``MLXPREF_BLAS=/path/to/lib.so`` names the library to take.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "sgetrf_", "ssyevd_")
"""A few of the names MLX asks for: CBLAS and LAPACK, with 32-bit integers."""

MKL_AUTO_STRICT = 2 | 0x10000
"""Results that do not depend on where an array lies in memory or, on Intel's processors, on the number of
threads. Without it a resumed run differs from an uninterrupted one in the last bits; it costs nothing measurable."""

REMEDY = "install OpenBLAS (Debian, Ubuntu: apt install libopenblas0), or on x86-64 MKL (pip install mkl)"


@dataclass(frozen=True, slots=True)
class BlasRecord:
    """What MLX's matrix products on the CPU run on.

    Attributes:
        library: "MKL", "OpenBLAS", the file's name, or None when MLX's own was left in place.
        path: of the library that was loaded, or None.
        said: one line for people.
        remedy: what to do about it, or None when nothing is amiss.
        reference: whether it is known to be the reference BLAS of MLX's Linux build.
    """

    library: str | None
    path: str | None
    said: str
    remedy: str | None = None
    reference: bool = False


_record: BlasRecord | None = None


def preload() -> BlasRecord:
    """Load a faster BLAS if this is MLX on a Linux CPU and there is one; the same answer ever after."""
    global _record
    if _record is None:
        _record = _choose(os.environ)
    return _record


def _choose(environ: Mapping[str, str]) -> BlasRecord:
    wish = environ.get("MLXPREF_BLAS", "").strip()
    why_not = _not_needed(wish)
    if why_not:
        off = sys.platform == "linux" and wish.lower() == "off" and _installed("mlx-cpu")
        return BlasRecord(None, None, *why_not, reference=off)
    refused = []
    for path in [wish] if wish else _candidates():
        problem = _take(path, environ)
        if problem is None:
            return BlasRecord(_name(path), path, f"{_name(path)} ({path})")
        refused.append(f"{path}: {problem}")
    why = "; ".join(refused) or "no MKL or OpenBLAS found"
    return BlasRecord(None, None, f"MLX's reference BLAS, slow: {why}", REMEDY, reference=True)


def _not_needed(wish: str) -> tuple[str, str | None] | None:
    """Why MLX's own BLAS stays and what to do about it, or None when another one should be looked for."""
    if sys.platform != "linux":
        return ("MLX's own (Accelerate)" if sys.platform == "darwin" else "MLX's own"), None
    if wish.lower() == "off":
        return "MLX's reference BLAS (MLXPREF_BLAS=off)", "unset MLXPREF_BLAS for a faster one"
    if "mlx.core" in sys.modules:
        remedy = "call mlxpref.get_backend() before importing mlx.core"
        return "unknown: mlx.core was imported before mlxpref could choose", remedy
    if not wish and not _installed("mlx-cpu"):
        return "MLX's own (not the CPU build)", None
    return None


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _candidates() -> Iterator[str]:
    """Paths or names for the linker: PyPI's MKL in this environment, then the system's OpenBLAS."""
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix)):
        yield from map(str, sorted(Path(prefix, "lib").glob("libmkl_rt.so*"), reverse=True))
    for name in ("libopenblas.so.0", "libopenblas.so"):
        if _loads(name):
            yield name


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL)
    except OSError:
        return False
    return True


def _take(path: str, environ: Mapping[str, str]) -> str | None:
    """Make a library's symbols everybody's; or leave it and return what is wrong with it."""
    if "mkl_rt" in path and not _threads_library(Path(path), environ):
        return "libiomp5.so is not beside it (pip install intel-openmp)"
    try:
        library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)  # look first, under its own roof
    except OSError as error:
        return str(error)
    missing = [name for name in SYMBOLS if not hasattr(library, name)]
    if missing:
        return f"has no {', '.join(missing)}"
    if hasattr(library, "MKL_Set_Interface_Layer"):
        if library.MKL_Set_Interface_Layer(0) & 1:
            return "is set to 64-bit integers (MKL_INTERFACE_LAYER)"
        if "MKL_CBWR" not in environ:
            library.MKL_CBWR_Set(MKL_AUTO_STRICT)
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return None


def _threads_library(path: Path, environ: Mapping[str, str]) -> bool:
    """MKL ends the process when it cannot find its threads, so look before it does."""
    if environ.get("MKL_THREADING_LAYER", "INTEL").upper() != "INTEL" or not path.is_absolute():
        return True
    return (path.parent / "libiomp5.so").exists()


def _name(path: str) -> str:
    stem = Path(path).name
    return "MKL" if "mkl_rt" in stem else "OpenBLAS" if "openblas" in stem else stem
