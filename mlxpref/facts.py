"""What a result has to say about where it came from: versions, commit, platform."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

PACKAGES = (
    "mlxpref", "mlx", "mlx-metal", "mlx-cpu", "mlx-lm", "torch", "peft",
    "transformers", "tokenizers", "datasets", "numpy",
)  # fmt: skip
"""Packages that can change a run's numbers."""


def versions() -> dict[str, str]:
    """Installed versions by package, with Python's own and the platform's name."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path | None = None) -> str | None:
    """The git commit of the source tree this package runs from; None when it was installed from a wheel.

    Args:
        root: the tree; by default the one that holds the package.
    """
    git = (root or Path(__file__).resolve().parents[1]) / ".git"
    try:
        if git.is_file():  # a worktree: the file names its folder
            git = (git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return _hash(head)
        name = head.removeprefix("ref: ")
        common = git / "commondir"
        store = (git / common.read_text(encoding="utf-8").strip()) if common.is_file() else git
        if (store / name).is_file():
            return _hash((store / name).read_text(encoding="utf-8"))
        packed = (store / "packed-refs").read_text(encoding="utf-8")
        return next((_hash(line) for line in packed.splitlines() if line.endswith(f" {name}")), None)
    except OSError:
        return None


def _hash(text: str) -> str | None:
    found = re.match(r"[0-9a-f]{40,64}", text)
    return found[0] if found else None
