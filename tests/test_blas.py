"""The BLAS that MLX runs on. Everything that depends on load order happens in a fresh process.

Finds: a preload that comes too late or takes nothing (a silent tens-of-times slowdown), one that
takes a library with other calling conventions (wrong numbers), and one that stops a run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxpref import blas

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux needs another BLAS")

REPORT = "; print(json.dumps([r.library, r.path, r.said]))"


def fresh(code: str, *, report: str = REPORT, **environ: str) -> list[str | None]:
    """Run ``code`` in a new process with ``r = preload()`` after it; what the record says."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import json; {code}; from mlxpref import blas; r = blas.preload(){report}"],
        env={**os.environ, "MLXPREF_BLAS": "", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def mkl_path() -> str:
    found = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if not found:
        pytest.skip("mkl is not installed here")
    return str(found[-1])


@linux
def test_takes_mkl_where_it_is_installed() -> None:
    library, path, said = fresh("pass")
    assert [library, path] == ["MKL", mkl_path()]
    assert str(path) in str(said)


@linux
def test_off_takes_nothing_and_says_so() -> None:
    assert fresh("pass", MLXPREF_BLAS="off") == [None, None, "MLX's reference BLAS (MLXPREF_BLAS=off)"]


@linux
@pytest.mark.parametrize(
    ("code", "environ", "remedy"),
    [
        ("pass", {"MLXPREF_BLAS": "off"}, "unset MLXPREF_BLAS"),
        ("pass", {"MLXPREF_BLAS": "/nowhere/lib.so"}, "apt install libopenblas0"),
        ("import sys; sys.modules['mlx.core'] = sys", {}, "get_backend()"),
    ],
    ids=["off", "nothing", "late"],
)
def test_what_is_slow_comes_with_its_remedy(code: str, environ: dict[str, str], remedy: str) -> None:
    assert remedy in str(fresh(code, report="; print(json.dumps([r.remedy]))", **environ)[0])


@linux
def test_what_is_fast_needs_none() -> None:
    mkl_path()
    assert fresh("pass", report="; print(json.dumps([r.remedy]))") == [None]


@linux
def test_a_path_is_taken_as_it_is() -> None:
    assert fresh("pass", MLXPREF_BLAS=mkl_path())[1] == mkl_path()


@linux
def test_a_wish_that_cannot_be_met_is_said_and_nothing_else_taken(tmp_path: Path) -> None:
    wish = str(tmp_path / "libnone.so")
    library, path, said = fresh("pass", MLXPREF_BLAS=wish)
    assert (library, path) == (None, None)
    assert wish in str(said)


@linux
def test_a_library_without_the_symbols_is_refused() -> None:
    """NumPy's own OpenBLAS: a real BLAS, with 64-bit integers and other names."""
    import numpy

    libs = sorted(Path(numpy.__file__).parent.parent.glob("numpy.libs/*openblas*"))
    if not libs:
        pytest.skip("this NumPy brings no OpenBLAS")
    library, _, said = fresh("import numpy", MLXPREF_BLAS=str(libs[0]))
    assert library is None
    assert "cblas_sgemm" in str(said)


@linux
def test_mkl_without_its_threads_is_left_alone(tmp_path: Path) -> None:
    """MKL would end the process at the first product; only a look beforehand can tell."""
    (tmp_path / "libmkl_rt.so.3").symlink_to(mkl_path())
    library, _, said = fresh("pass", MLXPREF_BLAS=str(tmp_path / "libmkl_rt.so.3"))
    assert library is None
    assert "libiomp5" in str(said)


@linux
@pytest.mark.mlx
def test_too_late_is_said() -> None:
    library, _, said = fresh("import mlx.core")
    assert library is None
    assert "before mlxpref" in str(said)


def test_the_same_answer_ever_after() -> None:
    assert blas.preload() is blas.preload()


PRODUCT = """
import json, sys, time
from mlxpref import backends
backends.get("mlx")
import mlx.core as mx, numpy as np
from mlxpref.mlx_backend.speed import matmul_gflops
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 193, 193)).astype(np.float32)
error = float(np.abs(np.array(mx.array(a) @ mx.array(b)) - a.astype(float) @ b).max())
print(json.dumps([error, matmul_gflops(768, repeats=3)]))
"""


def product(**environ: str) -> tuple[float, float]:
    """Largest error of a product against float64, and GFLOP/s, in a new process."""
    ran = subprocess.run(
        [sys.executable, "-c", PRODUCT],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    error, speed = json.loads(ran.stdout)
    return error, speed


@linux
@pytest.mark.mlx
def test_products_are_right_and_faster() -> None:
    mkl_path()
    error, fast = product(MLXPREF_BLAS="")
    reference_error, slow = product(MLXPREF_BLAS="off")
    assert max(error, reference_error) < 1e-3
    assert fast > 4 * slow, f"{fast:.0f} GFLOP/s with MKL, {slow:.0f} without"


BITS = """
import ctypes, itertools, sys
from mlxpref import blas
import numpy as np
library = ctypes.CDLL(blas.preload().path)
floats = ctypes.POINTER(ctypes.c_float)

def place(values, offset):
    room = np.empty(values.size + 32, np.float32)
    start = -room.ctypes.data % 64 // 4 + offset
    room[start : start + values.size] = values.ravel()
    return room[start : start + values.size]

def product(a, b, offset, threads):
    (k, m), n = a.shape, b.shape[1]
    library.MKL_Set_Num_Threads(threads)
    at = [place(x, offset) for x in (a, b, np.zeros((m, n), np.float32))]
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    x, y, z = (v.ctypes.data_as(floats) for v in at)
    library.cblas_sgemm(101, 112, 111, m, n, k, one, x, m, y, n, zero, z, n)  # a transposed
    return at[2].tobytes()

rng = np.random.default_rng(0)
different = 0
for m, n, k in [(17, 1, 900), (7, 5, 33), (64, 64, 64), (333, 64, 172), (1, 2048, 128)]:
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((k, m), (k, n)))
    for counts in THREADS:
        different += len({product(a, b, offset, threads) for offset in (0, 1, 3, 4, 8) for threads in counts}) - 1
sys.exit(f"{different} products differ in their bits" if different else 0)
"""


@linux
def test_bits_do_not_depend_on_alignment_or_threads() -> None:
    """Or else a resumed run is not the uninterrupted one, now and then, on no one's fault.

    MKL promises it for any number of threads on Intel's processors alone; on others each number has bits of its own.
    """
    mkl_path()
    counts = [(1, 2)] if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else [(1,), (2,)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MKL_")}
    run = [sys.executable, "-c", f"THREADS = {counts}\n{BITS}"]
    ran = subprocess.run(run, env={**clean, "MLXPREF_BLAS": ""}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_backends_are_got_by_name() -> None:
    from mlxpref import backends
    from mlxpref.errors import UsageError

    with pytest.raises(UsageError, match=r"jax.*auto, mlx"):
        backends.get("jax")


@pytest.mark.mlx
def test_the_backend_has_the_five_functions() -> None:
    from mlxpref import backends

    for name in ("load_policy", "token_logps", "make_step", "save_adapter", "load_adapter"):
        assert callable(getattr(backends.get("mlx"), name))
