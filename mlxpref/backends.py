"""The machine rooms by name. Nothing else on the spine knows that there is more than one."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from types import ModuleType

from mlxpref import blas
from mlxpref.errors import UsageError

NAMES = ("mlx", "torch")
"""Backends there are."""

_PACKAGES = {"mlx": ("mlx", "mlx_lm"), "torch": ("torch", "transformers", "peft")}
_INSTALL = {
    "mlx": "pip install 'mlxpref[cpu]' on Linux, 'mlxpref[cuda]' with an NVIDIA GPU",
    "torch": "pip install 'mlxpref[torch]'",
}


def get(name: str = "auto") -> ModuleType:
    """The backend's module, with the same functions as every other: ``load_policy``, ``token_logps``,
    ``make_step``, ``save_adapter``, ``load_adapter``.

    Raises:
        UsageError: there is no such backend, or what it needs is not installed.
    """
    if name == "auto":
        name = choose()
    if name not in NAMES:
        raise UsageError(f"no backend is called {name!r}; there are: auto, {', '.join(NAMES)}")
    lacking = _lacking(name)
    if lacking:
        raise UsageError(f"backend {name!r} needs {' and '.join(lacking)}: {_INSTALL[name]}")
    blas.preload()  # once mlx.core is imported it is too late
    try:
        return importlib.import_module(f"mlxpref.{name}_backend")
    except ImportError as error:
        if (error.name or "").startswith("mlxpref"):
            raise  # ours, not a library that is missing
        raise UsageError(f"backend {name!r} cannot be loaded: {error}. {_INSTALL[name]}") from error


def choose() -> str:
    """What "auto" is: MLX where Metal or MLX's CUDA build is, else PyTorch on CUDA, else MLX on the CPU; what is not
    installed is passed over."""
    there = [name for name in NAMES if not _lacking(name)]
    if "mlx" in there and (_has_metal() or _has_mlx_cuda()):
        return "mlx"
    if "torch" in there and _has_cuda():
        return "torch"
    return there[0] if there else "mlx"


def _has_metal() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _has_mlx_cuda() -> bool:
    """MLX's CUDA build is installed, and a GPU is there for it."""
    builds = ("mlx-cuda-12", "mlx-cuda-13")
    return _has_cuda_driver() and any(_is_installed(build) for build in builds)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_cuda() -> bool:
    """There is a GPU, and PyTorch's build is not that for CPUs. It is not asked: importing it takes a second."""
    return _has_cuda_driver() and _is_installed("torch") and not importlib.metadata.version("torch").endswith("+cpu")


def _has_cuda_driver() -> bool:
    """An NVIDIA driver with a GPU that this process may use."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def _lacking(name: str) -> list[str]:
    return [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]


get_backend = get
"""``get`` under the name it has outside, as ``mlxpref.get_backend``."""
