"""The machine rooms by name. Nothing else on the spine knows that there is more than one."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from mlxpref import blas
from mlxpref.errors import UsageError

NAMES = ("mlx",)
"""Backends there are; "auto" is the first that is installed."""

_PACKAGES = {"mlx": ("mlx", "mlx_lm")}
_INSTALL = {"mlx": "pip install 'mlxpref[cpu]' on Linux, 'mlxpref[cuda]' with an NVIDIA GPU"}


def get(name: str = "auto") -> ModuleType:
    """The backend's module, with the same five functions as every other: ``load_policy``,
    ``token_logps``, ``make_step``, ``save_adapter``, ``load_adapter``.

    Raises:
        UsageError: there is no such backend, or what it needs is not installed.
    """
    if name == "auto":
        name = next((n for n in NAMES if not _lacking(n)), NAMES[0])
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


def _lacking(name: str) -> list[str]:
    return [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]


get_backend = get
"""``get`` under the name it has outside, as ``mlxpref.get_backend``."""
